//! Memory that is fetched before the device touches it.

use super::Test;
use super::words::{self, Words};
use crate::Skip;
use crate::engine::{Machine, Spec};
use crate::exec;
use gpusvm::ByteSize;
use std::time::{Duration, Instant};

const LEN: usize = 64 << 20;
const TIMES: u32 = 128;

pub(super) fn benchmarks() -> Vec<Test> {
    vec![
        Test::long("prefetch-benchmark", || benchmark(false)),
        Test::long("prefetch-sys-benchmark", || benchmark(true)),
    ]
}

/// There, and home again: how fast it goes there, or both ways. What the device wrote is not lost.
fn benchmark(both: bool) -> Result<(), Skip> {
    let _no_fork = exec::no_fork();
    let machine = Machine::with(Spec {
        vram: ByteSize::from_usize(2 * LEN),
        ..Spec::default()
    })?;
    let engine = machine.engine(0);
    let memory = Words::new(&machine, LEN);
    // Every byte is five.
    let filled = 0x0505_0505;
    let mut took = Duration::ZERO;
    for i in 0..TIMES {
        let began = Instant::now();
        let there = engine.prefetch(memory.0.at(), LEN);
        took += began.elapsed();
        assert_eq!(there.moved, LEN as u64 >> 21, "{there:?}");
        words::touch(engine, &memory, false);
        let began = Instant::now();
        let home = machine.home(&memory.0);
        took += if both {
            began.elapsed()
        } else {
            Duration::ZERO
        };
        assert_eq!((home.failed, machine.stats().pages_on_devices), (0, 0));
        words::check(&memory, filled + 1 + i);
    }
    assert_eq!(engine.stats().faults, 0, "{:?}", engine.stats());
    let ways = if both { 2.0 } else { 1.0 };
    let bytes = ways * f64::from(TIMES) * LEN as f64;
    let speed = bytes / took.as_secs_f64() / 1e9;
    println!("prefetch of {TIMES} times 64 MiB: {speed:.2} GB/s");
    drop(memory);
    machine.finish(0);
    Ok(())
}

/// Where nothing is mapped, a prefetch is counted, and is no error. Of memory nothing is counted, and the
/// device does not fault there.
pub(super) fn fault() -> Result<(), Skip> {
    let _no_fork = exec::no_fork();
    let machine = Machine::new(1)?;
    let engine = machine.engine(0);
    let memory = Words::page(&machine);
    // Nobody maps the second page of all.
    let nowhere = std::ptr::without_provenance_mut::<u8>(4096);
    let done = engine.prefetch(nowhere, 4096);
    assert_eq!((done.invalid, done.failed, done.moved), (1, 0, 0));
    let done = engine.prefetch(memory.0.at(), memory.0.len());
    assert_eq!((done.invalid, done.failed, done.moved), (0, 0, 1));
    words::touch(engine, &memory, false);
    assert_eq!(engine.stats().faults, 0);
    words::check(&memory, 0x0505_0506);
    drop(memory);
    machine.finish(0);
    Ok(())
}
