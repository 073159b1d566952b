//! What the counters tell of device faults: by size, and by stage.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{Stay, built, within};
use gpusvm::{ByteSize, Grid, Resident, SizeStats, SoftGpu, Svm, SvmPtr};
use std::sync::Arc;
use std::time::Duration;

/// A device stores one word.
fn store(svm: &Svm, device: usize, at: SvmPtr<u64>) {
    // SAFETY: nobody else touches the memory meanwhile, and it outlives the launch.
    let launch = unsafe {
        svm.launch_resident(device, Grid::new(1), Resident::new(), move |lane| {
            lane.store(at, 2u64)
        })
    };
    launch.unwrap().wait().unwrap();
}

fn numbers(stats: &[SizeStats]) -> Vec<(u64, u64, u64)> {
    let kib = |stats: &SizeStats| stats.size.get() >> 10;
    let all = stats.iter();
    all.map(|stats| (kib(stats), stats.passes, stats.migrations))
        .collect()
}

#[test]
fn what_faults_cost_is_told_by_size_and_stage() {
    within(Duration::from_secs(60), || {
        let gpu = || SoftGpu::builder().vram(ByteSize::mib(16)).units(1).build();
        let builder = Svm::builder().device(gpu().unwrap()).device(gpu().unwrap());
        // So long that nothing is taken back while this looks.
        let svm = built(builder.policy(Arc::new(Stay(Duration::from_millis(1)))));
        assert_eq!(svm.stats().device_faults_by_size, []);
        let large = svm.alloc_slice::<u64>((4 << 20) / 8).unwrap();
        let middle = svm.alloc_slice::<u64>((128 << 10) / 8).unwrap();
        // The 64 KiB in it that are aligned.
        let aligned = middle.as_ptr().align_offset(64 << 10);
        let small = svm.alloc_slice::<u64>(8).unwrap();
        // Twice the same: one fault.
        for _ in 0..2 {
            store(&svm, 0, large.device_ptr());
            store(&svm, 0, middle.device_ptr().add(aligned));
        }
        store(&svm, 1, large.device_ptr().add((2 << 20) / 8));
        store(&svm, 1, small.device_ptr());
        let by_size = svm.stats().device_faults_by_size;
        assert_eq!(
            numbers(&by_size),
            [(2048, 2, 2), (64, 1, 1), (4, 1, 1)],
            "{by_size:?}"
        );
        for stats in &by_size {
            assert_eq!(stats.coalesced, 0);
            let stages = stats.migrate_time + stats.get_pages_time + stats.bind_time;
            assert!(stats.bind_time > Duration::ZERO && stages <= stats.pass_time);
        }
        // Each page left RAM once, which no device had mapped: nobody had to flush.
        assert_eq!(svm.stats().flushes, 0);
        assert_eq!(middle[aligned], 2, "it comes home");
        assert_eq!(svm.stats().flushes, 1);
    });
}
