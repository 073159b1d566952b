//! Huge pages: never touched, of zeroes, and given up while they are on the device.

use crate::kit::{
    Area, Device, HUGE, PAGE, Run, assert_same, fill, huge_pages, is_preloaded, pattern, read, seen,
};
use std::os::unix::fs::FileExt;

/// Memory to read only, that nobody ever touched, migrates: as zeroes.
#[test]
fn migrate_anon_huge_empty() {
    if !is_preloaded("huge::migrate_anon_huge_empty") {
        return;
    }
    let device = Device::open();
    let area = Area::allowing(HUGE, true, libc::PROT_READ);
    assert_eq!(device.look(area.all()), [seen::NONE; HUGE / PAGE]);
    assert_same(&device.take(area.all()), &[0; HUGE], "on the device");
    let local = device.look(area.all()).into_iter();
    let is_local = |seen: u8| seen & !seen::PMD == seen::LOCAL | seen::READ;
    assert!(local.into_iter().all(is_local));
    assert_same(&read(area.all()), &[0; HUGE], "in RAM");
    device.close();
}

/// The huge page of zeroes, which all share, migrates, and stays the others'.
#[test]
fn migrate_anon_huge_zero() {
    if !is_preloaded("huge::migrate_anon_huge_zero") {
        return;
    }
    let device = Device::open();
    let area = Area::new(HUGE, true);
    let other = Area::new(HUGE, true);
    assert_same(&read(area.all()), &[0; HUGE], "before");
    assert_same(&read(other.all()), &[0; HUGE], "before");
    let zero = seen::ZERO | seen::READ;
    let before = device.look(area.all());
    let wanted = match has_huge_zero_page() {
        true => zero | seen::PMD,
        false => zero,
    };
    assert_eq!(before, [wanted; HUGE / PAGE]);
    assert_same(&device.take(area.all()), &[0; HUGE], "on the device");
    assert_eq!(device.look(other.all()), before, "nobody else's");
    assert_same(&read(area.all()), &[0; HUGE], "in RAM");
    fill(4, area.all());
    assert_same(&read(area.all()), &pattern(4, 0, HUGE), "written");
    assert_same(&read(other.all()), &[0; HUGE], "nobody else's");
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
    if !is_preloaded("huge::migrate_anon_huge_free") {
        return;
    }
    for (from, to) in [(0, HUGE), (HUGE, 2 * HUGE), (HUGE / 2, 2 * HUGE + PAGE)] {
        let what = format!("{from:#x}..{to:#x}");
        let device = Device::open();
        let area = Area::new(3 * HUGE, true);
        fill(5, area.all());
        device.take(area.all());
        let at = area.at.wrapping_add(from);
        // SAFETY: memory of our own, whose contents we can do without.
        let freed = unsafe { libc::madvise(at.cast(), to - from, libc::MADV_FREE) };
        assert_eq!(freed, 0, "{what}: {}", std::io::Error::last_os_error());
        let found = read(area.all());
        let wanted = pattern(5, 0, area.len);
        let pages = found.chunks(PAGE).zip(wanted.chunks(PAGE));
        for (n, (found, wanted)) in pages.enumerate() {
            let may_be_zero = (from..to).contains(&(n * PAGE));
            let is_zero = may_be_zero && found.iter().all(|byte| *byte == 0);
            assert!(is_zero || found == wanted, "{what}: page {n}");
        }
        for seed in [6, 7] {
            fill(seed, area.all());
            let wanted = pattern(seed, 0, area.len);
            assert_same(&device.take(area.all()), &wanted, &what);
            assert_same(&read(area.all()), &wanted, &what);
        }
        device.close();
    }
}

/// A huge page is one on the device too, and shows as swapped out in the page map of the program.
#[test]
fn migrate_anon_huge_fault() {
    if !is_preloaded("huge::migrate_anon_huge_fault") {
        return;
    }
    if !huge_pages() {
        eprintln!("skipped: there are no huge pages here");
        return;
    }
    for _ in 0..3 {
        let device = Device::open();
        let area = Area::new(2 * HUGE, true);
        fill(10, area.all());
        collapse(area.all());
        assert_eq!(page_map(area.all()), [PRESENT; 2 * HUGE / PAGE]);
        let found = device.take(area.all());
        assert_same(&found, &pattern(10, 0, area.len), "on the device");
        let wanted = seen::LOCAL | seen::WRITE | seen::PMD;
        assert_eq!(device.look(area.all()), [wanted; 2 * HUGE / PAGE]);
        // Also who looks at a part of it is told that it is a part.
        assert_eq!(
            device.look((area.at.wrapping_add(PAGE), 2 * PAGE)),
            [wanted; 2]
        );
        assert_eq!(page_map(area.all()), [SWAPPED; 2 * HUGE / PAGE]);
        // One of them comes home.
        let (first, second) = ((area.at, HUGE), (area.at.wrapping_add(HUGE), HUGE));
        assert_same(&read(first), &pattern(10, 0, HUGE), "in RAM");
        assert_eq!(page_map(first), [PRESENT; HUGE / PAGE]);
        assert_eq!(page_map(second), [SWAPPED; HUGE / PAGE]);
        assert_same(&read(second), &pattern(10, HUGE, HUGE), "in RAM");
        fill(11, area.all());
        assert_same(&device.take(area.all()), &pattern(11, 0, area.len), "again");
        assert_eq!(page_map(area.all()), [SWAPPED; 2 * HUGE / PAGE]);
        let done = device.run(Run::ToSys, area.all(), &mut []).unwrap();
        assert_eq!(done.cpages, (2 * HUGE / PAGE) as u64);
        assert_eq!(page_map(area.all()), [PRESENT; 2 * HUGE / PAGE]);
        assert_same(&read(area.all()), &pattern(11, 0, area.len), "in RAM");
        device.close();
    }
}

/// Huge pages, now. The system may be short of them for a moment.
fn collapse((at, len): (*mut u8, usize)) {
    let collapsed = (0..100).any(|_| {
        // SAFETY: the bytes of our own memory stay as they are.
        unsafe { libc::madvise(at.cast(), len, libc::MADV_COLLAPSE) == 0 }
    });
    assert!(collapsed, "{}", std::io::Error::last_os_error());
}

const PRESENT: (bool, bool) = (true, false);
const SWAPPED: (bool, bool) = (false, true);

/// Whether each page is present, and whether it is swapped out, as `/proc/self/pagemap` has it.
fn page_map((at, len): (*mut u8, usize)) -> Vec<(bool, bool)> {
    let file = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut bytes = vec![0; len / PAGE * 8];
    file.read_exact_at(&mut bytes, (at.addr() / PAGE * 8) as u64)
        .unwrap();
    let entries = bytes.as_chunks::<8>().0.iter();
    let entries = entries.map(|entry| u64::from_ne_bytes(*entry));
    entries
        .map(|entry| (entry >> 63 & 1 == 1, entry >> 62 & 1 == 1))
        .collect()
}
