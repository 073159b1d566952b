//! A real kernel on memory of the allocator: squares, of one element or of all, and how long a fault
//! takes.

use super::Test;
use crate::Skip;
use crate::buffer::Buffer;
use crate::engine::Machine;
use crate::sections::Flags;
use gpusvm::{Grid, SvmPtr};

pub(super) fn tests() -> Vec<Test> {
    let mut tests = vec![Test::quick("compute", || squares(2 << 20, false, true))];
    for (touch, once) in [("once", true), ("range", false)] {
        for (who, host) in [("device", false), ("device-host", true)] {
            for (name, size) in [("4k", 4 << 10), ("64k", 64 << 10), ("2m", 2 << 20)] {
                let name = format!("eu-fault-{name}-{touch}-{who}");
                tests.push(Test::quick(name, move || squares(size, once, host)));
            }
        }
    }
    tests
}

/// What element `i` is.
fn input(i: usize) -> u32 {
    u32::try_from(i % 1000).expect("small") + 2
}

/// Squares `size` bytes of numbers, or the first of them, in place, and looks at them or does not.
fn squares(size: usize, once: bool, host: bool) -> Result<(), Skip> {
    let machine = Machine::new(1)?;
    let engine = machine.engine(0);
    let count = size / 4;
    let touched = if once { 1 } else { count };
    let buffer = Buffer::malloc(machine.svm(), size, Flags::NO_MEMSET);
    let numbers = buffer.at().cast::<u32>();
    for i in 0..touched {
        // SAFETY: inside the buffer, which nobody else uses yet.
        unsafe { numbers.wrapping_add(i).write(input(i)) };
    }
    let first = SvmPtr::from(numbers);
    let launch = engine.launch(Grid::new(touched), move |lane| {
        let at = first.add(lane.id());
        let x = lane.load(at)?;
        lane.store(at, x * x)
    });
    launch.wait().expect("a kernel");
    let stats = machine.stats();
    let (faults, time) = (stats.device_faults, stats.device_fault_time);
    assert!(faults > 0 && stats.to_device.bytes > 0, "{stats:?}");
    let micros = |time: std::time::Duration| time.as_nanos() as f64 / 1000.0;
    println!(
        "{size} bytes: {faults} faults, half of them in {:.1} us, the longest {:.1} us",
        micros(time.p50),
        micros(time.max),
    );
    if host {
        for i in 0..touched {
            // SAFETY: inside the buffer; the launch has ended.
            let found = unsafe { numbers.wrapping_add(i).read() };
            assert_eq!(found, input(i) * input(i), "element {i}");
        }
        assert!(machine.stats().to_ram.bytes > 0);
    }
    drop(buffer);
    machine.finish(0);
    Ok(())
}
