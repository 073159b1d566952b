//! The search on the device, level by level.
//!
//! The frontier is a bitmap, and a lane expands the vertices of one of its words: so the device walks
//! rows and columns in ascending order, block after block, and what it writes at random is small.
//!
//! ```text
//!   lane i:  current[i] = 0110..   take the word, leave zero
//!              for each vertex: levels[v] = depth
//!              for each neighbour w: visited[w]? no: claim it (atomic or)
//!                                    parents[w] = v, next[w] = 1
//!   control: depth (CPU -> device), claimed (device -> CPU); the CPU swaps the bitmaps while claimed > 0
//! ```

use super::build::Graph;
use crate::clock::Stopwatch;
use crate::error::CliError;
use crate::graph::validate::Tree;
use crate::graph::{NONE, index};
use crate::machine::Context;
use gpusvm::{Lane, LaneError, SvmPtr, SvmSlice};
use std::time::Duration;

/// Neighbours that a lane loads at once: 1 KiB.
const TILE: usize = 256;

/// Control word: the level of the present frontier.
const DEPTH: usize = 0;
/// Control word: how many vertices the next frontier has.
const CLAIMED: usize = 1;

/// A finished search: a tree in shared memory.
#[derive(Debug)]
pub(super) struct Search {
    root: u32,
    parents: SvmSlice<u32>,
    levels: SvmSlice<u32>,
    /// The number of levels.
    pub(super) depth: u32,
    /// How long it took, the CPU's part included.
    pub(super) time: Duration,
}

impl Search {
    /// Searches the component of the root.
    pub(super) fn run(context: &Context<'_>, graph: &Graph, root: u32) -> Result<Self, CliError> {
        let n = graph.csr().vertices();
        let words = n.div_ceil(64);
        let mut parents = context.alloc::<u32>(n)?;
        let mut levels = context.alloc::<u32>(n)?;
        let mut visited = context.alloc::<u64>(words)?;
        let mut frontiers = [context.alloc::<u64>(words)?, context.alloc::<u64>(words)?];
        let mut control = context.alloc::<u64>(2)?;

        let watch = Stopwatch::start();
        parents.fill(NONE);
        levels.fill(NONE);
        let (root_word, root_bit) = place(root);
        parents[index(root)] = root;
        visited[root_word] |= root_bit;
        frontiers[0][root_word] |= root_bit;
        let mut depth = 0;
        loop {
            context
                .progress
                .open_stage(format!("searching level {depth}"));
            control[DEPTH] = depth.into();
            control[CLAIMED] = 0;
            let kernel = Kernel {
                rows: graph.rows.device_ptr(),
                columns: graph.columns.device_ptr(),
                parents: parents.device_ptr(),
                levels: levels.device_ptr(),
                visited: visited.device_ptr(),
                current: frontiers[0].device_ptr(),
                next: frontiers[1].device_ptr(),
                control: control.device_ptr(),
            };
            // SAFETY: all of this lives until the end of this function or, as the graph and the tree,
            // longer; only the device touches it during the launch.
            unsafe { context.launch(words, move |lane: &mut Lane<'_>| kernel.run(lane)) }?;
            depth += 1;
            if control[CLAIMED] == 0 {
                break;
            }
            frontiers.swap(0, 1);
        }
        Ok(Self {
            root,
            parents,
            levels,
            depth,
            time: watch.elapsed(),
        })
    }

    /// The tree as the CPU sees it.
    pub(super) fn tree(&self) -> Tree<'_> {
        Tree {
            root: self.root,
            parents: &self.parents,
            levels: &self.levels,
        }
    }
}

/// The word and the bit of a vertex in a bitmap.
fn place(vertex: u32) -> (usize, u64) {
    (index(vertex / 64), 1 << (vertex % 64))
}

/// Graph, tree and bitmaps as the device sees them.
#[derive(Clone, Copy)]
struct Kernel {
    rows: SvmPtr<u64>,
    columns: SvmPtr<u32>,
    parents: SvmPtr<u32>,
    levels: SvmPtr<u32>,
    visited: SvmPtr<u64>,
    current: SvmPtr<u64>,
    next: SvmPtr<u64>,
    control: SvmPtr<u64>,
}

impl Kernel {
    /// Expands the vertices of one word of the frontier.
    fn run(self, lane: &mut Lane<'_>) -> Result<(), LaneError> {
        let word = lane.id();
        let mut frontier = lane.load(self.current.add(word))?;
        if frontier == 0 {
            return Ok(());
        }
        lane.store(self.current.add(word), 0)?;
        let depth = narrow(lane.load(self.control.add(DEPTH))?);
        let mut claimed = 0;
        while frontier != 0 {
            let vertex = 64 * word + index(frontier.trailing_zeros());
            frontier &= frontier - 1;
            lane.store(self.levels.add(vertex), depth)?;
            claimed += self.expand(lane, vertex)?;
        }
        if claimed > 0 {
            lane.atomic_add(self.control.add(CLAIMED), claimed)?;
        }
        Ok(())
    }

    /// Claims all neighbours of a vertex that nobody has; says how many.
    fn expand(self, lane: &mut Lane<'_>, vertex: usize) -> Result<u64, LaneError> {
        let start = index(lane.load(self.rows.add(vertex))?);
        let end = index(lane.load(self.rows.add(vertex + 1))?);
        let mut tile = [0_u32; TILE];
        let mut claimed = 0;
        for at in (start..end).step_by(TILE) {
            let tile = &mut tile[..TILE.min(end - at)];
            lane.load_tile(self.columns.add(at), tile)?;
            for &neighbour in &*tile {
                if self.claim(lane, neighbour)? {
                    lane.store(self.parents.add(index(neighbour)), narrow(vertex as u64))?;
                    claimed += 1;
                }
            }
        }
        Ok(claimed)
    }

    /// Whether this lane is the one that found the vertex; it is then in the next frontier.
    fn claim(self, lane: &mut Lane<'_>, vertex: u32) -> Result<bool, LaneError> {
        let (word, bit) = place(vertex);
        // Most neighbours are taken long since: a load finds that out for less than an exchange.
        if lane.load(self.visited.add(word))? & bit != 0
            || lane.atomic_or(self.visited.add(word), bit)? & bit != 0
        {
            return Ok(false);
        }
        lane.atomic_or(self.next.add(word), bit)?;
        Ok(true)
    }
}

fn narrow(number: u64) -> u32 {
    u32::try_from(number).expect("no more than there are vertices")
}
