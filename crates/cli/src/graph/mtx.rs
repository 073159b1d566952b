//! MatrixMarket files: a square sparse matrix read as an undirected graph.
//!
//! ```text
//!   %%MatrixMarket matrix coordinate pattern symmetric      the header
//!   % any number of comments
//!   5 5 3                                                   rows, columns, entries
//!   2 1                                                     one entry: row, column, from one;
//!   3 1                                                     with a value if not `pattern`
//! ```
//!
//! Values are checked and then ignored: an entry is an edge. Written here because the crates for this
//! format do not say which line is wrong.

use super::lines::{Lines, ParseError, Problem, fields, number};
use super::{EdgeList, MAX_VERTICES};
use std::io::BufRead;

/// Reads a whole file.
pub(crate) fn parse(mut lines: Lines<impl BufRead>) -> Result<EdgeList, ParseError> {
    let header = lines.next()?.map_or(Err(Problem::NoHeader), header);
    let field = header.map_err(|problem| lines.error(problem))?;
    let (vertices, announced) = loop {
        match lines.next()? {
            None => {
                return Err(lines.error(Problem::Ends {
                    missing: "the size line",
                }));
            }
            Some(text) if is_comment(text) => {}
            Some(text) => break size(text).map_err(|problem| lines.error(problem))?,
        }
    };
    let mut list = EdgeList {
        vertices,
        edges: Vec::new(),
    };
    while let Some(text) = lines.next()? {
        if is_comment(text) {
            continue;
        }
        let entry = match list.edges.len() as u64 {
            found if found < announced => entry(text, field, vertices),
            _ => Err(Problem::TooManyEntries { announced }),
        };
        list.edges
            .push(entry.map_err(|problem| lines.error(problem))?);
    }
    let found = list.edges.len() as u64;
    if found < announced {
        return Err(lines.error(Problem::TooFewEntries { announced, found }));
    }
    Ok(list)
}

/// What an entry carries beside its place.
#[derive(Clone, Copy)]
enum Field {
    Pattern,
    Integer,
    Real,
}

fn is_comment(text: &str) -> bool {
    text.is_empty() || text.starts_with('%')
}

fn header(text: &str) -> Result<Field, Problem> {
    let text = text.to_ascii_lowercase();
    let [mark, object, format, field, symmetry] =
        fields::<5>(&text, "").map_err(|_| Problem::NoHeader)?;
    if mark != "%%matrixmarket" {
        return Err(Problem::NoHeader);
    }
    let unsupported = |found: &str, supported| {
        Err(Problem::Unsupported {
            found: found.to_owned(),
            supported,
        })
    };
    if object != "matrix" {
        return unsupported(object, "a graph is a `matrix`");
    }
    if format != "coordinate" {
        return unsupported(format, "a graph is in `coordinate` format");
    }
    if !matches!(symmetry, "general" | "symmetric" | "skew-symmetric") {
        return unsupported(symmetry, "use `general`, `symmetric` or `skew-symmetric`");
    }
    match field {
        "pattern" => Ok(Field::Pattern),
        "integer" => Ok(Field::Integer),
        "real" => Ok(Field::Real),
        _ => unsupported(field, "use `pattern`, `integer` or `real`"),
    }
}

/// The number of vertices, and of entries.
fn size(text: &str) -> Result<(u64, u64), Problem> {
    let [rows, columns, entries] = fields::<3>(text, "rows, columns and entries")?;
    let rows: u64 = number(rows, "a number of rows")?;
    let columns: u64 = number(columns, "a number of columns")?;
    let entries = number(entries, "a number of entries")?;
    if rows != columns {
        return Err(Problem::NotSquare { rows, columns });
    }
    if rows > MAX_VERTICES {
        return Err(Problem::TooManyVertices {
            vertices: rows,
            max: MAX_VERTICES,
        });
    }
    Ok((rows, entries))
}

fn entry(text: &str, field: Field, vertices: u64) -> Result<[u32; 2], Problem> {
    let (row, column) = match field {
        Field::Pattern => {
            let [row, column] = fields::<2>(text, "a row and a column")?;
            (row, column)
        }
        Field::Integer | Field::Real => {
            let [row, column, value] = fields::<3>(text, "a row, a column and a value")?;
            match field {
                Field::Integer => drop(number::<i128>(value, "an integer")?),
                _ => drop(number::<f64>(value, "a real number")?),
            }
            (row, column)
        }
    };
    Ok([vertex(row, vertices)?, vertex(column, vertices)?])
}

/// An id counted from one, made to count from zero.
fn vertex(word: &str, vertices: u64) -> Result<u32, Problem> {
    let vertex: u64 = number(word, "a vertex number")?;
    if vertex == 0 || vertex > vertices {
        return Err(Problem::OutOfRange { vertex, vertices });
    }
    Ok(u32::try_from(vertex - 1).expect("checked against the number of vertices"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8]) -> Result<EdgeList, String> {
        parse(Lines::new(text)).map_err(|e| e.to_string())
    }

    #[test]
    fn well_formed() {
        let cases: [(&str, u64, &[[u32; 2]]); 6] = [
            (
                "%%MatrixMarket matrix coordinate pattern general\n3 3 2\n1 2\n3 1\n",
                3,
                &[[0, 1], [2, 0]],
            ),
            (
                "%%matrixmarket MATRIX Coordinate Real Symmetric\n%\n\n2 2 1\n2 1 -1.5e3\n",
                2,
                &[[1, 0]],
            ),
            (
                "%%MatrixMarket matrix coordinate integer skew-symmetric\n2 2 1\n 2\t1  -7 \n",
                2,
                &[[1, 0]],
            ),
            (
                "%%MatrixMarket matrix coordinate pattern general\r\n2 2 1\r\n1 1",
                2,
                &[[0, 0]],
            ),
            (
                "%%MatrixMarket matrix coordinate pattern general\n4 4 0\n",
                4,
                &[],
            ),
            (
                "%%MatrixMarket matrix coordinate pattern general\n2 2 1\n% late\n1 2\n\n",
                2,
                &[[0, 1]],
            ),
        ];
        for (text, vertices, edges) in cases {
            let list = EdgeList {
                vertices,
                edges: edges.to_vec(),
            };
            assert_eq!(read(text.as_bytes()), Ok(list), "{text}");
        }
    }

    #[test]
    fn every_mistake_in_the_header_names_line_1() {
        const NO_HEADER: &str =
            "line 1: expected the header `%%MatrixMarket matrix coordinate <field> <symmetry>`";
        let cases = [
            ("", NO_HEADER),
            ("1 2\n", NO_HEADER),
            ("%%MatrixMarket matrix coordinate pattern\n", NO_HEADER),
            (
                "%%MatrixMarket vector coordinate real general\n",
                "line 1: `vector` is not supported: a graph is a `matrix`",
            ),
            (
                "%%MatrixMarket matrix array real general\n",
                "line 1: `array` is not supported: a graph is in `coordinate` format",
            ),
            (
                "%%MatrixMarket matrix coordinate complex general\n",
                "line 1: `complex` is not supported: use `pattern`, `integer` or `real`",
            ),
            (
                "%%MatrixMarket matrix coordinate real hermitian\n",
                "line 1: `hermitian` is not supported: use `general`, `symmetric` or `skew-symmetric`",
            ),
        ];
        for (text, message) in cases {
            assert_eq!(read(text.as_bytes()), Err(message.to_owned()), "{text}");
        }
    }

    #[test]
    fn every_mistake_after_the_header_names_its_line() {
        let cases = [
            (
                "% x\n",
                "line 2: the file ends, and the size line was never found",
            ),
            (
                "% x\n3 3\n",
                "line 3: expected rows, columns and entries, found 2 fields",
            ),
            ("3 x 1\n", "line 2: `x` is not a number of columns"),
            ("3 3 -1\n", "line 2: `-1` is not a number of entries"),
            (
                "3 4 1\n",
                "line 2: the matrix has 3 rows and 4 columns: a graph needs a square one",
            ),
            (
                "4294967296 4294967296 0\n",
                "line 2: 4294967296 vertices are more than the 4294967295 that fit",
            ),
            (
                "3 3 2\n1 2 1\n% x\n0 1 1\n",
                "line 5: vertex 0 is outside 1..=3",
            ),
            ("3 3 1\n1 4 1\n", "line 3: vertex 4 is outside 1..=3"),
            (
                "3 3 1\n1 2\n",
                "line 3: expected a row, a column and a value, found 2 fields",
            ),
            (
                "3 3 1\n1 2 3 4\n",
                "line 3: expected a row, a column and a value, found 4 fields",
            ),
            ("3 3 1\n1 2 x\n", "line 3: `x` is not a real number"),
            ("3 3 1\na 2 1\n", "line 3: `a` is not a vertex number"),
            (
                "3 3 1\n1 2 1\n1 3 1\n",
                "line 4: more entries than the 1 that were announced",
            ),
            (
                "3 3 9000000000000000000\n1 2 1\n",
                "line 3: the file ends after 1 of 9000000000000000000 entries",
            ),
        ];
        for (text, message) in cases {
            let text = format!("%%MatrixMarket matrix coordinate real general\n{text}");
            assert_eq!(read(text.as_bytes()), Err(message.to_owned()), "{text}");
        }
    }

    #[test]
    fn values_have_the_kind_of_the_header() {
        let text = b"%%MatrixMarket matrix coordinate integer general\n2 2 1\n1 2 1.5\n";
        assert_eq!(
            read(text),
            Err("line 3: `1.5` is not an integer".to_owned())
        );
        let text = b"%%MatrixMarket matrix coordinate pattern general\n2 2 1\n1 2 1\n";
        assert_eq!(
            read(text),
            Err("line 3: expected a row and a column, found 3 fields".to_owned())
        );
    }

    #[test]
    fn bytes_that_are_no_text() {
        let text = b"%%MatrixMarket matrix coordinate real general\n\xff\xfe\n";
        let message = "line 2: not text (if the file is compressed, unpack it first)";
        assert_eq!(read(text), Err(message.to_owned()));
    }
}
