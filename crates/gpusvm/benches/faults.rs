//! Faults in different blocks: in one address space of a device, and in two, the same work in all.
//!
//! Each round has a lane a block touch one word; then everything goes home. The two ways take turns, so
//! that what else the machine does falls on both. Medians: a fault here is a migration of 2 MiB.
#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a program that measures"
)]

use gpusvm::driver::{Devices, MigrateOnTouch, Vm, VramRegion, worker};
use gpusvm::{ByteSize, Grid, SoftGpu, SvmPtr};
use gpusvm_device::Device;
use gpusvm_mm::AddressSpace;
use gpusvm_mm_linux::{Allocation, Options, Process};
use std::sync::Arc;
use std::time::Duration;

const BLOCK: usize = 2 << 20;
const WORDS: usize = BLOCK / 8;
const BLOCKS: usize = 32;
const ROUNDS: usize = 41;
const UNITS: usize = 8;

struct Lab {
    gpu: Arc<SoftGpu>,
    process: Arc<Process>,
    vms: Vec<Arc<Vm<Process>>>,
    words: Allocation<u64>,
}

impl Lab {
    /// How long it takes to fault on every block, by so many address spaces.
    fn round(&self, vms: usize) -> Duration {
        let lanes = BLOCKS / vms;
        let p = SvmPtr::from(self.words.as_ptr().cast_mut());
        let began = self.process.now();
        let launch = |(i, vm): (usize, &Arc<Vm<Process>>)| {
            let p = p.add(i * lanes * WORDS);
            // SAFETY: by atomics; the words outlive the launch.
            let launch = unsafe {
                self.gpu.launch(vm.id(), Grid::new(lanes), move |lane| {
                    lane.atomic_add(p.add(lane.id() * WORDS), 1u64)?;
                    Ok(())
                })
            };
            launch.unwrap()
        };
        let vms = self.vms[..vms].iter().enumerate();
        let launches: Vec<_> = vms.map(launch).collect();
        for launch in launches {
            launch.wait().unwrap();
        }
        let took = self.process.now().since(began);
        self.vms[0].migrate_to_ram(self.words.span()).unwrap();
        took
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn main() {
    // `cargo test --benches` only wants to know that it runs.
    let rounds = match std::env::args().any(|arg| arg == "--bench") {
        true => ROUNDS,
        false => 1,
    };
    let gpu = SoftGpu::builder().vram(ByteSize::mib(128)).units(UNITS);
    let gpu = gpu.build().unwrap();
    let process = Process::start(Options::default()).unwrap();
    let devices = Devices::new(&process);
    let region = VramRegion::new(&devices, Arc::clone(&gpu) as _).unwrap();
    let policy = MigrateOnTouch {
        timeslice: Duration::ZERO,
    };
    let vm = |_| Vm::new(&region, Arc::new(policy)).unwrap();
    let vms: Vec<_> = (0..2).map(vm).collect();
    let workers = worker::start(&region).unwrap();
    let mut words = Allocation::<u64>::new(&process, BLOCKS * WORDS).unwrap();
    words.fill(1);
    let lab = Lab {
        gpu,
        process,
        vms,
        words,
    };
    let (mut one, mut two) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        one.push(lab.round(1));
        two.push(lab.round(2));
    }
    #[expect(clippy::cast_precision_loss, reason = "a rate to look at")]
    let rate = |time: Duration| BLOCKS as f64 / time.as_secs_f64();
    let (one, two) = (rate(median(one)), rate(median(two)));
    println!("{BLOCKS} blocks, {UNITS} units, {rounds} rounds each, median");
    println!("one address space:  {one:8.0} faults/s");
    println!(
        "two address spaces: {two:8.0} faults/s, {:.2} of one",
        two / one
    );
    lab.vms.iter().for_each(|vm| vm.refuse_faults());
    lab.gpu.fault_queue().unwrap().close();
    workers.into_iter().for_each(|it| it.join().unwrap());
    region.unbind().unwrap();
    lab.vms.iter().for_each(|vm| vm.close());
    lab.process.stop();
}
