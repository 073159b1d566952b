//! `cargo xtask`: what is done to the workspace and is no test of cargo's.

mod hmm_selftests; // the kernel's HMM self-tests, on our engine
mod kernel_source; // where their source comes from
mod tap; // what they say of themselves
mod closes; // what the library says of devices that are closed
mod documented; // what the documentation says of the tests
mod table; // and how we say it
mod setting; // settings of the system, put back afterwards
mod preload_cost; // what the preloaded library costs programs that do not need it

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// What is done to the workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Build the kernel's HMM self-tests from the distribution's source package and run them, unmodified, on
    /// our engine. Exit status: 0 all passed, 1 a test failed, or something was left in use, or the
    /// documentation says otherwise, 77 nothing could be tested, 2 anything else.
    HmmSelftests(hmm_selftests::Options),
    /// Time programs of the system with and without the preloaded library, by turns.
    PreloadCost(preload_cost::Options),
}

fn main() -> ExitCode {
    match Arguments::parse().task {
        Task::HmmSelftests(options) => hmm_selftests::run(&options),
        Task::PreloadCost(options) => preload_cost::run(&options),
    }
}
