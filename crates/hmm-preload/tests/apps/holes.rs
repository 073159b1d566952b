//! Holes that a program leaves in its address space are its own: it maps there again, or unmaps them with all that is
//! around them.

use crate::kit::{Area, PAGE, READ, close, engine_runs, errno, is_preloaded, open};

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
    if !is_preloaded("holes::nothing_of_the_engine_is_in_a_hole_of_the_program") {
        return;
    }
    // What is the program's own is there before its holes are.
    let areas: Vec<_> = (0..6).map(|_| Area::new(3000)).collect();
    let mut data = vec![0; 3000 * PAGE];
    let reservation = Reservation::new();
    // In the reservation, between holes.
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let inside = area(
        map(reservation.at, BETWEEN, access, libc::MAP_FIXED),
        BETWEEN,
    );
    let fd = open(0);
    // SAFETY: a C string.
    let other = unsafe { libc::open(c"/dev/hmm_dmirror1".as_ptr(), libc::O_RDWR) };
    for round in 0..3 {
        inside.fill(round);
        inside.take_with(fd, &mut data);
        for (n, area) in areas.iter().enumerate() {
            area.fill(round + n);
            area.take_with([fd, other][n % 2], &mut data);
        }
        let mut all = areas.iter().zip(round..);
        assert!(all.all(|(area, seed)| area.is_filled(seed)));
    }
    areas.iter().for_each(|area| area.take_with(fd, &mut data));
    inside.take_with(fd, &mut data);
    assert_eq!(reservation.strangers(), [""; 0], "of the engine");
    let (at, len) = (pointer(reservation.at), reservation.len);
    // SAFETY: the program's own address space; what is mapped there is not used any more.
    assert_eq!(unsafe { libc::munmap(at, len) }, 0);
    assert_eq!(inside.run(fd, READ, &mut data).unwrap_err(), libc::EFAULT);
    let is_right = || {
        areas
            .iter()
            .zip(2..)
            .all(|(area, seed)| area.is_filled(seed))
    };
    assert!(is_right());
    areas
        .iter()
        .for_each(|area| area.take_with(other, &mut data));
    close(fd).unwrap();
    close(other).unwrap();
    assert!(is_right() && !engine_runs());
}

/// A program that maps in its hole again, at that very place, finds it empty, and its memory works.
#[test]
fn a_program_maps_in_its_holes_again() {
    if !is_preloaded("holes::a_program_maps_in_its_holes_again") {
        return;
    }
    let mut data = vec![0; 2000 * PAGE];
    let reservation = Reservation::new();
    let fd = open(0);
    for (n, (from, to)) in reservation.holes.iter().enumerate() {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // Refused if anything is there.
        let at = map(*from, to - from, access, libc::MAP_FIXED_NOREPLACE);
        assert_eq!(at, *from);
        let area = area(at, (to - from).min(2000 * PAGE));
        area.fill(n);
        area.take_with(fd, &mut data);
        assert!(area.is_filled(n));
        area.take_with(fd, &mut data);
    }
    close(fd).unwrap();
    assert!(!engine_runs());
}

fn area(at: usize, len: usize) -> Area {
    Area {
        at: pointer(at).cast(),
        pages: len / PAGE,
    }
}
