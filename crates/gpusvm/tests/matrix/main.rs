//! The behaviour matrix of Intel's `xe_exec_system_allocator`, on this very process and software GPUs:
//! its families and sections, and the tests that stand alone, by their names.
//!
//! ```text
//! cargo test -p gpusvm --test matrix                                  what is quick
//! cargo test --release -p gpusvm --test matrix -- --include-ignored   all of it
//! cargo test -p gpusvm --test matrix -- --include-ignored mmap-remap  by name
//! ```
//!
//! What is covered, and what is not and why: `docs/matrix.md`. Behaviour and names are of the IGT GPU
//! tools; the code is not.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, also outside of its test function, sleep, and look at a clock"
)]

mod names; // what tests there are
mod sections; // what each of them does around an exec
mod exec; // the common loop
mod record; // what an exec reads and writes
mod buffer; // the program's memory
mod objects; // memory of the device
mod engine; // the machine and its address spaces
mod threads; // engines at once
mod processes; // engines in processes of their own
mod huge; // huge pages of hugetlbfs
mod standalone; // tests of their own
mod page; // docs/matrix.md

use engine::{Machine, Spec};
use exec::{Plan, Seat};
use gpusvm_testkit::Watchdog;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use names::{FAMILIES, Family, Status, Who};
use sections::{Flags, SECTIONS, Section};
use std::process::ExitCode;
use std::time::Duration;

/// Why a test did not run.
#[derive(Clone, Debug)]
pub(crate) struct Skip(pub(crate) String);

/// Longer, and it hangs.
const LONGEST: Duration = Duration::from_secs(400);

fn main() -> ExitCode {
    if let Some(name) = processes::what() {
        return child(&name);
    }
    let arguments = Arguments::from_args();
    let mut trials = checks();
    for family in FAMILIES {
        trials.extend(SECTIONS.iter().map(|section| of_matrix(family, section)));
    }
    trials.extend(standalone::all().into_iter().map(of_standalone));
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// What must hold of the names and of the page.
fn checks() -> Vec<Trial> {
    let check = |name: &str, check: fn()| {
        let run = move || {
            check();
            Ok(())
        };
        Trial::test(name, run).with_kind("check")
    };
    use names::checks as of_names;
    vec![
        check(
            "twenty_five_families_of_seventy_five_sections",
            of_names::twenty_five_families_of_seventy_five_sections,
        ),
        check(
            "sections_skip_themselves_where_the_suite_skips_them",
            of_names::sections_skip_themselves_where_the_suite_skips_them,
        ),
        check(
            "twenty_four_sections_have_a_form_without_memset",
            of_names::twenty_four_sections_have_a_form_without_memset,
        ),
        check(
            "the_suite_has_all_standalone_tests",
            standalone::check_count,
        ),
        check("the_page_counts_the_matrix", page::check_counts),
        check(
            "the_page_lists_the_standalone_tests",
            page::check_standalone,
        ),
    ]
}

fn of_matrix(family: &'static Family, section: &'static Section) -> Trial {
    let name = format!("{}-{}", family.name, section.name);
    let status = names::status(family, section);
    let quick = names::is_quick(family, section);
    let run = move || in_matrix(family, section);
    trial(name, status, quick, run)
}

fn of_standalone(test: standalone::Test) -> Trial {
    let run = test.run;
    trial(test.name, test.status, test.quick, run)
}

fn trial(
    name: String,
    status: Status,
    quick: bool,
    run: impl FnOnce() -> Result<(), Skip> + Send + 'static,
) -> Trial {
    let named = name.clone();
    let runner = move || -> Result<Completion, Failed> {
        let reason = match status {
            Status::Covered => match within(&named, run) {
                Ok(()) => return Ok(Completion::Completed),
                Err(Skip(reason)) => reason,
            },
            Status::SkipsItself(reason) => format!("as the suite: {reason}"),
            Status::Impossible(reason) => format!("not here: {reason}"),
        };
        Ok(Completion::ignored_with(reason))
    };
    Trial::ignorable_test(name, runner).with_ignored_flag(!quick)
}

/// Ends the process with a dump of where its threads are if it takes too long.
fn within<T>(name: &str, run: impl FnOnce() -> T) -> T {
    let name = name.to_owned();
    let _watchdog = Watchdog::start(LONGEST, move || name.clone());
    run()
}

fn in_matrix(family: &Family, section: &Section) -> Result<(), Skip> {
    let plan = Plan::of(family, section);
    let _huge = plan
        .flags
        .has(Flags::HUGE)
        .then(huge::HugePages::reserve)
        .transpose()?;
    let shared_vm = threads::Sharing {
        vm: true,
        ..threads::Sharing::default()
    };
    match family.who {
        Who::Alone => alone(&plan),
        Who::Threads => threads::run(&plan, threads::Sharing::default()),
        Who::SharedVm => threads::run(&plan, shared_vm),
        Who::Processes => {
            // Whether it can run here at all is found out here.
            Machine::new(1)?.finish(0);
            processes::run(&format!("{}-{}", family.name, section.name), 1);
            Ok(())
        }
    }
}

/// One engine.
fn alone(plan: &Plan) -> Result<(), Skip> {
    let machine = Machine::with(Spec {
        vram: plan.vram(1),
        ..Spec::default()
    })?;
    exec::run(machine.engine(0), plan, Seat::ALONE);
    let moved = machine.stats().to_device.bytes;
    assert!(!plan.migrates() || moved > 0, "nothing moved");
    machine.finish(0);
    Ok(())
}

/// One process of a test of processes.
fn child(name: &str) -> ExitCode {
    let ran = within(name, || match names::parse(name) {
        Some((family, section)) => {
            let plan = Plan::of(family, section);
            processes::meet();
            alone(&plan)
        }
        None => standalone::child(name),
    });
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(Skip(reason)) => {
            println!("{reason}");
            ExitCode::FAILURE
        }
    }
}
