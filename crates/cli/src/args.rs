//! The command line.

use clap::builder::{RangedU64ValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use gpusvm::ByteSize;
use parse_size::Config;
use std::path::PathBuf;

/// More threads than this are a mistake.
const MAX_UNITS: usize = 256;

/// VRAM is handed out in blocks of this size.
const BLOCK: ByteSize = ByteSize::mib(2);

/// GPU shared virtual memory in user space: one pointer, valid on the CPU and on a device.
#[derive(Debug, Parser)]
#[command(name = "gpusvm", version)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a workload, verify its result and report what memory did.
    Run(RunArgs),
    /// Report what this machine allows, and how to allow more.
    Doctor,
}

/// A workload and how to run it.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// What to run.
    #[command(subcommand)]
    pub(crate) workload: WorkloadArgs,
    /// How to run it.
    #[command(flatten)]
    pub(crate) options: Options,
}

/// The options of every workload. Sizes are written as 64M or 1GiB, in powers of 1024.
#[derive(Debug, Args)]
#[command(next_help_heading = "Device and output")]
pub(crate) struct Options {
    /// Memory of the device, such as 64M; 2M at least.
    #[arg(long, global = true, value_name = "SIZE", default_value = "32M", value_parser = vram)]
    pub(crate) vram: ByteSize,
    /// Compute units of the device [default: one for each CPU].
    #[arg(long, global = true, value_name = "N", value_parser = units())]
    pub(crate) units: Option<usize>,
    /// Seed of everything that is random.
    #[arg(long, global = true, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// Print the report as one JSON object.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Show no progress bar.
    #[arg(long, global = true)]
    pub(crate) no_progress: bool,
    /// Fail instead of running without userfaultfd.
    #[arg(long, global = true)]
    pub(crate) require_uffd: bool,
    /// Use this rung of the capability ladder, to test or compare: 1 is the best, 4 the lowest.
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=4))]
    pub(crate) rung: Option<u8>,
}

impl Options {
    /// The number of compute units.
    pub(crate) fn units(&self) -> usize {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.units.unwrap_or(cpus.min(MAX_UNITS))
    }
}

/// What to run.
#[derive(Debug, Subcommand)]
pub(crate) enum WorkloadArgs {
    /// Breadth-first search on a Graph500 Kronecker graph or on a graph file.
    Bfs(BfsArgs),
    /// STREAM triad: a = b + s * c, element by element.
    Triad(TriadArgs),
    /// How often each byte occurs in a file.
    Histogram(HistogramArgs),
}

/// Options of `bfs`.
#[derive(Debug, Args)]
pub(crate) struct BfsArgs {
    /// The graph has 2^SCALE vertices.
    #[arg(long, default_value_t = 18, value_parser = clap::value_parser!(u32).range(1..=31))]
    pub(crate) scale: u32,
    /// Edges for each vertex.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) edge_factor: u32,
    /// Search this graph instead: MatrixMarket (.mtx) or a SNAP edge list.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["scale", "edge_factor"])]
    pub(crate) graph: Option<PathBuf>,
}

/// Options of `triad`.
#[derive(Debug, Args)]
pub(crate) struct TriadArgs {
    /// All three arrays together [default: four times the VRAM].
    #[arg(long, value_parser = triad_size)]
    pub(crate) size: Option<ByteSize>,
    /// How often to compute the whole array.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) iterations: u32,
}

/// Options of `histogram`.
#[derive(Debug, Args)]
pub(crate) struct HistogramArgs {
    /// The file to count.
    #[arg(long, value_name = "FILE")]
    pub(crate) input: PathBuf,
}

fn units() -> impl TypedValueParser<Value = usize> {
    RangedU64ValueParser::<usize>::new().range(1..=MAX_UNITS as u64)
}

fn vram(text: &str) -> Result<ByteSize, String> {
    at_least(text, BLOCK, "the device hands out memory in blocks of")
}

fn triad_size(text: &str) -> Result<ByteSize, String> {
    at_least(text, ByteSize::new(24), "one element of each array takes")
}

fn at_least(text: &str, least: ByteSize, because: &str) -> Result<ByteSize, String> {
    match Config::new().with_binary().parse_size(text) {
        Ok(bytes) if bytes >= least.get() => Ok(ByteSize::new(bytes)),
        Ok(_) => Err(format!("too small: {because} {least}")),
        Err(error) => Err(format!("not a size such as 64M or 1GiB: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, size) in [
            ("64M", ByteSize::mib(64)),
            ("1GiB", ByteSize::gib(1)),
            ("2MiB", ByteSize::mib(2)),
            ("2 mb", ByteSize::mib(2)),
            ("2097152", ByteSize::mib(2)),
            ("1.5g", ByteSize::mib(1536)),
        ] {
            assert_eq!(vram(text), Ok(size), "{text}");
        }
    }

    #[test]
    fn sizes_that_are_none() {
        for text in [
            "0", "1", "2047K", "", "-2M", "M", "16EiB", "2X", "2 MiBB", "nan",
        ] {
            assert!(vram(text).is_err(), "{text}");
        }
        let message = "too small: the device hands out memory in blocks of 2 MiB";
        assert_eq!(vram("1").unwrap_err(), message);
        assert_eq!(
            triad_size("23").unwrap_err(),
            "too small: one element of each array takes 24 B"
        );
    }

    #[test]
    fn options_stand_anywhere_after_run() {
        for line in [
            "gpusvm run --vram 4M bfs --scale 9",
            "gpusvm run bfs --scale 9 --vram 4M",
        ] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            let Command::Run(run) = cli.command else {
                panic!("{cli:?}")
            };
            assert_eq!(run.options.vram, ByteSize::mib(4));
            assert!(matches!(run.workload, WorkloadArgs::Bfs(bfs) if bfs.scale == 9));
        }
    }
}
