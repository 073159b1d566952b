//! The rules by which Graph500 validates a search, checked against the edge list the graph came from.
//!
//! 1. The root is its own parent, on level 0.
//! 2. Every other vertex of the tree is one level below its parent; so there is no cycle.
//! 3. A vertex and its parent are joined by an edge of the graph.
//! 4. Every edge of the graph joins vertices whose levels differ by one at most.
//! 5. No edge leaves the tree: it spans exactly the component of the root.
//!
//! A tree that keeps all of them gives every vertex its distance from the root.

use super::{NONE, index};

/// What a search returned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tree<'a> {
    /// Where the search began.
    pub(crate) root: u32,
    /// The parent of each vertex, or [`NONE`].
    pub(crate) parents: &'a [u32],
    /// The level of each vertex, or [`NONE`].
    pub(crate) levels: &'a [u32],
}

/// A rule that does not hold, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Broken {
    /// Rule 1.
    #[error("the root {root} is not its own parent on level 0")]
    Root {
        /// The root.
        root: u32,
    },
    /// Only one of parent and level is there, or the parent is no vertex.
    #[error("vertex {vertex} has parent {parent} and level {level}")]
    Entry {
        /// The vertex.
        vertex: usize,
        /// As found.
        parent: u32,
        /// As found.
        level: u32,
    },
    /// Rule 2.
    #[error("vertex {vertex} is on level {level}, its parent {parent} on level {parent_level}")]
    Step {
        /// The vertex.
        vertex: usize,
        /// Its level.
        level: u32,
        /// Its parent.
        parent: u32,
        /// Its parent's level.
        parent_level: u32,
    },
    /// Rule 3.
    #[error("vertex {vertex} has parent {parent}, and no edge joins them")]
    NoSuchEdge {
        /// The vertex.
        vertex: usize,
        /// Its parent.
        parent: u32,
    },
    /// Rule 4.
    #[error("edge {u} - {v} joins level {level_u} and level {level_v}")]
    LongEdge {
        /// One end.
        u: u64,
        /// The other end.
        v: u64,
        /// The level of `u`.
        level_u: u32,
        /// The level of `v`.
        level_v: u32,
    },
    /// Rule 5.
    #[error("edge {u} - {v} leaves the tree: only one end was reached")]
    Leaves {
        /// One end.
        u: u64,
        /// The other end.
        v: u64,
    },
}

/// Checks all rules.
pub(crate) fn validate(tree: Tree<'_>, edges: &[[u64; 2]]) -> Result<(), Broken> {
    root(tree)?;
    for vertex in 0..tree.parents.len() {
        step(tree, vertex)?;
    }
    let mut joined = vec![false; tree.parents.len()];
    for &edge in edges {
        levels_of(tree, edge)?;
        mark_tree_edge(tree, edge, &mut joined);
    }
    let lone = |&v: &usize| tree.parents[v] != NONE && v != index(tree.root) && !joined[v];
    match (0..joined.len()).find(lone) {
        Some(vertex) => Err(Broken::NoSuchEdge {
            vertex,
            parent: tree.parents[vertex],
        }),
        None => Ok(()),
    }
}

fn root(
    Tree {
        root,
        parents,
        levels,
    }: Tree<'_>,
) -> Result<(), Broken> {
    let is_root = parents[index(root)] == root && levels[index(root)] == 0;
    if is_root {
        Ok(())
    } else {
        Err(Broken::Root { root })
    }
}

fn step(tree: Tree<'_>, vertex: usize) -> Result<(), Broken> {
    let (parent, level) = (tree.parents[vertex], tree.levels[vertex]);
    if (parent, level) == (NONE, NONE) || vertex == index(tree.root) {
        return Ok(());
    }
    let Some(&parent_level) = tree.levels.get(index(parent)).filter(|_| level != NONE) else {
        return Err(Broken::Entry {
            vertex,
            parent,
            level,
        });
    };
    match parent_level.checked_add(1) == Some(level) {
        true => Ok(()),
        false => Err(Broken::Step {
            vertex,
            level,
            parent,
            parent_level,
        }),
    }
}

fn levels_of(tree: Tree<'_>, [u, v]: [u64; 2]) -> Result<(), Broken> {
    let (level_u, level_v) = (tree.levels[index(u)], tree.levels[index(v)]);
    if (level_u == NONE) != (level_v == NONE) {
        return Err(Broken::Leaves { u, v });
    }
    match level_u.abs_diff(level_v) <= 1 {
        true => Ok(()),
        false => Err(Broken::LongEdge {
            u,
            v,
            level_u,
            level_v,
        }),
    }
}

fn mark_tree_edge(tree: Tree<'_>, [u, v]: [u64; 2], joined: &mut [bool]) {
    for (child, parent) in [(u, v), (v, u)] {
        if u64::from(tree.parents[index(child)]) == parent {
            joined[index(child)] = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    //      1 --- 3          6 (alone)
    //     / \   /
    //    0   \ /     4 --- 5 (another component)
    //     \   2
    //      '-'
    const EDGES: [[u64; 2]; 7] = [[0, 1], [2, 0], [1, 2], [1, 3], [3, 2], [4, 5], [3, 3]];
    const PARENTS: [u32; 7] = [0, 0, 0, 1, NONE, NONE, NONE];
    const LEVELS: [u32; 7] = [0, 1, 1, 2, NONE, NONE, NONE];

    fn check(parents: [u32; 7], levels: [u32; 7]) -> Result<(), Broken> {
        validate(
            Tree {
                root: 0,
                parents: &parents,
                levels: &levels,
            },
            &EDGES,
        )
    }

    /// The good tree with one vertex changed.
    fn with(vertex: usize, parent: u32, level: u32) -> Result<(), Broken> {
        let (mut parents, mut levels) = (PARENTS, LEVELS);
        (parents[vertex], levels[vertex]) = (parent, level);
        check(parents, levels)
    }

    #[test]
    fn a_good_tree() {
        assert_eq!(check(PARENTS, LEVELS), Ok(()));
        assert_eq!(with(3, 2, 2), Ok(()), "either parent will do");
    }

    #[test]
    fn root_is_its_own_parent_on_level_0() {
        assert_eq!(with(0, 1, 0), Err(Broken::Root { root: 0 }));
        assert_eq!(with(0, 0, 1), Err(Broken::Root { root: 0 }));
        assert_eq!(with(0, NONE, NONE), Err(Broken::Root { root: 0 }));
    }

    #[test]
    fn parent_and_level_belong_together() {
        for (parent, level) in [(1, NONE), (NONE, 2), (7, 2)] {
            assert_eq!(
                with(3, parent, level),
                Err(Broken::Entry {
                    vertex: 3,
                    parent,
                    level
                })
            );
        }
    }

    #[test]
    fn one_level_below_the_parent() {
        let broken = Broken::Step {
            vertex: 3,
            level: 3,
            parent: 1,
            parent_level: 1,
        };
        assert_eq!(with(3, 1, 3), Err(broken));
        let broken = Broken::Step {
            vertex: 3,
            level: 2,
            parent: 4,
            parent_level: NONE,
        };
        assert_eq!(with(3, 4, 2), Err(broken));
    }

    #[test]
    fn a_cycle_cannot_step_down_everywhere() {
        let parents = [0, 0, 0, 1, 5, 4, NONE];
        let levels = [0, 1, 1, 2, 2, 1, NONE];
        let broken = Broken::Step {
            vertex: 5,
            level: 1,
            parent: 4,
            parent_level: 2,
        };
        assert_eq!(check(parents, levels), Err(broken));
        let own_parent = Broken::Step {
            vertex: 6,
            level: 1,
            parent: 6,
            parent_level: 1,
        };
        assert_eq!(with(6, 6, 1), Err(own_parent));
    }

    #[test]
    fn tree_edges_are_edges_of_the_graph() {
        assert_eq!(
            with(6, 0, 1),
            Err(Broken::NoSuchEdge {
                vertex: 6,
                parent: 0
            })
        );
    }

    #[test]
    fn no_edge_is_longer_than_one_level() {
        let edges = [[0, 1], [1, 2], [2, 3], [3, 0]];
        let tree = Tree {
            root: 0,
            parents: &[0, 0, 1, 2],
            levels: &[0, 1, 2, 3],
        };
        let broken = Broken::LongEdge {
            u: 3,
            v: 0,
            level_u: 3,
            level_v: 0,
        };
        assert_eq!(validate(tree, &edges), Err(broken));
    }

    #[test]
    fn the_whole_component_is_spanned() {
        assert_eq!(with(3, NONE, NONE), Err(Broken::Leaves { u: 1, v: 3 }));
    }
}
