//! Huge pages: never touched, of zeroes, and given up while they are on the device.

use crate::kit::{
    Area, Device, Do, HUGE, PAGE, READ_WRITE, Span, assert_same, errno, huge_pages, is_preloaded,
    pattern, seen,
};
use std::os::unix::fs::FileExt;

/// Memory to read only, that nobody ever touched, migrates: as zeroes.
#[test]
fn migrate_anon_huge_empty() {
    if !is_preloaded("newest::huge::migrate_anon_huge_empty") {
        return;
    }
    let device = Device::open();
    let area = Area::aligned(HUGE, true, libc::PROT_READ);
    assert_eq!(device.look(area.all()), [seen::NONE; HUGE]);
    assert_same(&device.take(area.all()), &[0; HUGE * PAGE], "on the device");
    let mut local = device.look(area.all()).into_iter();
    let is_local = |seen: u8| seen & !seen::PMD == seen::PRIVATE_LOCAL | seen::READ;
    assert!(local.all(is_local));
    assert_same(&area.read(), &[0; HUGE * PAGE], "in RAM");
    device.close();
}

/// The huge page of zeroes, which all share, migrates, and stays the others'.
#[test]
fn migrate_anon_huge_zero() {
    if !is_preloaded("newest::huge::migrate_anon_huge_zero") {
        return;
    }
    let device = Device::open();
    let area = Area::aligned(HUGE, true, READ_WRITE);
    let other = Area::aligned(HUGE, true, READ_WRITE);
    assert_same(&area.read(), &[0; HUGE * PAGE], "before");
    assert_same(&other.read(), &[0; HUGE * PAGE], "before");
    let zero = seen::ZERO | seen::READ;
    let before = device.look(area.all());
    let wanted = match has_huge_zero_page() {
        true => zero | seen::PMD,
        false => zero,
    };
    assert_eq!(before, [wanted; HUGE]);
    assert_same(&device.take(area.all()), &[0; HUGE * PAGE], "on the device");
    assert_eq!(device.look(other.all()), before, "nobody else's");
    assert_same(&area.read(), &[0; HUGE * PAGE], "in RAM");
    area.fill(4);
    assert_same(&area.read(), &pattern(4, 0, HUGE), "written");
    assert_same(&other.read(), &[0; HUGE * PAGE], "nobody else's");
    device.close();
}

fn has_huge_zero_page() -> bool {
    let use_zero = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/use_zero_page");
    huge_pages() && use_zero.is_ok_and(|text| text.trim() == "1")
}

/// What is given up on the device is its data or zeroes afterwards, and nothing else is lost; and then it is
/// memory like any other.
#[test]
fn migrate_anon_huge_free() {
    if !is_preloaded("newest::huge::migrate_anon_huge_free") {
        return;
    }
    for (from, to) in [(0, HUGE), (HUGE, 2 * HUGE), (HUGE / 2, 2 * HUGE + 1)] {
        let what = format!("pages {from}..{to}");
        let device = Device::open();
        let area = Area::aligned(3 * HUGE, true, READ_WRITE);
        area.fill(5);
        device.take(area.all());
        let part = area.part(from, to - from);
        // SAFETY: memory of our own, whose contents we can do without.
        let freed = unsafe { libc::madvise(part.at.cast(), part.len(), libc::MADV_FREE) };
        assert_eq!(freed, 0, "{what}: {}", errno());
        let found = area.read();
        let wanted = pattern(5, 0, area.pages);
        let pages = found.chunks(PAGE).zip(wanted.chunks(PAGE));
        for (n, (found, wanted)) in pages.enumerate() {
            let may_be_zero = (from..to).contains(&n);
            let is_zero = may_be_zero && found.iter().all(|byte| *byte == 0);
            assert!(is_zero || found == wanted, "{what}: page {n}");
        }
        for seed in [6, 7] {
            area.fill(seed);
            let wanted = pattern(seed, 0, area.pages);
            assert_same(&device.take(area.all()), &wanted, &what);
            assert_same(&area.read(), &wanted, &what);
        }
        device.close();
    }
}

/// A huge page is one on the device too, and shows as swapped out in the page map of the program.
#[test]
fn migrate_anon_huge_fault() {
    if !is_preloaded("newest::huge::migrate_anon_huge_fault") {
        return;
    }
    if !huge_pages() {
        eprintln!("skipped: there are no huge pages here");
        return;
    }
    for _ in 0..3 {
        let device = Device::open();
        let area = Area::aligned(2 * HUGE, true, READ_WRITE);
        area.fill(10);
        collapse(area.all());
        assert_eq!(page_map(area.all()), [PRESENT; 2 * HUGE]);
        let found = device.take(area.all());
        assert_same(&found, &pattern(10, 0, area.pages), "on the device");
        let wanted = seen::PRIVATE_LOCAL | seen::WRITE | seen::PMD;
        assert_eq!(device.look(area.all()), [wanted; 2 * HUGE]);
        // Also who looks at a part of it is told that it is a part.
        assert_eq!(device.look(area.part(1, 2)), [wanted; 2]);
        assert_eq!(page_map(area.all()), [SWAPPED; 2 * HUGE]);
        // One of them comes home.
        let (first, second) = (area.part(0, HUGE), area.part(HUGE, HUGE));
        assert_same(&first.read(), &pattern(10, 0, HUGE), "in RAM");
        assert_eq!(page_map(first), [PRESENT; HUGE]);
        assert_eq!(page_map(second), [SWAPPED; HUGE]);
        assert_same(&second.read(), &pattern(10, HUGE, HUGE), "in RAM");
        area.fill(11);
        assert_same(
            &device.take(area.all()),
            &pattern(11, 0, area.pages),
            "again",
        );
        assert_eq!(page_map(area.all()), [SWAPPED; 2 * HUGE]);
        let done = device.run(Do::MigrateToSys, area.all(), &mut []).unwrap();
        assert_eq!(done.cpages, 2 * HUGE as u64);
        assert_eq!(page_map(area.all()), [PRESENT; 2 * HUGE]);
        assert_same(&area.read(), &pattern(11, 0, area.pages), "in RAM");
        device.close();
    }
}

/// Huge pages, now. The system may be short of them for a moment.
fn collapse(pages: Span) {
    let collapsed = (0..100).any(|_| {
        // SAFETY: the bytes of our own memory stay as they are.
        unsafe { libc::madvise(pages.at.cast(), pages.len(), libc::MADV_COLLAPSE) == 0 }
    });
    assert!(collapsed, "{}", errno());
}

const PRESENT: (bool, bool) = (true, false);
const SWAPPED: (bool, bool) = (false, true);

/// Whether each page is present, and whether it is swapped out, as `/proc/self/pagemap` has it.
fn page_map(pages: Span) -> Vec<(bool, bool)> {
    let file = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut bytes = vec![0; pages.pages * 8];
    let offset = pages.at.addr() / PAGE * 8;
    file.read_exact_at(&mut bytes, offset as u64).unwrap();
    let entries = bytes.as_chunks::<8>().0.iter();
    let entries = entries.map(|entry| u64::from_ne_bytes(*entry));
    entries
        .map(|entry| (entry >> 63 & 1 == 1, entry >> 62 & 1 == 1))
        .collect()
}
