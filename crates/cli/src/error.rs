//! What goes wrong, each in one sentence.

use crate::graph::Problem;
use indicatif::BinaryBytes;
use std::io;
use std::path::PathBuf;

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// A file cannot be opened or read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A directory, a device, a pipe.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A file with nothing to count.
    #[error("{} is empty: there is nothing to count", path.display())]
    EmptyFile {
        /// The file.
        path: PathBuf,
    },
    /// A graph file with a line that is wrong.
    #[error("{}, line {line}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Counted from one.
        line: u64,
        /// What is wrong.
        problem: Problem,
    },
    /// A graph in which no two vertices are joined.
    #[error("{graph} has no edge between two vertices: there is nothing to search")]
    NoEdges {
        /// Its name.
        graph: String,
    },
    /// More than the memory of this machine.
    #[error(
        "the run needs {} ({} of working set, {} of VRAM), and {} of memory are available",
        BinaryBytes(*needed), BinaryBytes(*working_set), BinaryBytes(*vram), BinaryBytes(*available)
    )]
    TooLarge {
        /// Of shared memory.
        working_set: u64,
        /// Of the device.
        vram: u64,
        /// Both, as far as they can be in use at once.
        needed: u64,
        /// On this machine, now.
        available: u64,
    },
    /// The device or the shared memory could not be set up.
    #[error("{0}")]
    Setup(gpusvm::Error),
    /// The run itself failed.
    #[error("{0}")]
    Run(#[from] gpusvm::Error),
    /// The report could not be written.
    #[error("cannot write the report: {0}")]
    Output(io::Error),
}

impl CliError {
    /// 2 if the input or the machine does not allow the run, 1 if the run failed.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Run(_) | Self::Output(_) => 1,
            _ => 2,
        }
    }
}
