//! From an edge list to a CSR, on the device.
//!
//! Both passes read the edge list from end to end and write all over a smaller array. Where that one does
//! not fit into VRAM, each pass is made several times, for a window of it that does:
//!
//! ```text
//!   degrees   for each edge u - v:  rows[u + 1] += 1,  rows[v + 1] += 1         (atomic)
//!   (CPU)     sum up: counts become row starts; a copy becomes the write positions
//!   columns   for each edge u - v:  columns[position[u]++] = v, and v, u        (atomic)
//! ```

use crate::clock::Stopwatch;
use crate::error::CliError;
use crate::graph::csr::{self, Csr};
use crate::graph::{Source, index};
use crate::machine::Context;
use gpusvm::{Lane, LaneError, SvmPtr, SvmSlice};
use std::ops::Range;
use std::time::Duration;

/// Edges that a lane works on: 4 KiB of the list.
const TILE: usize = 256;
/// Edges that are written between two steps of the progress bar.
const BATCH: usize = 1 << 16;

/// A graph in shared memory.
#[derive(Debug)]
pub(super) struct Graph {
    edges: SvmSlice<u64>,
    pub(super) rows: SvmSlice<u64>,
    positions: SvmSlice<u64>,
    pub(super) columns: SvmSlice<u32>,
    /// How long the device took to build the CSR.
    pub(super) build_time: Duration,
}

impl Graph {
    /// Takes all edges from the source. It is an error if they join no two vertices.
    pub(super) fn build(context: &Context<'_>, mut source: Source) -> Result<Self, CliError> {
        let (name, n) = (source.to_string(), index(source.vertices()));
        let edges = load(context, &mut source)?;
        drop(source); // what it holds must not be in memory twice
        let watch = Stopwatch::start();
        let mut rows = context.alloc(n + 1)?;
        count_degrees(context, &edges, &rows)?;
        csr::sum_up(&mut rows);
        if rows[n] == 0 {
            return Err(CliError::NoEdges { graph: name });
        }
        let mut positions = context.alloc(n)?;
        positions.copy_from_slice(&rows[..n]);
        let columns = context.alloc(index(rows[n]))?;
        let mut graph = Self {
            edges,
            rows,
            positions,
            columns,
            build_time: Duration::ZERO,
        };
        graph.fill_columns(context)?;
        graph.build_time = watch.elapsed();
        Ok(graph)
    }

    /// The edges as they came.
    pub(super) fn edges(&self) -> &[[u64; 2]] {
        self.edges.as_chunks().0
    }

    /// The CSR as the CPU sees it.
    pub(super) fn csr(&self) -> Csr<'_> {
        Csr {
            rows: &self.rows,
            columns: &self.columns,
        }
    }

    fn fill_columns(&self, context: &Context<'_>) -> Result<(), CliError> {
        let windows = csr::windows(&self.rows, context.vram / 4);
        let (positions, columns) = (self.positions.device_ptr(), self.columns.device_ptr());
        context.progress.stage("filling rows", windows.len() as u64);
        for window in windows {
            for_each_end(context, &self.edges, window, move |lane, from, to| {
                let place = lane.atomic_add(positions.add(index(from)), 1_u64)?;
                lane.store(columns.add(index(place)), narrow(to))
            })?;
        }
        Ok(())
    }
}

fn load(context: &Context<'_>, source: &mut Source) -> Result<SvmSlice<u64>, CliError> {
    if let Source::Kronecker(kronecker) = source {
        context.progress.open_stage("naming vertices");
        kronecker.permute();
    }
    context.progress.stage("writing edges", source.edges());
    let mut edges = context.alloc::<u64>(2 * index(source.edges()))?;
    let (pairs, _) = edges.as_chunks_mut::<2>();
    let mut number = 0;
    for batch in pairs.chunks_mut(BATCH) {
        for pair in &mut *batch {
            *pair = source.edge(number);
            number += 1;
        }
        context.progress.step(batch.len() as u64);
    }
    Ok(edges)
}

/// Leaves the degree of `v` in `rows[v + 1]`.
fn count_degrees(
    context: &Context<'_>,
    edges: &SvmSlice<u64>,
    rows: &SvmSlice<u64>,
) -> Result<(), CliError> {
    let n = rows.len() as u64 - 1;
    let window = context.vram / 4 / 8;
    let counts = rows.device_ptr();
    context
        .progress
        .stage("counting degrees", n.div_ceil(window));
    for start in (0..n).step_by(index(window)) {
        for_each_end(
            context,
            edges,
            start..n.min(start + window),
            move |lane, from, _| {
                lane.atomic_add(counts.add(index(from) + 1), 1_u64)
                    .map(drop)
            },
        )?;
    }
    Ok(())
}

/// Calls `work` on the device for both ends `from` of every edge, if in the window and not a loop, with
/// the other end.
fn for_each_end(
    context: &Context<'_>,
    edges: &SvmSlice<u64>,
    window: Range<u64>,
    work: impl Fn(&mut Lane<'_>, u64, u64) -> Result<(), LaneError> + Send + Sync + 'static,
) -> Result<(), CliError> {
    let (list, words) = (edges.device_ptr(), edges.len());
    let kernel = move |lane: &mut Lane<'_>| {
        let mut tile = [0_u64; 2 * TILE];
        for &[u, v] in load_edges(lane, list, words, &mut tile)? {
            for (from, to) in [(u, v), (v, u)] {
                if u != v && window.contains(&from) {
                    work(lane, from, to)?;
                }
            }
        }
        Ok(())
    };
    // SAFETY: the edge list lives while the launch is waited for here, and so does what `work` writes
    // to: both callers hold it. The CPU touches neither meanwhile.
    unsafe { context.launch(words.div_ceil(2 * TILE), kernel) }?;
    context.progress.step(1);
    Ok(())
}

/// The edges of this lane.
fn load_edges<'t>(
    lane: &mut Lane<'_>,
    list: SvmPtr<u64>,
    words: usize,
    tile: &'t mut [u64; 2 * TILE],
) -> Result<&'t [[u64; 2]], LaneError> {
    let start = lane.id() * tile.len();
    let len = tile.len().min(words - start);
    lane.load_tile(list.add(start), &mut tile[..len])?;
    Ok(tile[..len].as_chunks().0)
}

fn narrow(vertex: u64) -> u32 {
    u32::try_from(vertex).expect("sources have fewer vertices")
}
