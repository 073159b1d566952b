//! The Graph500 generator: a Kronecker graph with a few vertices of very high degree.
//!
//! Every edge falls, bit by bit, into one of the four quarters of the adjacency matrix, with the
//! probabilities below; then the vertices are renamed at random, so that a name says nothing about the
//! degree. Graph500 also shuffles the edges; here they are independent of each other from the start.
//!
//! ```text
//!             v: 0    1
//!     u: 0   A .57  B .19
//!        1   C .19  D .05
//! ```
//!
//! Each edge has random numbers of its own, so any edge can be had at any time, and one seed gives one
//! graph.

use super::index;
use crate::random::Random;
use std::fmt;

/// The chance of the upper half: A + B.
const UPPER: f64 = 0.57 + 0.19;
/// The chance of the left quarter in the upper half.
const UPPER_LEFT: f64 = 0.57 / UPPER;
/// The chance of the left quarter in the lower half.
const LOWER_LEFT: f64 = 0.19 / (1.0 - UPPER);

/// One graph: edges are computed when asked for.
#[derive(Debug)]
pub(crate) struct Kronecker {
    scale: u32,
    edge_factor: u32,
    seed: u64,
    names: Vec<u32>,
}

impl Kronecker {
    /// `2^scale` vertices, and `edge_factor` times as many edges.
    ///
    /// # Panics
    ///
    /// At a scale above 31.
    pub(crate) fn new(scale: u32, edge_factor: u32, seed: u64) -> Self {
        assert!(scale < 32, "vertex ids are u32, and one is kept for `none`");
        Self {
            scale,
            edge_factor,
            seed,
            names: Vec::new(),
        }
    }

    /// Draws the names of the vertices, which takes memory and time. Before it they are unnamed: edges
    /// join vertices as the matrix numbers them.
    pub(crate) fn permute(&mut self) {
        let count = u32::try_from(self.vertices()).expect("2^31 at most");
        self.names = (0..count).collect();
        let mut random = Random::new(self.seed, u64::MAX);
        for i in (1..count).rev() {
            let other = random.below(u64::from(i) + 1);
            self.names.swap(index(i), index(other));
        }
    }

    /// The number of vertices.
    pub(crate) fn vertices(&self) -> u64 {
        1 << self.scale
    }

    /// The number of edges, repeated ones and loops included.
    pub(crate) fn edges(&self) -> u64 {
        self.vertices() * u64::from(self.edge_factor)
    }

    /// The edge with this number.
    pub(crate) fn edge(&self, i: u64) -> [u64; 2] {
        let mut random = Random::new(self.seed, i);
        let mut edge = [0; 2];
        for _ in 0..self.scale {
            let [down, across] = random.pair();
            let lower = down >= threshold(UPPER);
            let right = across >= threshold(if lower { LOWER_LEFT } else { UPPER_LEFT });
            edge = [
                edge[0] << 1 | u64::from(lower),
                edge[1] << 1 | u64::from(right),
            ];
        }
        if self.names.is_empty() {
            edge
        } else {
            edge.map(|v| self.names[index(v)].into())
        }
    }
}

impl fmt::Display for Kronecker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            scale,
            edge_factor,
            seed,
            ..
        } = self;
        write!(
            f,
            "Kronecker graph, scale {scale}, edge factor {edge_factor}, seed {seed}"
        )
    }
}

/// A chance as a bound for 32 random bits.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a chance below one of 2^32 fits"
)]
#[expect(clippy::cast_sign_loss, reason = "a chance is not negative")]
const fn threshold(chance: f64) -> u32 {
    (chance * 4_294_967_296.0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(scale: u32, edge_factor: u32, seed: u64) -> Vec<[u64; 2]> {
        let mut k = Kronecker::new(scale, edge_factor, seed);
        k.permute();
        (0..k.edges()).map(|i| k.edge(i)).collect()
    }

    fn degrees(edges: &[[u64; 2]], vertices: usize) -> Vec<usize> {
        let mut degrees = vec![0; vertices];
        edges
            .as_flattened()
            .iter()
            .for_each(|&v| degrees[index(v)] += 1);
        degrees
    }

    #[test]
    fn one_seed_one_graph() {
        assert_eq!(graph(10, 16, 7), graph(10, 16, 7));
        assert_ne!(graph(10, 16, 7), graph(10, 16, 8));
    }

    #[test]
    fn as_many_edges_as_asked_for_and_all_between_vertices() {
        for (scale, edge_factor) in [(1, 1), (4, 3), (10, 16)] {
            let edges = graph(scale, edge_factor, 1);
            assert_eq!(edges.len(), index(edge_factor) << scale);
            assert!(edges.as_flattened().iter().all(|&v| v < 1 << scale));
        }
    }

    #[test]
    fn names_are_a_permutation() {
        let mut k = Kronecker::new(12, 1, 3);
        k.permute();
        assert_ne!(k.names, (0..4096).collect::<Vec<_>>());
        k.names.sort_unstable();
        assert_eq!(k.names, (0..4096).collect::<Vec<_>>());
    }

    #[test]
    fn quarters_have_their_share() {
        let k = Kronecker::new(1, 100_000, 5);
        let mut share = [[0.0; 2]; 2];
        for i in 0..k.edges() {
            let [u, v] = k.edge(i);
            share[index(u)][index(v)] += 1.0 / k.edges() as f64;
        }
        for (got, want) in share.as_flattened().iter().zip([0.57, 0.19, 0.19, 0.05]) {
            assert!((got - want).abs() < 0.01, "{share:?}");
        }
    }

    #[test]
    fn degrees_are_skewed_and_names_hide_it() {
        let edges = graph(12, 16, 1);
        let mut degrees = degrees(&edges, 4096);
        let first_half: usize = degrees[..2048].iter().sum();
        assert!(
            (0.4..0.6).contains(&(first_half as f64 / 131_072.0)),
            "{first_half}"
        );
        degrees.sort_unstable();
        let top: usize = degrees[4096 - 41..].iter().sum();
        assert!(
            top as f64 > 0.15 * 131_072.0,
            "1 % of the vertices have {top} edge ends"
        );
        assert!(degrees[0] == 0, "and some vertex has none");
    }
}
