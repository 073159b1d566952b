//! The tests that stand alone: 69 of the suite's main program, and those of its neighbours.

mod partial; // half of a buffer goes
mod allocs; // much memory: benchmarks, eviction
mod compute; // a real kernel
mod multigpu; // two devices
mod simple; // a bad address, neighbouring words

use crate::Skip;
use crate::engine::{CAN_ADVISE, CAN_BIND, CAN_PREFETCH};
use crate::names::Status;

/// One of them.
pub(crate) struct Test {
    pub(crate) name: String,
    pub(crate) status: Status,
    /// Whether it runs every time.
    pub(crate) quick: bool,
    pub(crate) run: Run,
}

/// How it runs.
pub(crate) type Run = Box<dyn FnOnce() -> Result<(), Skip> + Send>;

impl Test {
    /// One that runs every time.
    fn quick(
        name: impl Into<String>,
        run: impl FnOnce() -> Result<(), Skip> + Send + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            status: Status::Covered,
            quick: true,
            run: Box::new(run),
        }
    }

    /// One that runs when everything is asked for.
    fn long(
        name: impl Into<String>,
        run: impl FnOnce() -> Result<(), Skip> + Send + 'static,
    ) -> Self {
        Self {
            quick: false,
            ..Self::quick(name, run)
        }
    }

    fn without(name: impl Into<String>, status: Status) -> Self {
        let name = name.into();
        let text = format!("{name} has no test: {status:?}");
        Self {
            status,
            ..Self::quick(name, move || unreachable!("{text}"))
        }
    }
}

const ADVISE: Status = Status::Pending("the engine takes no advice yet");
const PREFETCH: Status = Status::Pending("the engine cannot prefetch yet");
const BIND: Status = Status::Pending("the engine has no device objects yet");
const NO_CACHES: Status = Status::Impossible("there is no cache attribute: memory is coherent");

/// How many the suite has: of its main program, and with its neighbours.
pub(crate) const OF_MAIN: usize = 69;
pub(crate) const OF_ALL: usize = OF_MAIN + 21 + 1 + 1;

/// All of them, in the order of the suite.
pub(crate) fn all() -> Vec<Test> {
    let mut all = of_main();
    all.extend(multigpu::tests());
    all.push(Test::without("prefetch-fault-svm", PREFETCH));
    all.push(Test::without("svm-userptr-copy-madvise", BIND));
    all
}

fn of_main() -> Vec<Test> {
    let mut all = allocs::tests();
    all.push(Test::without("evict-malloc-mix-bo", BIND));
    all.push(Test::without("processes-evict-malloc-mix-bo", BIND));
    for name in ["prefetch-benchmark", "prefetch-sys-benchmark"] {
        all.push(Test::without(name, PREFETCH));
    }
    all.extend(simple::tests());
    all.extend(partial::tests());
    let madvise = MADVISE.iter().map(|what| format!("madvise-{what}"));
    all.extend(madvise.map(|name| Test::without(name, ADVISE)));
    for kind in [
        "pat-idx-wb",
        "pat-idx-wt",
        "pat-idx-uc",
        "pat-idx-uc-comp",
        "max-pat-index",
    ] {
        for vmas in ["single", "multi"] {
            let name = format!("pat-index-madvise-{kind}-{vmas}-vma");
            all.push(Test::without(name, NO_CACHES));
        }
    }
    all.extend(compute::tests());
    all
}

/// With the spelling of the suite.
const MADVISE: &[&str] = &[
    "atomic-inc",
    "preffered-loc-sram-migrate-pages",
    "preffered-loc-atomic-vram",
    "preffered-loc-atomic-gl",
    "preffered-loc-atomic-cpu",
    "preffered-loc-atomic-und",
    "multi-vma",
    "split-vma",
    "atomic-vma",
    "split-vma-with-mapping",
    "range-invalidate-change-attr",
    "no-range-invalidate-same-attr",
];

/// In a process of its own.
pub(crate) fn child(name: &str) -> Result<(), Skip> {
    allocs::child(name)
}

/// That there are as many as the suite has, each once, and that what is pending is what the engine
/// lacks.
pub(crate) fn check_count() {
    assert_eq!((of_main().len(), all().len()), (OF_MAIN, OF_ALL));
    let mut names: Vec<_> = all().into_iter().map(|test| test.name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), OF_ALL);
    let lacks = |status| all().iter().any(|test| test.status == status);
    assert_eq!(
        lacks(ADVISE),
        !CAN_ADVISE,
        "tests of advice are enabled here"
    );
    assert_eq!(lacks(PREFETCH), !CAN_PREFETCH, "tests that prefetch too");
    assert_eq!(lacks(BIND), !CAN_BIND, "and tests that bind");
}
