//! Breadth-first search as Graph500 runs it: an edge list becomes a CSR, the CSR is searched from a
//! random root, and the tree is validated.
//!
//! ```text
//!   CPU      write edges          sum up      set root      swap frontiers       validate, compare
//!                |               ^   |            |            ^   |                  ^
//!                v               |   v            v            |   v                  |
//!   device   [edge list] --> degrees, rows --> columns --> levels 1, 2, ... --> parents, levels
//!                '------ build.rs --------------'          '----- search.rs ------'
//! ```
//!
//! All arrows between the two are page faults: both sides use the same pointers to the same memory.
//! The working set is everything in it: the edge list (two 64-bit ids for each edge, as in Graph500),
//! the CSR (64-bit row starts, 32-bit columns) with the write positions that fill it, and parents,
//! levels and three bitmaps. It all stays allocated to the end, where the tree is validated against
//! the edge list.

mod build; // edge list to CSR, on the device
mod search; // the search, on the device

use super::{Fact, Outcome, Verdict, Workload};
use crate::args::BfsArgs;
use crate::error::CliError;
use crate::graph::csr::Csr;
use crate::graph::kronecker::Kronecker;
use crate::graph::validate::{Tree, validate};
use crate::graph::{NONE, Source, index};
use crate::machine::Context;
use crate::random::Random;
use build::Graph;
use search::Search;

/// The workload.
#[derive(Debug)]
pub(crate) struct Bfs {
    source: Source,
}

impl Bfs {
    /// Reads the graph file, if there is one.
    pub(crate) fn new(args: &BfsArgs, seed: u64) -> Result<Self, CliError> {
        let source = match &args.graph {
            Some(path) => Source::open(path)?,
            None => Source::Kronecker(Kronecker::new(args.scale, args.edge_factor, seed)),
        };
        match source.edges() {
            0 => Err(CliError::NoEdges {
                graph: source.to_string(),
            }),
            _ => Ok(Self { source }),
        }
    }
}

impl Workload for Bfs {
    fn name(&self) -> &'static str {
        "bfs"
    }

    fn subject(&self) -> String {
        self.source.to_string()
    }

    fn footprint(&self) -> Option<u64> {
        // An edge: two ids in the list, one place in two rows. A vertex: row start, write position,
        // parent, level; three bits and the ends of the arrays are covered by one more byte and page.
        let edges = self.source.edges().checked_mul(16 + 8)?;
        let vertices = self.source.vertices().checked_mul(8 + 8 + 4 + 4 + 1)?;
        edges.checked_add(vertices)?.checked_add(4096)
    }

    fn run(self: Box<Self>, context: &Context<'_>) -> Result<Outcome, CliError> {
        let graph = Graph::build(context, self.source)?;
        let root = pick_root(graph.csr(), context.seed);
        let search = Search::run(context, &graph, root)?;

        context.progress.open_stage("verifying");
        let verdict = verify(&graph, search.tree());
        Ok(Outcome {
            verdict,
            facts: facts(&graph, &search),
        })
    }
}

/// A random vertex that has neighbours, or the next one that has.
fn pick_root(csr: Csr<'_>, seed: u64) -> u32 {
    let n = csr.vertices();
    let first = index(Random::new(seed, u64::MAX - 1).below(n as u64));
    let root = (first..n).chain(0..first).find(|&v| csr.degree(v) > 0);
    root.map(|v| u32::try_from(v).expect("a vertex"))
        .expect("a graph with edges")
}

/// The CSR against the edge list, the tree against the edge list, the levels against a plain search.
fn verify(graph: &Graph, tree: Tree<'_>) -> Verdict {
    let edges = graph.edges();
    if !graph.csr().holds(edges) {
        return Verdict::Wrong("the CSR does not hold the edges of the list".to_owned());
    }
    if let Err(broken) = validate(tree, edges) {
        return Verdict::Wrong(broken.to_string());
    }
    let expected = graph.csr().levels(tree.root);
    match tree
        .levels
        .iter()
        .zip(&expected)
        .position(|(found, want)| found != want)
    {
        None => Verdict::Verified("CSR, Graph500 rules, levels of a plain search".to_owned()),
        Some(v) => Verdict::Wrong(format!(
            "vertex {v} is on level {}, a plain search finds it on level {}",
            tree.levels[v], expected[v]
        )),
    }
}

fn facts(graph: &Graph, search: &Search) -> Vec<Fact> {
    let csr = graph.csr();
    let reached = || (0..csr.vertices()).filter(|&v| search.tree().parents[v] != NONE);
    let traversed = reached().map(|v| csr.degree(v)).sum::<u64>() / 2;
    vec![
        Fact::count("vertices", "vertices", csr.vertices() as u64),
        Fact::count("edges", "edges", graph.edges().len() as u64),
        Fact::id("root", "root", search.tree().root.into()),
        Fact::count("reached", "reached", reached().count() as u64),
        Fact::count("levels", "levels", search.depth.into()),
        Fact::count("edges_traversed", "traversed edges", traversed),
        Fact::time("build_s", "building", graph.build_time),
        Fact::time("search_s", "searching", search.time),
        Fact::rate("teps", "speed", "MTEPS", (traversed, search.time)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_has_neighbours() {
        let csr = Csr {
            rows: &[0, 0, 0, 1, 1, 1, 2],
            columns: &[5, 2],
        };
        for seed in 0..50 {
            assert!([2, 5].contains(&pick_root(csr, seed)));
        }
    }
}
