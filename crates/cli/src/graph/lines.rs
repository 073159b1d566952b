//! Numbered lines of a text file, and what can be wrong with one.

use std::io::BufRead;
use std::str::FromStr;

/// A file that could not be read as a graph.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ParseError {
    /// The file could not be read.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A line is not what the format asks for.
    #[error("line {line}: {problem}")]
    Line {
        /// Counted from one.
        line: u64,
        /// What is wrong.
        problem: Problem,
    },
}

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Problem {
    /// Not UTF-8: binary, or compressed.
    #[error("not text (if the file is compressed, unpack it first)")]
    NotText,
    /// The first line of a MatrixMarket file.
    #[error("expected the header `%%MatrixMarket matrix coordinate <field> <symmetry>`")]
    NoHeader,
    /// A header that is right, for something that is no graph.
    #[error("`{found}` is not supported: {supported}")]
    Unsupported {
        /// The word of the header.
        found: String,
        /// What it may be.
        supported: &'static str,
    },
    /// Too many or too few words.
    #[error("expected {expected}, found {found} fields")]
    Fields {
        /// What belongs on this line.
        expected: &'static str,
        /// How many words there are.
        found: usize,
    },
    /// A word that is no number.
    #[error("`{word}` is not {kind}")]
    NotANumber {
        /// The word.
        word: String,
        /// The kind of number that belongs there.
        kind: &'static str,
    },
    /// A vertex that is not in the graph.
    #[error("vertex {vertex} is outside 1..={vertices}")]
    OutOfRange {
        /// As written.
        vertex: u64,
        /// How many there are.
        vertices: u64,
    },
    /// Not an adjacency matrix.
    #[error("the matrix has {rows} rows and {columns} columns: a graph needs a square one")]
    NotSquare {
        /// As written.
        rows: u64,
        /// As written.
        columns: u64,
    },
    /// More vertices than ids.
    #[error("{vertices} vertices are more than the {max} that fit")]
    TooManyVertices {
        /// As written.
        vertices: u64,
        /// The limit.
        max: u64,
    },
    /// The file goes on after its last entry.
    #[error("more entries than the {announced} that were announced")]
    TooManyEntries {
        /// As the size line says.
        announced: u64,
    },
    /// The file ends early.
    #[error("the file ends after {found} of {announced} entries")]
    TooFewEntries {
        /// As the size line says.
        announced: u64,
        /// How many came.
        found: u64,
    },
    /// The file ends before anything of use.
    #[error("the file ends, and {missing} was never found")]
    Ends {
        /// What is missing.
        missing: &'static str,
    },
}

/// The lines of a text file, counted.
#[derive(Debug)]
pub(crate) struct Lines<R> {
    reader: R,
    buffer: Vec<u8>,
    number: u64,
}

impl<R: BufRead> Lines<R> {
    /// Starts before the first line.
    pub(crate) fn new(reader: R) -> Self {
        Self {
            reader,
            buffer: Vec::new(),
            number: 0,
        }
    }

    /// The next line without white space around it, or `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<&str>, ParseError> {
        self.buffer.clear();
        if self.reader.read_until(b'\n', &mut self.buffer)? == 0 {
            return Ok(None);
        }
        self.number += 1;
        let line = self.number;
        match std::str::from_utf8(&self.buffer) {
            Ok(text) => Ok(Some(text.trim())),
            Err(_) => Err(ParseError::Line {
                line,
                problem: Problem::NotText,
            }),
        }
    }

    /// An error on the present line; on the first one of an empty file.
    pub(crate) fn error(&self, problem: Problem) -> ParseError {
        ParseError::Line {
            line: self.number.max(1),
            problem,
        }
    }
}

/// Exactly `N` words.
pub(crate) fn fields<'a, const N: usize>(
    text: &'a str,
    expected: &'static str,
) -> Result<[&'a str; N], Problem> {
    let mut words = [""; N];
    let mut found = 0;
    for word in text.split_ascii_whitespace() {
        if let Some(slot) = words.get_mut(found) {
            *slot = word;
        }
        found += 1;
    }
    if found == N {
        Ok(words)
    } else {
        Err(Problem::Fields { expected, found })
    }
}

/// One number.
pub(crate) fn number<T: FromStr>(word: &str, kind: &'static str) -> Result<T, Problem> {
    word.parse().map_err(|_| Problem::NotANumber {
        word: word.to_owned(),
        kind,
    })
}
