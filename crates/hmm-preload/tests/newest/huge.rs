//! Huge pages: never touched, of zeroes, and given up while they are on the device.

use crate::kit::{
    Area, Device, HUGE, PAGE, assert_same, fill, huge_pages, is_preloaded, pattern, read, seen,
};

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
