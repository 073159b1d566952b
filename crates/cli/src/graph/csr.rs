//! Compressed sparse rows, seen from the CPU.
//!
//! ```text
//!   rows     0   2   2   5   6        neighbours of v: columns[rows[v]..rows[v + 1]]
//!            |   |   |   |   '-- end
//!   columns  2 3 .   0 3 3 2
//! ```
//!
//! Every edge stands in the rows of both its ends; loops are left out.

use super::{NONE, index};
use crate::random::mix;
use std::ops::Range;

/// A graph in compressed sparse rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Csr<'a> {
    /// Where the row of each vertex begins, and the end of the last one.
    pub(crate) rows: &'a [u64],
    /// The neighbours, row after row.
    pub(crate) columns: &'a [u32],
}

impl<'a> Csr<'a> {
    /// The number of vertices.
    pub(crate) fn vertices(&self) -> usize {
        self.rows.len() - 1
    }

    /// The number of neighbours of a vertex, repeated ones counted.
    pub(crate) fn degree(&self, v: usize) -> u64 {
        self.rows[v + 1] - self.rows[v]
    }

    /// The neighbours of a vertex.
    pub(crate) fn neighbours(&self, v: usize) -> &'a [u32] {
        &self.columns[index(self.rows[v])..index(self.rows[v + 1])]
    }

    /// Breadth-first search with a queue, the plain way: the level of each vertex, or [`NONE`].
    pub(crate) fn levels(&self, root: u32) -> Vec<u32> {
        let mut levels = vec![NONE; self.vertices()];
        let mut queue = Vec::with_capacity(self.vertices());
        levels[index(root)] = 0;
        queue.push(root);
        let mut head = 0;
        while let Some(&v) = queue.get(head) {
            head += 1;
            let level = levels[index(v)] + 1;
            for &w in self.neighbours(index(v)) {
                if levels[index(w)] == NONE {
                    levels[index(w)] = level;
                    queue.push(w);
                }
            }
        }
        levels
    }

    /// Whether the rows hold exactly these edges, both ways: as many, and with the same fingerprint,
    /// which is a sum and does not depend on the order.
    pub(crate) fn holds(&self, edges: &[[u64; 2]]) -> bool {
        let in_list = edges
            .iter()
            .filter(|[u, v]| u != v)
            .fold(0_u64, |sum, &[u, v]| {
                sum.wrapping_add(fingerprint(u, v))
                    .wrapping_add(fingerprint(v, u))
            });
        let well_formed = self.rows.is_sorted()
            && self.rows.first() == Some(&0)
            && self.rows.last() == Some(&(self.columns.len() as u64));
        let in_rows = || {
            (0..self.vertices()).fold(0_u64, |sum, u| {
                self.neighbours(u).iter().fold(sum, |sum, &v| {
                    sum.wrapping_add(fingerprint(u as u64, v.into()))
                })
            })
        };
        let loops = edges.iter().filter(|[u, v]| u == v).count();
        well_formed && self.columns.len() == 2 * (edges.len() - loops) && in_rows() == in_list
    }
}

fn fingerprint(u: u64, v: u64) -> u64 {
    mix(mix(u).wrapping_add(v))
}

/// Turns counts into starts: `[0, 2, 0, 3]` becomes `[0, 2, 2, 5]`.
pub(crate) fn sum_up(counts: &mut [u64]) {
    let mut sum = 0;
    for count in counts {
        sum += *count;
        *count = sum;
    }
}

/// Cuts the vertices into windows whose share of the rows being filled takes at most `budget` bytes:
/// a write position of 8 bytes for each vertex, 4 bytes for each neighbour. A vertex that is larger
/// than the budget has a window of its own.
pub(crate) fn windows(rows: &[u64], budget: u64) -> Vec<Range<u64>> {
    let vertices = rows.len() as u64 - 1;
    let bytes_before = |v: u64| 8 * v + 4 * rows[index(v)];
    let mut windows = Vec::new();
    let mut start = 0;
    while start < vertices {
        let limit = bytes_before(start) + budget;
        let mut fits = start..vertices;
        while fits.start < fits.end {
            let middle = fits.start + (fits.end - fits.start) / 2;
            match bytes_before(middle + 1) <= limit {
                true => fits.start = middle + 1,
                false => fits.end = middle,
            }
        }
        let end = fits.start.max(start + 1);
        windows.push(start..end);
        start = end;
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: [u64; 5] = [0, 2, 2, 5, 6];
    const COLUMNS: [u32; 6] = [2, 2, 0, 0, 3, 2];
    const EDGES: [[u64; 2]; 4] = [[0, 2], [2, 0], [3, 2], [1, 1]];
    const GRAPH: Csr<'static> = Csr {
        rows: &ROWS,
        columns: &COLUMNS,
    };

    #[test]
    fn levels_of_a_small_graph() {
        assert_eq!(GRAPH.levels(3), [2, NONE, 1, 0]);
        assert_eq!(GRAPH.levels(1), [NONE, 0, NONE, NONE]);
    }

    #[test]
    fn holds_its_edges_in_any_order_and_no_others() {
        assert!(GRAPH.holds(&EDGES));
        let turned = [[2, 3], [1, 1], [0, 2], [0, 2]];
        assert!(GRAPH.holds(&turned));
        assert!(!GRAPH.holds(&EDGES[..2]), "an edge too many");
        assert!(!GRAPH.holds(&[[0, 2], [2, 0], [3, 0]]), "another edge");
        let swapped = Csr {
            rows: &ROWS,
            columns: &[2, 0, 2, 0, 3, 2],
        };
        assert!(!swapped.holds(&EDGES), "a neighbour in the wrong row");
        for rows in [[0, 3, 2, 5, 6], [1, 2, 2, 5, 6], [0, 2, 2, 5, 5]] {
            assert!(
                !Csr {
                    rows: &rows,
                    columns: &COLUMNS
                }
                .holds(&EDGES),
                "{rows:?}"
            );
        }
    }

    #[test]
    fn counts_become_starts() {
        let mut counts = [0, 2, 0, 3];
        sum_up(&mut counts);
        assert_eq!(counts, [0, 2, 2, 5]);
        sum_up(&mut []);
    }

    #[test]
    fn windows_cover_every_vertex_once_within_the_budget() {
        for budget in 0..80 {
            let windows = windows(&ROWS, budget);
            assert_eq!(windows[0].start, 0);
            assert_eq!(windows.last().map(|w| w.end), Some(4));
            assert!(windows.windows(2).all(|pair| pair[0].end == pair[1].start));
            for w in windows {
                let bytes = 8 * (w.end - w.start) + 4 * (ROWS[index(w.end)] - ROWS[index(w.start)]);
                assert!(bytes <= budget || w.end - w.start == 1, "{budget}: {w:?}");
            }
        }
        assert_eq!(windows(&ROWS, 56).len(), 1);
        assert_eq!(windows(&ROWS, 28), [0..2, 2..3, 3..4]);
    }
}
