//! Faults that never ended elsewhere: see the lessons in docs/kernel-map.md.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, also outside of its test function, and sleep"
)]

mod common;

use common::pinned::Pinned;
use common::{Map, add_one};
use common::{Stay, built, can_adopt, within};
use gpusvm::{ByteSize, Error, Fabric, Grid, Resident, SoftGpu, Svm, SvmPtr};
use std::sync::Arc;
use std::time::Duration;

fn four_devices(fabric: bool, coherent: bool) -> Svm {
    let mut builder = Svm::builder();
    for _ in 0..4 {
        let gpu = SoftGpu::builder()
            .vram(ByteSize::mib(4))
            .units(1)
            .coherent(coherent);
        let gpu = if fabric { gpu.fabric(Fabric(7)) } else { gpu };
        builder = builder.device(gpu.build().unwrap());
    }
    built(builder.policy(Arc::new(Stay(Duration::from_micros(50)))))
}

/// Several devices each wanted one block, found it busy, evicted each other, and began again. Here:
/// every device gets its turn, and every pass over a fault is counted and bounded.
#[test]
fn lesson_20_racing_migrations_end() {
    const ROUNDS: usize = 1_000;
    for (fabric, coherent) in [(false, true), (true, true), (false, false)] {
        within(Duration::from_secs(120), || {
            let svm = four_devices(fabric, coherent);
            let numbers = svm.alloc_slice::<u64>(512).unwrap();
            let p: SvmPtr<u64> = numbers.device_ptr();
            let launches: Vec<_> = (0..4)
                .map(|device| {
                    // SAFETY: each device has a word of its own, and nobody else uses it.
                    let launch = unsafe {
                        svm.launch_resident(device, Grid::new(1), Resident::new(), move |lane| {
                            for round in 0..ROUNDS as u64 {
                                lane.store(p.add(device), round + 1)?;
                                // Long enough for the others to want the page.
                                std::thread::sleep(Duration::from_micros(50));
                            }
                            Ok(())
                        })
                    };
                    launch.unwrap()
                })
                .collect();
            for launch in launches {
                launch.wait().unwrap();
            }
            assert_eq!(&numbers[..4], &[ROUNDS as u64; 4]);
            drop(numbers);
            let stats = svm.shutdown().unwrap();
            println!(
                "fabric {fabric}, coherent {coherent}: {} faults, {} stale passes, {} last resorts",
                stats.device_faults, stats.stale_passes, stats.last_resorts
            );
            assert_eq!((stats.failed_faults, stats.vram_used_bytes), (0, 0));
        });
    }
}

/// A fault that needs device memory met a page that could not move, and began again for ever. Here: it
/// ends in an error that names the address, after a bounded number of passes; and once the page can
/// move, it goes well.
#[test]
fn lesson_21_devmem_only_and_mixed_pages_end() {
    within(Duration::from_secs(120), || {
        let gpu = SoftGpu::builder().vram(ByteSize::mib(8)).coherent(false);
        let svm = built(Svm::builder().device(gpu.build().unwrap()));
        if svm.rung() != gpusvm::Rung::Move || !can_adopt(&svm) {
            println!("skipped: only MOVE sees that a page is pinned");
            return;
        }
        let map = Map::new(2 << 20, false);
        map.bytes().fill(1);
        let _adopted = svm.adopt(map.at, ByteSize::mib(2)).unwrap();
        let numbers = SvmPtr::from(map.at.cast::<u64>());
        let Some(pinned) = Pinned::new(map.at.wrapping_add(64 << 10), 4096) else {
            return;
        };
        // SAFETY: nobody else uses the memory meanwhile.
        let launch = unsafe {
            svm.launch(Grid::new(1), move |lane| {
                lane.atomic_add(numbers.add(8192), 1u64)?;
                Ok(())
            })
        };
        let failed = launch.unwrap().wait();
        println!("while it is pinned: {}", failed.as_ref().unwrap_err());
        assert!(matches!(failed, Err(Error::Launch(_))), "{failed:?}");
        let bytes = svm.stats().to_device.bytes + svm.stats().to_ram.bytes;
        assert!(bytes <= 4 << 20, "the others bounced: {bytes} bytes");
        drop(pinned);
        add_one(&svm, 0, (numbers.add(8192), 16));
        let word = u64::from_ne_bytes([1; 8]);
        assert_eq!(map.bytes()[65536..][..8], (word + 1).to_ne_bytes());
        assert_eq!(svm.stats().failed_faults, 1);
    });
}

/// What a DMA of somebody else writes to must be where it was: the device reaches it there.
#[test]
fn a_pinned_page_stays_in_ram_and_is_reached_there() {
    within(Duration::from_secs(60), || {
        let gpu = SoftGpu::builder().vram(ByteSize::mib(8)).build().unwrap();
        let svm = built(Svm::builder().device(gpu));
        if svm.rung() != gpusvm::Rung::Move {
            println!("skipped: only MOVE sees that a page is pinned");
            return;
        }
        let map = Map::new(2 << 20, false);
        map.bytes().fill(0);
        let _adopted = svm.adopt(map.at, ByteSize::mib(2)).unwrap();
        let Some(pinned) = Pinned::new(map.at.wrapping_add(64 << 10), 4096) else {
            return;
        };
        let numbers = SvmPtr::from(map.at.cast::<u64>());
        add_one(&svm, 0, (numbers, (2 << 20) / 8));
        let stats = svm.stats();
        assert_eq!(stats.pages_on_devices, 511, "all but the pinned one");
        assert_eq!(stats.failed_faults, 0);
        drop(pinned);
        let ones = map
            .bytes()
            .chunks(8)
            .filter(|word| *word == 1u64.to_ne_bytes());
        assert_eq!(ones.count(), (2 << 20) / 8);
    });
}
