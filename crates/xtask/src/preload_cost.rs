//! What the preloaded library costs a program that opens no device: times with and without it, by turns.

use crate::hmm_selftests::{Failed, build_library, done, target};
use clap::Args;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// How to measure.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How often to run each program each way. The median counts.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
}

/// Programs of the system, as scripts that find their input in `$1`.
const PROGRAMS: [(&str, &str); 5] = [
    ("sort, in memory", r#"sort --parallel=4 "$1" >/dev/null"#),
    (
        "sort, with temporary files",
        r#"sort --parallel=4 -S 8M --compress-program=gzip "$1" >/dev/null"#,
    ),
    (
        "python3, allocating",
        r#"python3 -c "d=[str(i)*9 for i in range(600000)]; d.sort(); len(set(d))""#,
    ),
    (
        "python3, 60 subprocesses",
        r#"python3 -c "import subprocess as s; [s.run(['true']) for i in range(60)]""#,
    ),
    (
        "sh, 300 programs",
        "i=0; while [ $i -lt 300 ]; do i=$((i+1)); /bin/true; done",
    ),
];
/// The input: lines, in no order.
const INPUT: &str =
    r#"seq 1 1200000 | awk '{ printf "%016x %d\n", ($1 * 2654435761) % 4294967291, $1 }' >"$1""#;

/// Measures, and prints a table.
pub(crate) fn run(options: &Options) -> ExitCode {
    match try_run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("preload-cost: {error}");
            ExitCode::from(2)
        }
    }
}

fn try_run(options: &Options) -> Result<(), Failed> {
    let library = build_library(&target(), true)?;
    let input = target().join("preload-cost.txt");
    done(
        "writing the input",
        script(INPUT, &input).stdin(Stdio::null()),
    )?;
    println!("median of {} runs each, in ms", options.runs);
    println!("{:28} {:>9} {:>9} {:>7}", "", "without", "with", "ratio");
    for (name, program) in PROGRAMS {
        let mut times = [Vec::new(), Vec::new()];
        // Once each way that does not count.
        for run in 0..=options.runs {
            for (times, library) in times.iter_mut().zip([None, Some(&library)]) {
                let mut command = script(program, &input);
                library.map(|library| command.env("LD_PRELOAD", library));
                let time = time(&mut command)?;
                if run > 0 {
                    times.push(time);
                }
            }
        }
        let [without, with] = times.map(median);
        let ratio = with.as_secs_f64() / without.as_secs_f64();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        println!("{name:28} {:9.1} {:9.1} {ratio:7.3}", ms(without), ms(with));
    }
    // It is written anew each time.
    let _ = std::fs::remove_file(input);
    Ok(())
}

fn script(script: &str, input: &Path) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(input);
    command.env("LC_ALL", "C");
    command
}

fn time(command: &mut Command) -> Result<Duration, Failed> {
    #[expect(clippy::disallowed_methods, reason = "this is where the clock enters")]
    let began = Instant::now();
    done("a program", command)?;
    Ok(began.elapsed())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let times = [5, 1, 9, 2, 3].map(Duration::from_millis);
        assert_eq!(median(times.to_vec()), Duration::from_millis(3));
    }
}
