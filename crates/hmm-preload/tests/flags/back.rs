//! TO_SYS: just the pages that were named come home, and just those are counted.

use crate::device::{BLOCK, Device, Do, Memory, PAGE, preloaded};

const LOCAL: u8 = 0x22;

#[test]
fn pages_come_home_one_by_one() {
    preloaded("back::pages_come_home_one_by_one", || {
        let device = Device::open();
        let memory = Memory::huge(libc::PROT_READ | libc::PROT_WRITE);
        memory.fill(512);
        let mut data = vec![0; BLOCK];
        device.run(Do::ToDev, (memory.at, 512), &mut data).unwrap();
        let mut back = |first, pages| {
            let done = device.run(Do::ToSys, (memory.page(first), pages), &mut data);
            done.unwrap().cpages
        };
        let local = |first, pages| {
            let seen = device.snapshot(memory.page(first), pages);
            seen.into_iter()
                .filter(|page| page & 0xf0 == LOCAL & 0xf0)
                .count()
        };
        assert_eq!(back(100, 3), 3);
        assert_eq!((local(0, 512), local(100, 3)), (509, 0));
        assert_eq!(back(99, 5), 2, "three of them are home");
        assert_eq!((local(0, 512), local(99, 5)), (507, 0));
        assert_eq!(memory.word(100 * PAGE / 8), 100 * PAGE as u64 / 8);
        assert_eq!(local(0, 512), 507, "what is home takes nothing along");
        // There again, and all of it back.
        device
            .run(Do::ToDev, (memory.page(50), 60), &mut [0; 60 * PAGE])
            .unwrap();
        assert_eq!(local(0, 512), 512);
        assert_eq!(back(0, 512), 512);
        assert_eq!(back(0, 512), 0);
        assert!(memory.is_filled(512));
    });
}
