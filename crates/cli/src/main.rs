//! The `gpusvm` command: runs a workload on shared virtual memory and reports what it took.
//!
//! ```text
//!   args --> workload (input is read and checked) --> memory: does it fit? --> machine: device and memory
//!                                                                                  |
//!   exit code <-- report <-- statistics at exit <-- shutdown <-- outcome <-- run --'
//! ```
//!
//! Exit codes: 0, verified; 1, not verified; 2, the input or the machine does not allow the run.

#![deny(unsafe_code)]

mod args; // the command line
#[expect(unsafe_code, reason = "a launch is a promise of its caller")]
mod workload; // what can run: bfs, triad, histogram
mod graph; // graphs: sources, plain search, validation
#[expect(unsafe_code, reason = "a launch is a promise of its caller")]
mod machine; // the software GPU and the memory it shares
mod memory; // how much there is
mod report; // what is printed at the end
mod progress; // the bar
mod clock; // time
mod random; // random numbers
mod error; // what goes wrong

use args::{Cli, Command, Options, WorkloadArgs};
use clap::Parser;
use clock::Stopwatch;
use error::CliError;
use machine::Machine;
use progress::Progress;
use report::Report;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run(run) => run_workload(&run.workload, &run.options),
        Command::Doctor => print(&machine::doctor()).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        complain(&format!("error: {error}"));
        ExitCode::from(error.exit_code())
    })
}

/// One run, from the arguments to the report.
fn run_workload(workload: &WorkloadArgs, options: &Options) -> Result<ExitCode, CliError> {
    let watch = Stopwatch::start();
    let workload = workload::prepare(workload, options)?;
    memory::admit(workload.footprint(), options.vram)?;
    let machine = Machine::start(options)?;
    if let Some(notice) = machine.rung_notice() {
        complain(&format!("note: {notice}"));
    }
    let progress = Progress::new(!options.json && !options.no_progress);
    let context = machine.context(&progress);
    let what = (workload.name(), workload.subject());
    let outcome = workload.run(&context)?;
    let working_set = context.working_set();
    progress.finish();
    let at_exit = machine.shutdown()?;
    let report =
        Report::new(what, outcome, options).with_machine(&at_exit, working_set, watch.elapsed());
    print(&if options.json {
        report.json()
    } else {
        report.to_string()
    })?;
    Ok(if report.verified {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    })
}

/// Writes to standard output.
fn print(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", text.trim_end())
        .and_then(|()| out.flush())
        .map_err(CliError::Output)
}

/// Writes a line to standard error, if anybody listens.
fn complain(line: &str) {
    let _nobody_listens = writeln!(std::io::stderr(), "{line}");
}
