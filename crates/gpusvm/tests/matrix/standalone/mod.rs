//! The tests that stand alone: 69 of the suite's main program, and those of its neighbours.

mod partial; // half of a buffer goes
mod allocs; // much memory: benchmarks, eviction
mod compute; // a real kernel
mod multigpu; // two devices
mod words; // what they do there
mod madvise; // advice
mod prefetch; // memory that is fetched
mod simple; // a bad address, neighbouring words

use crate::Skip;
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

const NO_CACHES: Status = Status::Impossible("there is no cache attribute: memory is coherent");

/// How many the suite has: of its main program, and with its neighbours.
pub(crate) const OF_MAIN: usize = 69;
pub(crate) const OF_ALL: usize = OF_MAIN + 21 + 1 + 1;

/// All of them, in the order of the suite.
pub(crate) fn all() -> Vec<Test> {
    let mut all = of_main();
    all.extend(multigpu::tests());
    all.push(Test::quick("prefetch-fault-svm", prefetch::fault));
    all.push(Test::quick("svm-userptr-copy-madvise", madvise::copy));
    all
}

fn of_main() -> Vec<Test> {
    let mut all = allocs::tests();
    all.extend(prefetch::benchmarks());
    all.extend(simple::tests());
    all.extend(partial::tests());
    all.extend(madvise::tests());
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

/// In a process of its own.
pub(crate) fn child(name: &str) -> Result<(), Skip> {
    allocs::child(name)
}

/// That there are as many as the suite has, each once.
pub(crate) fn check_count() {
    assert_eq!((of_main().len(), all().len()), (OF_MAIN, OF_ALL));
    let mut names: Vec<_> = all().into_iter().map(|test| test.name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), OF_ALL);
}
