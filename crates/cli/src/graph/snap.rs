//! SNAP edge lists: one pair of vertex ids a line, `#` before comments.
//!
//! Ids are any numbers. They are compacted: the vertices of the graph are the ids that occur, in
//! ascending order.

use super::lines::{Lines, ParseError, Problem, fields, number};
use super::{EdgeList, MAX_VERTICES};
use std::io::BufRead;

/// Reads a whole file.
pub(crate) fn parse(mut lines: Lines<impl BufRead>) -> Result<EdgeList, ParseError> {
    let mut pairs = Vec::new();
    while let Some(text) = lines.next()? {
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        pairs.push(pair(text).map_err(|problem| lines.error(problem))?);
    }
    if pairs.is_empty() {
        return Err(lines.error(Problem::Ends { missing: "an edge" }));
    }
    compact(&pairs).map_err(|problem| lines.error(problem))
}

fn pair(text: &str) -> Result<[u64; 2], Problem> {
    let [from, to] = fields::<2>(text, "two vertex ids")?;
    Ok([number(from, "a vertex id")?, number(to, "a vertex id")?])
}

fn compact(pairs: &[[u64; 2]]) -> Result<EdgeList, Problem> {
    let mut ids = pairs.as_flattened().to_vec();
    ids.sort_unstable();
    ids.dedup();
    let vertices = ids.len() as u64;
    if vertices > MAX_VERTICES {
        return Err(Problem::TooManyVertices {
            vertices,
            max: MAX_VERTICES,
        });
    }
    let place = |id: u64| {
        let place = ids.binary_search(&id).expect("every id was collected");
        u32::try_from(place).expect("checked against the number of vertices")
    };
    Ok(EdgeList {
        vertices,
        edges: pairs.iter().map(|pair| pair.map(place)).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8]) -> Result<EdgeList, String> {
        parse(Lines::new(text)).map_err(|e| e.to_string())
    }

    #[test]
    fn well_formed() {
        let cases: [(&str, u64, &[[u32; 2]]); 4] = [
            ("# Nodes: 3\n0\t1\n1\t2\n", 3, &[[0, 1], [1, 2]]),
            ("1000 7\r\n\r\n7 18446744073709551615", 3, &[[1, 0], [0, 2]]),
            ("  5   5  \n", 1, &[[0, 0]]),
            (
                "1 2\n# in between\n2 1\n1 2\n",
                2,
                &[[0, 1], [1, 0], [0, 1]],
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
    fn every_mistake_names_its_line() {
        let cases: [(&[u8], &str); 8] = [
            (b"", "line 1: the file ends, and an edge was never found"),
            (
                b"# a\n# b\n",
                "line 2: the file ends, and an edge was never found",
            ),
            (
                b"1 2\n3\n",
                "line 2: expected two vertex ids, found 1 fields",
            ),
            (
                b"# a\n\n1 2 3\n",
                "line 3: expected two vertex ids, found 3 fields",
            ),
            (b"1 2\n1 x\n", "line 2: `x` is not a vertex id"),
            (b"-1 2\n", "line 1: `-1` is not a vertex id"),
            (
                b"1 18446744073709551616\n",
                "line 1: `18446744073709551616` is not a vertex id",
            ),
            (
                b"\x1f\x8b\x08\n",
                "line 1: not text (if the file is compressed, unpack it first)",
            ),
        ];
        for (text, message) in cases {
            assert_eq!(read(text), Err(message.to_owned()), "{message}");
        }
    }
}
