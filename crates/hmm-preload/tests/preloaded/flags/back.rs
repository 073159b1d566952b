//! TO_SYS: just the pages that were named come home, and just those are counted.

use super::is_preloaded;
use crate::kit::{Area, Device, Do, HUGE, PAGE, READ_WRITE, seen};

#[test]
fn pages_come_home_one_by_one() {
    if !is_preloaded("flags::back::pages_come_home_one_by_one") {
        return;
    }
    let device = Device::open();
    let area = Area::aligned(HUGE, true, READ_WRITE);
    area.fill(1);
    let mut data = vec![0; HUGE * PAGE];
    device.run(Do::MigrateToDev, area.all(), &mut data).unwrap();
    let mut back = |first, pages| {
        let done = device.run(Do::MigrateToSys, area.part(first, pages), &mut data);
        done.unwrap().cpages
    };
    let local = |first, pages| {
        let seen = device.look(area.part(first, pages));
        seen.into_iter()
            .filter(|page| page & 0xf0 == seen::PRIVATE_LOCAL)
            .count()
    };
    assert_eq!(back(100, 3), 3);
    assert_eq!((local(0, 512), local(100, 3)), (509, 0));
    assert_eq!(back(99, 5), 2, "three of them are home");
    assert_eq!((local(0, 512), local(99, 5)), (507, 0));
    assert!(area.is_filled_in(100, 1, 1));
    assert_eq!(local(0, 512), 507, "what is home takes nothing along");
    // There again, and all of it back.
    device
        .run(Do::MigrateToDev, area.part(50, 60), &mut [0; 60 * PAGE])
        .unwrap();
    assert_eq!(local(0, 512), 512);
    assert_eq!(back(0, 512), 512);
    assert_eq!(back(0, 512), 0);
    assert!(area.is_filled(1));
}
