//! Graphs, on the CPU side: where edges come from, and how a search over them is checked.
//!
//! ```text
//!   Kronecker --.                                        .--> Csr::levels: plain CPU search
//!   .mtx -------+--> Source --> edge list --> (device) --+
//!   SNAP -------'    edge(i)     [u64; 2]    CSR, tree   '--> validate: the rules of Graph500
//! ```
//!
//! All graphs are undirected: the direction of an edge in a file is ignored, as Graph500 does it.

pub(crate) mod kronecker; // the Graph500 generator
mod lines; // numbered lines, and what can be wrong with one
mod mtx; // MatrixMarket files
mod snap; // SNAP edge lists
pub(crate) mod csr; // compressed sparse rows: sums, windows, the plain CPU search
pub(crate) mod validate; // the rules of Graph500

use crate::error::CliError;
use kronecker::Kronecker;
pub(crate) use lines::Problem;
use lines::{Lines, ParseError};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Marks a vertex that was not reached, in parents and in levels.
pub(crate) const NONE: u32 = u32::MAX;

/// The largest number of vertices: ids are `u32`, and one value is [`NONE`].
pub(crate) const MAX_VERTICES: u64 = NONE as u64;

/// Where the edges of a graph come from.
#[derive(Debug)]
pub(crate) enum Source {
    /// Generated.
    Kronecker(Kronecker),
    /// Read from a file.
    File(PathBuf, EdgeList),
}

impl Source {
    /// Reads a graph file: MatrixMarket where the name or the first line says so, else a SNAP edge list.
    pub(crate) fn open(path: &Path) -> Result<Self, CliError> {
        let unreadable = |source| CliError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let kind = path.metadata().map_err(unreadable)?.file_type();
        // A pipe ends, and may bring what another program unpacks; a device such as /dev/zero does not.
        if !kind.is_file() && !kind.is_fifo() {
            return Err(CliError::NotAFile {
                path: path.to_owned(),
            });
        }
        let file = File::open(path).map_err(unreadable)?;
        let list = read(path, BufReader::new(file)).map_err(|e| match e {
            ParseError::Io(source) => unreadable(source),
            ParseError::Line { line, problem } => CliError::Malformed {
                path: path.to_owned(),
                line,
                problem,
            },
        })?;
        Ok(Self::File(path.to_owned(), list))
    }

    /// The number of vertices. Ids are smaller.
    pub(crate) fn vertices(&self) -> u64 {
        match self {
            Self::Kronecker(k) => k.vertices(),
            Self::File(_, list) => list.vertices,
        }
    }

    /// The number of edges: repeated edges and loops are counted.
    pub(crate) fn edges(&self) -> u64 {
        match self {
            Self::Kronecker(k) => k.edges(),
            Self::File(_, list) => list.edges.len() as u64,
        }
    }

    /// The edge with this number.
    pub(crate) fn edge(&self, i: u64) -> [u64; 2] {
        match self {
            Self::Kronecker(k) => k.edge(i),
            Self::File(_, list) => list.edges[index(i)].map(u64::from),
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Kronecker(k) => write!(f, "{k}"),
            Self::File(path, _) => write!(f, "{}", path.display()),
        }
    }
}

/// Edges in memory, as a file lists them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct EdgeList {
    /// The number of vertices. Ids are smaller.
    pub(crate) vertices: u64,
    /// Pairs of vertex ids.
    pub(crate) edges: Vec<[u32; 2]>,
}

fn read(path: &Path, mut reader: impl BufRead) -> Result<EdgeList, ParseError> {
    let named = path
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("mtx"));
    let marked = reader
        .fill_buf()
        .map_err(ParseError::Io)?
        .starts_with(b"%%MatrixMarket");
    let lines = Lines::new(reader);
    if named || marked {
        mtx::parse(lines)
    } else {
        snap::parse(lines)
    }
}

/// A number that indexes memory of this process.
pub(crate) fn index(i: impl Into<u64>) -> usize {
    usize::try_from(i.into()).expect("an index of memory that exists")
}
