//! Holes that a program leaves in its address space are its own: it maps there again, or unmaps them with all that is
//! around them.

use crate::kit::{Area, Device, Do, PAGE, READ_WRITE, Span, engine_runs, errno, is_preloaded};

const MIB: usize = 1 << 20;
/// How large the holes are: for a stack, a heap, device memory, and tables.
const HOLES: [usize; 6] = [
    PAGE * 16,
    3 * MIB,
    40 * MIB,
    140 * MIB,
    600 * MIB,
    9000 * MIB,
];
/// What stays mapped between them.
const BETWEEN: usize = 2 * MIB;

/// Address space that the program has reserved, with holes in it.
struct Reservation {
    at: usize,
    len: usize,
    holes: Vec<(usize, usize)>,
}

impl Reservation {
    /// Holes by `mremap`: what was there is elsewhere.
    fn new() -> Self {
        let len = HOLES.iter().map(|hole| hole + BETWEEN).sum::<usize>() + BETWEEN;
        let at = map(0, len, libc::PROT_NONE, 0);
        let elsewhere = map(0, *HOLES.iter().max().unwrap(), libc::PROT_NONE, 0);
        let mut holes = Vec::new();
        let mut next = at + BETWEEN;
        for hole in HOLES {
            holes.push((next, next + hole));
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let (from, to) = (pointer(next), pointer(elsewhere));
            // SAFETY: address space of our own, to address space of our own.
            let moved = unsafe { libc::mremap(from, hole, hole, flags, to) };
            assert_eq!(moved, to, "{}", errno());
            next += hole + BETWEEN;
        }
        Self { at, len, holes }
    }

    /// What is mapped in the holes.
    fn strangers(&self) -> Vec<String> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let is_in_a_hole = |line: &&str| {
            let (start, rest) = line.split_once('-').unwrap();
            let (end, _) = rest.split_once(' ').unwrap();
            let number = |text| usize::from_str_radix(text, 16).unwrap();
            let (start, end) = (number(start), number(end));
            self.holes
                .iter()
                .any(|(from, to)| start < *to && *from < end)
        };
        maps.lines()
            .filter(is_in_a_hole)
            .map(str::to_owned)
            .collect()
    }
}

fn pointer(at: usize) -> *mut libc::c_void {
    std::ptr::with_exposed_provenance_mut(at)
}

/// Maps memory that stays, anywhere or there.
fn map(at: usize, len: usize, access: i32, fixed: i32) -> usize {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | fixed;
    // SAFETY: anywhere, or in the place of address space of our own.
    let mapped = unsafe { libc::mmap(pointer(at), len, access, flags, -1, 0) };
    assert_ne!(mapped, libc::MAP_FAILED, "{}", errno());
    mapped.expose_provenance()
}

/// Story: the second of the kernel's tests of `mremap` unmapped its old reservation, and with it the engine, whose
/// memory had been mapped into the hole.
#[test]
fn nothing_of_the_engine_is_in_a_hole_of_the_program() {
    if !is_preloaded("apps::holes::nothing_of_the_engine_is_in_a_hole_of_the_program") {
        return;
    }
    // What is the program's own is there before its holes are.
    let areas: Vec<_> = (0..6).map(|_| Area::new(3000)).collect();
    let mut data = vec![0; 3000 * PAGE];
    let reservation = Reservation::new();
    // In the reservation, between holes.
    let at = map(reservation.at, BETWEEN, READ_WRITE, libc::MAP_FIXED);
    let inside = span(at, BETWEEN);
    let (device, other) = (Device::open(), Device::number(1));
    for round in 0..3 {
        inside.fill(round);
        device.take_with(inside, &mut data);
        for (n, area) in (0..).zip(&areas) {
            area.fill(round + n);
            let taker = if n % 2 == 0 { &device } else { &other };
            taker.take_with(area.all(), &mut data);
        }
        let mut all = areas.iter().zip(round..);
        assert!(all.all(|(area, seed)| area.is_filled(seed)));
    }
    areas
        .iter()
        .for_each(|area| device.take_with(area.all(), &mut data));
    device.take_with(inside, &mut data);
    assert_eq!(reservation.strangers(), [""; 0], "of the engine");
    let (at, len) = (pointer(reservation.at), reservation.len);
    // SAFETY: the program's own address space; what is mapped there is not used any more.
    assert_eq!(unsafe { libc::munmap(at, len) }, 0);
    let gone = device.run(Do::Read, inside, &mut data);
    assert_eq!(gone.unwrap_err(), libc::EFAULT);
    let is_right = || {
        areas
            .iter()
            .zip(2..)
            .all(|(area, seed)| area.is_filled(seed))
    };
    assert!(is_right());
    areas
        .iter()
        .for_each(|area| other.take_with(area.all(), &mut data));
    device.close();
    other.close();
    assert!(is_right() && !engine_runs());
}

/// A program that maps in its hole again, at that very place, finds it empty, and its memory works.
#[test]
fn a_program_maps_in_its_holes_again() {
    if !is_preloaded("apps::holes::a_program_maps_in_its_holes_again") {
        return;
    }
    let mut data = vec![0; 2000 * PAGE];
    let reservation = Reservation::new();
    let device = Device::open();
    for (n, (from, to)) in (0..).zip(&reservation.holes) {
        // Refused if anything is there.
        let at = map(*from, to - from, READ_WRITE, libc::MAP_FIXED_NOREPLACE);
        assert_eq!(at, *from);
        let pages = span(at, (to - from).min(2000 * PAGE));
        pages.fill(n);
        device.take_with(pages, &mut data);
        assert!(pages.is_filled(n));
        device.take_with(pages, &mut data);
    }
    device.close();
    assert!(!engine_runs());
}

fn span(at: usize, len: usize) -> Span {
    Span {
        at: pointer(at).cast(),
        pages: len / PAGE,
    }
}
