//! What tests there are: families x sections, and those that stand alone. Pure generation.
//!
//! ```text
//!   once-malloc              a family, and a section
//!   partial-munmap-cpu-fault a standalone test
//! ```
//!
//! # Differences from the suite
//!
//! There every test runs on each engine of the device in turn. Here one unit is like the other: it runs
//! once, and `ENGINES` of them at once where the family has threads or processes.

use crate::sections::{Flags, SECTIONS, Section};

/// Who executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// The test's own thread.
    Alone,
    /// A thread for each engine, each with an address space of its own on the device side.
    Threads,
    /// A thread for each engine, all with one.
    SharedVm,
    /// A process for each engine.
    Processes,
}

/// A row of the matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Family {
    pub(crate) name: &'static str,
    pub(crate) who: Who,
    /// How many execs are on their way at once, where sections allow it.
    pub(crate) queues: usize,
    pub(crate) execs: usize,
    /// How large the buffer is; what the records need if it is not said.
    pub(crate) size: Option<usize>,
    /// How many records lie between two that are used.
    pub(crate) stride: usize,
}

const LARGE: usize = 2 << 20;
/// Far enough for a new page each time.
pub(crate) const STRIDE: usize = 256;

const fn family(name: &'static str, who: Who, queues: usize, execs: usize) -> Family {
    Family {
        name,
        who,
        queues,
        execs,
        size: None,
        stride: 1,
    }
}

const fn sized(family: Family, size: usize) -> Family {
    Family {
        size: Some(size),
        ..family
    }
}

const fn strided(family: Family) -> Family {
    Family {
        stride: STRIDE,
        ..family
    }
}

/// All of them.
pub(crate) const FAMILIES: &[Family] = &[
    family("once", Who::Alone, 1, 1),
    sized(family("once-large", Who::Alone, 1, 1), LARGE),
    family("twice", Who::Alone, 1, 2),
    sized(family("twice-large", Who::Alone, 1, 2), LARGE),
    family("many", Who::Alone, 1, 128),
    strided(family("many-stride", Who::Alone, 1, 128)),
    family("many-execqueues", Who::Alone, 16, 128),
    sized(family("many-large", Who::Alone, 1, 128), LARGE),
    sized(family("many-64k", Who::Alone, 1, 128), 64 << 10),
    sized(family("many-large-execqueues", Who::Alone, 16, 128), LARGE),
    family("threads-many", Who::Threads, 1, 128),
    strided(family("threads-many-stride", Who::Threads, 1, 128)),
    family("threads-many-execqueues", Who::Threads, 16, 128),
    sized(family("threads-many-large", Who::Threads, 1, 128), LARGE),
    sized(
        family("threads-many-large-execqueues", Who::Threads, 16, 128),
        LARGE,
    ),
    family("threads-shared-vm-many", Who::SharedVm, 1, 128),
    strided(family(
        "threads-shared-vm-many-stride",
        Who::SharedVm,
        1,
        128,
    )),
    family("threads-shared-vm-many-execqueues", Who::SharedVm, 16, 128),
    sized(
        family("threads-shared-vm-many-large", Who::SharedVm, 1, 128),
        LARGE,
    ),
    sized(
        family(
            "threads-shared-vm-many-large-execqueues",
            Who::SharedVm,
            16,
            128,
        ),
        LARGE,
    ),
    family("process-many", Who::Processes, 1, 128),
    strided(family("process-many-stride", Who::Processes, 1, 128)),
    family("process-many-execqueues", Who::Processes, 16, 128),
    sized(family("process-many-large", Who::Processes, 1, 128), LARGE),
    sized(
        family("process-many-large-execqueues", Who::Processes, 16, 128),
        LARGE,
    ),
];

/// The families that are quick enough to run every time.
const QUICK: &[&str] = &[
    "once",
    "once-large",
    "twice",
    "twice-large",
    "many-64k",
    "threads-shared-vm-many",
];

/// What becomes of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// It runs.
    Covered,
    /// The suite itself leaves it out.
    SkipsItself(&'static str),
    /// It cannot exist here.
    Impossible(&'static str),
}

/// What becomes of a section in a family.
pub(crate) fn status(family: &Family, section: &Section) -> Status {
    let flags = section.flags;
    skips_itself(family, flags).unwrap_or(Status::Covered)
}

fn skips_itself(family: &Family, flags: Flags) -> Option<Status> {
    let threads = matches!(family.who, Who::Threads | Who::SharedVm);
    let reason = if flags.has(Flags::MULTI_FAULT) && family.size.is_none() {
        "four places need a buffer of a fixed size"
    } else if flags.has(Flags::EVERY_OTHER) && family.execs % 2 == 1 {
        "two results are checked at once: an even number of execs"
    } else if threads && flags.any(Flags::FILE) {
        "no files in threads"
    } else if (threads || family.who == Who::Processes) && flags.any(Flags::FORK) {
        "no fork in threads and processes"
    } else {
        return None;
    };
    Some(Status::SkipsItself(reason))
}

/// Whether it runs every time, or only when everything is asked for.
pub(crate) fn is_quick(family: &Family, section: &Section) -> bool {
    // Processes, and address spaces of their own, for a few of them, to see that it works.
    let few = match family.name {
        "process-many" => &["malloc", "mmap"][..],
        "threads-many" => &["malloc", "malloc-prefetch", "malloc-busy", "new-bo-map"],
        _ => &[],
    };
    QUICK.contains(&family.name) || few.contains(&section.name)
}

/// The family and the section of a name.
pub(crate) fn parse(name: &str) -> Option<(&'static Family, &'static Section)> {
    FAMILIES.iter().find_map(|family| {
        let rest = name.strip_prefix(family.name)?.strip_prefix('-')?;
        let section = SECTIONS.iter().find(|section| section.name == rest)?;
        Some((family, section))
    })
}

/// How many of a family are covered, and skip themselves.
pub(crate) fn count(family: &Family) -> [usize; 2] {
    let mut counts = [0; 2];
    for section in SECTIONS {
        match status(family, section) {
            Status::Covered => counts[0] += 1,
            Status::SkipsItself(_) => counts[1] += 1,
            Status::Impossible(_) => unreachable!("every section can be run"),
        }
    }
    counts
}

/// Checks of what is above.
pub(crate) mod checks {
    use super::{FAMILIES, SECTIONS, Status, count, parse, status};
    use std::collections::BTreeSet;

    pub(crate) fn twenty_five_families_of_seventy_five_sections() {
        assert_eq!((FAMILIES.len(), SECTIONS.len()), (25, 75));
        let names = FAMILIES.iter().flat_map(|family| {
            let name = |section: &super::Section| format!("{}-{}", family.name, section.name);
            SECTIONS.iter().map(name)
        });
        let names: Vec<_> = names.collect();
        let different: BTreeSet<_> = names.iter().collect();
        assert_eq!(different.len(), 25 * 75);
        for name in &names {
            let (family, section) = parse(name).expect("a name");
            assert_eq!(*name, format!("{}-{}", family.name, section.name));
        }
    }

    pub(crate) fn sections_skip_themselves_where_the_suite_skips_them() {
        let skipped = |wanted: &str| {
            let family = FAMILIES.iter().find(|family| family.name == wanted);
            count(family.expect("a family"))[1]
        };
        // multi-fault and six of eocheck; eocheck only; multi-fault.
        assert_eq!((skipped("once"), skipped("once-large")), (7, 6));
        assert_eq!((skipped("twice"), skipped("many-64k")), (1, 0));
        // Four of files, two of fork, and multi-fault.
        assert_eq!(skipped("threads-many"), 7);
        assert_eq!(skipped("threads-shared-vm-many-large"), 6);
        assert_eq!(
            (skipped("process-many"), skipped("process-many-large")),
            (3, 2)
        );
        let all: usize = FAMILIES.iter().map(|family| count(family)[1]).sum();
        assert_eq!(all, 96);
    }

    pub(crate) fn twenty_four_sections_have_a_form_without_memset() {
        let forms = SECTIONS
            .iter()
            .filter(|section| section.name.ends_with("-nomemset"));
        assert_eq!(forms.count(), 24);
        let once = &FAMILIES[0];
        let plain = SECTIONS.iter().find(|section| section.name == "malloc");
        assert_eq!(status(once, plain.expect("malloc")), Status::Covered);
    }
}
