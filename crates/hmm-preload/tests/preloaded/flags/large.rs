//! A large allocation fails: migrations take the way of many small steps, and nobody else notices.

use super::is_preloaded;
use crate::kit::{Area, Device, Do, HUGE, PAGE, READ_WRITE, assert_same, pattern, seen};

/// The next large allocation fails.
const FAIL_ALLOC: usize = 1;

/// There and back with a failure each way, as the kernel's test of this name.
#[test]
fn migrate_anon_huge_err() {
    if !is_preloaded("flags::large::migrate_anon_huge_err") {
        return;
    }
    let device = Device::open();
    let mut data = vec![0; HUGE * PAGE];
    {
        let area = Area::aligned(HUGE, true, READ_WRITE);
        area.fill(1);
        device.set_flags(FAIL_ALLOC);
        let done = device.run(Do::MigrateToDev, area.all(), &mut data).unwrap();
        assert_eq!(done.cpages, 512);
        assert_same(&data, &pattern(1, 0, HUGE), "on the device");
        assert!(
            device
                .look(area.all())
                .iter()
                .all(|page| *page == seen::PRIVATE_LOCAL | seen::WRITE)
        );
        assert!(area.is_filled_in(4, 1, 1));
        assert!(area.is_filled(1));
    }
    let area = Area::aligned(HUGE, true, READ_WRITE);
    area.fill(1);
    let was_huge = device.look(area.all())[0] & seen::PMD != 0;
    let is_huge = || device.look(area.all())[0] & seen::PMD != 0;
    let mut there_and_back = |flags| {
        let done = device.run(Do::MigrateToDev, area.all(), &mut data).unwrap();
        assert_eq!(done.cpages, 512);
        device.set_flags(flags);
        let done = device.run(Do::MigrateToSys, area.all(), &mut data).unwrap();
        assert_eq!(done.cpages, 512);
        assert!(area.is_filled(1));
    };
    // Home as one, where the system has huge pages at all; else in base pages, once.
    there_and_back(0);
    assert_eq!(is_huge(), was_huge);
    there_and_back(FAIL_ALLOC);
    assert!(!is_huge());
}

/// Memory that nobody touched, and memory that is zero, in which a huge page can be for everybody.
#[test]
fn migrate_anon_huge_zero_err() {
    if !is_preloaded("flags::large::migrate_anon_huge_zero_err") {
        return;
    }
    let device = Device::open();
    for is_read_before in [false, true] {
        let mut data = vec![1; HUGE * PAGE];
        let area = Area::aligned(HUGE, true, libc::PROT_READ);
        if is_read_before {
            assert_eq!(area.get(0), 0);
        }
        device.set_flags(FAIL_ALLOC);
        let done = device.run(Do::MigrateToDev, area.all(), &mut data).unwrap();
        assert_eq!(done.cpages, 512);
        assert!(data.iter().all(|byte| *byte == 0));
        assert_eq!(area.get(4), 0);
        assert!(area.is_zero());
        // And what was not asked for any more does not fail on the way home.
        let done = device.run(Do::MigrateToDev, area.all(), &mut data).unwrap();
        assert_eq!(done.cpages, 512);
        let done = device.run(Do::MigrateToSys, area.all(), &mut data).unwrap();
        assert_eq!(done.cpages, 512);
        assert!(area.is_zero());
    }
}

/// Flags are about no memory, small steps leave them as they are, and the last that were set count.
#[test]
fn flags_are_for_the_next_large_step() {
    if !is_preloaded("flags::large::flags_are_for_the_next_large_step") {
        return;
    }
    let device = Device::open();
    let mut data = vec![0; HUGE * PAGE];
    let area = Area::aligned(HUGE, true, READ_WRITE);
    area.fill(1);
    let was_huge = device.look(area.all())[0] & seen::PMD != 0;
    let (mut one, mut all) = (vec![0; PAGE], vec![0; HUGE * PAGE]);
    let is_huge = || device.look(area.all())[0] & seen::PMD != 0;
    device.run(Do::MigrateToDev, area.all(), &mut data).unwrap();
    device.set_flags(FAIL_ALLOC);
    device.set_flags(0);
    device.run(Do::MigrateToSys, area.all(), &mut all).unwrap();
    assert_eq!(is_huge(), was_huge);
    // A page is no large step, there or back: so the next one, home, fails.
    let second = Area::aligned(HUGE, false, READ_WRITE);
    let other = second.part(0, 1);
    other.fill(2);
    device.run(Do::MigrateToDev, area.all(), &mut all).unwrap();
    device.set_flags(FAIL_ALLOC);
    device.run(Do::MigrateToDev, other, &mut one).unwrap();
    device.run(Do::MigrateToSys, other, &mut one).unwrap();
    assert!(other.is_filled(2));
    device.run(Do::MigrateToSys, area.all(), &mut all).unwrap();
    assert!(!is_huge());
    assert!(area.is_filled(1));
}
