//! Threads that open, close and run commands at once.

use crate::kit::{Area, DEVICES, Descriptor, Do, PAGE, engine_runs, is_preloaded};
use std::sync::Barrier;

/// A command that is under way when its device is closed is done, or refused; nothing is lost, and whoever is last
/// ends the engine.
#[test]
fn a_device_is_closed_during_commands() {
    if !is_preloaded("apps::racing::a_device_is_closed_during_commands") {
        return;
    }
    for round in 0..24 {
        let device = Descriptor::open(DEVICES[0], 0).unwrap();
        let areas = [Area::new(64), Area::new(64), Area::new(64)];
        areas.iter().for_each(|area| area.fill(round));
        let start = Barrier::new(areas.len() + 1);
        std::thread::scope(|scope| {
            for (area, command) in areas.iter().zip([Do::MigrateToDev, Do::Read, Do::Write]) {
                let (pages, start) = (area.all(), &start);
                scope.spawn(move || {
                    let mut data = vec![0; pages.len()];
                    // What is written is what is there.
                    device.run(Do::Read, pages, &mut data).unwrap();
                    start.wait();
                    let refused = loop {
                        match device.run(command, pages, &mut data) {
                            Ok(done) => assert_eq!(done.cpages, 64),
                            Err(errno) => break errno,
                        }
                    };
                    // The number may be another's by then, for a moment.
                    assert!([libc::EBADF, libc::ENOTTY].contains(&refused), "{refused}");
                });
            }
            start.wait();
            for _ in 0..round % 8 * 20 {
                std::thread::yield_now();
            }
            device.close().unwrap();
        });
        assert!(!engine_runs(), "round {round}");
        assert!(
            areas.iter().all(|area| area.is_filled(round)),
            "round {round}"
        );
    }
}

/// Devices come and go in 64 threads at once, and with them the engine.
#[test]
fn many_threads_open_and_close() {
    if !is_preloaded("apps::racing::many_threads_open_and_close") {
        return;
    }
    std::thread::scope(|scope| {
        for thread in 0..64 {
            scope.spawn(move || {
                let area = Area::new(2);
                for round in 0..4 {
                    area.fill(thread + round);
                    let first = Descriptor::open(DEVICES[0], libc::O_CLOEXEC).unwrap();
                    let twin = first.dup();
                    let mut data = [0; 2 * PAGE];
                    // Who closes a file takes back what all files have on the device: it may be gone before
                    // it was read, as in the kernel.
                    match twin.run(Do::MigrateToDev, area.all(), &mut data) {
                        Ok(done) => assert_eq!(done.cpages, 2),
                        Err(errno) => assert_eq!(errno, libc::ENOENT),
                    }
                    first.close().unwrap();
                    twin.run(Do::Read, area.all(), &mut data).unwrap();
                    assert!(area.is_filled(thread + round));
                    twin.close().unwrap();
                    assert!(area.is_filled(thread + round));
                }
            });
        }
    });
    assert!(!engine_runs());
}
