//! STREAM triad: `a[i] = b[i] + s * c[i]`, over and over, on three arrays that together exceed VRAM.
//!
//! The device works in tiles: it loads one of `b` and of `c`, and stores one of `a`. The scalar changes
//! with each iteration, so that what an earlier one left behind is not taken for a result. At the end
//! the CPU computes every element again, and checks that `b` and `c` are as they were.

use super::{Fact, Outcome, Verdict, Workload};
use crate::args::{Options, TriadArgs};
use crate::error::CliError;
use crate::graph::index;
use crate::machine::Context;
use crate::random::Random;
use gpusvm::{Lane, LaneError, SvmPtr};
use std::time::Duration;

/// Elements that a lane loads at once: 4 KiB.
const TILE: usize = 512;

/// The workload.
#[derive(Debug)]
pub(crate) struct Triad {
    elements: u64,
    iterations: u32,
}

impl Triad {
    /// Three arrays of a third of the size each.
    pub(crate) fn new(args: &TriadArgs, options: &Options) -> Self {
        let size = args
            .size
            .map_or(options.vram.get().saturating_mul(4), |size| size.get());
        Self {
            elements: size / 24,
            iterations: args.iterations,
        }
    }
}

impl Workload for Triad {
    fn name(&self) -> &'static str {
        "triad"
    }

    fn subject(&self) -> String {
        format!("a[i] = b[i] + s * c[i], {} times", self.iterations)
    }

    fn footprint(&self) -> Option<u64> {
        self.elements.checked_mul(24)
    }

    fn run(self: Box<Self>, context: &Context<'_>) -> Result<Outcome, CliError> {
        let n = index(self.elements);
        let a = context.alloc::<f64>(n)?;
        let mut b = context.alloc::<f64>(n)?;
        let mut c = context.alloc::<f64>(n)?;
        context.progress.open_stage("filling the arrays");
        fill(&mut b, context.seed, 0);
        fill(&mut c, context.seed, 1);

        let kernel = Kernel {
            a: a.device_ptr(),
            b: b.device_ptr(),
            c: c.device_ptr(),
            n,
        };
        let mut time = Duration::ZERO;
        context.progress.stage("computing", self.iterations.into());
        for iteration in 0..self.iterations {
            let s = scalar(iteration);
            let tile = move |lane: &mut Lane<'_>| kernel.run(lane, s);
            // SAFETY: the three arrays live until the end of this function, and only the device
            // touches them while it computes.
            time += unsafe { context.launch(n.div_ceil(TILE), tile) }?;
            context.progress.step(1);
        }

        context.progress.open_stage("verifying");
        let verdict = verify([&a, &b, &c], context.seed, scalar(self.iterations - 1));
        let moved = self.elements * 24 * u64::from(self.iterations);
        let facts = vec![
            Fact::count("elements", "elements", self.elements),
            Fact::count("iterations", "iterations", self.iterations.into()),
            Fact::time("compute_s", "computing", time),
            Fact::rate("triad_bytes_per_s", "triad", "MB/s", (moved, time)),
        ];
        Ok(Outcome { verdict, facts })
    }
}

fn scalar(iteration: u32) -> f64 {
    3.0 + f64::from(iteration)
}

fn fill(array: &mut [f64], seed: u64, which: u64) {
    let mut random = Random::new(seed, which);
    array.iter_mut().for_each(|x| *x = random.bits() as f64);
}

/// The arrays as the device sees them.
#[derive(Clone, Copy)]
struct Kernel {
    a: SvmPtr<f64>,
    b: SvmPtr<f64>,
    c: SvmPtr<f64>,
    n: usize,
}

impl Kernel {
    /// One tile.
    fn run(self, lane: &mut Lane<'_>, s: f64) -> Result<(), LaneError> {
        let start = lane.id() * TILE;
        let len = TILE.min(self.n - start);
        let (mut b, mut c) = ([0.0; TILE], [0.0; TILE]);
        lane.load_tile(self.b.add(start), &mut b[..len])?;
        lane.load_tile(self.c.add(start), &mut c[..len])?;
        for (b, c) in b.iter_mut().zip(&c) {
            *b += s * c;
        }
        lane.store_tile(self.a.add(start), &b[..len])
    }
}

fn verify([a, b, c]: [&[f64]; 3], seed: u64, s: f64) -> Verdict {
    let (mut random_b, mut random_c) = (Random::new(seed, 0), Random::new(seed, 1));
    for i in 0..a.len() {
        let (want_b, want_c) = (random_b.bits() as f64, random_c.bits() as f64);
        let want = [want_b + s * want_c, want_b, want_c];
        let found = [a[i], b[i], c[i]];
        if let Some(k) = (0..3).find(|&k| found[k].to_bits() != want[k].to_bits()) {
            let name = ["a", "b", "c"][k];
            return Verdict::Wrong(format!("{name}[{i}] is {:e}, not {:e}", found[k], want[k]));
        }
    }
    Verdict::Verified("every element, bit by bit".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_bit_in_any_array_is_found() {
        let (mut b, mut c) = ([0.0; 9], [0.0; 9]);
        fill(&mut b, 4, 0);
        fill(&mut c, 4, 1);
        let a: Vec<f64> = b.iter().zip(&c).map(|(b, c)| b + 5.0 * c).collect();
        let good = [a, b.to_vec(), c.to_vec()];
        let check = |arrays: &[Vec<f64>; 3]| verify([&arrays[0], &arrays[1], &arrays[2]], 4, 5.0);
        assert!(matches!(check(&good), Verdict::Verified(_)));
        for (which, name) in ["a[8]", "b[8]", "c[8]"].into_iter().enumerate() {
            let mut bad = good.clone();
            bad[which][8] = f64::from_bits(bad[which][8].to_bits() ^ 1);
            let Verdict::Wrong(text) = check(&bad) else {
                panic!("{name} was not found")
            };
            assert!(text.starts_with(name), "{text}");
        }
    }
}
