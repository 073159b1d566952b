//! What was walked: the steps of a recording that belong to a walk, as lines.

use gpusvm_sync::walk::Step;
use std::collections::BTreeMap;
use std::fmt;

/// One line: how deep, which file, which function.
pub(crate) type Line = (usize, String, String);

/// The steps of a walk.
#[derive(Debug)]
pub(crate) struct Trace(Vec<Line>);

impl Trace {
    /// Of `steps`, what is called by one of `roots`, wherever in its thread that stands: other threads,
    /// and what leads to a root, are left out. What begins first stands first, and whole, also where
    /// threads overlap. What is repeated is one step, and a second look that finds nothing is none.
    pub(crate) fn of(steps: &[Step], roots: &[(&str, &str)]) -> Self {
        let mut parts: Vec<Vec<Line>> = Vec::new();
        // For each thread, which part it is in, and how deep that begins.
        let mut now_in: BTreeMap<usize, (usize, usize)> = BTreeMap::new();
        for step in steps {
            let known = now_in.get(&step.thread).copied();
            let known = known.filter(|(_, root)| step.depth > *root);
            if known.is_none() && !is_one_of(roots, step) {
                now_in.remove(&step.thread);
                continue;
            }
            let (part, root) = known.unwrap_or_else(|| {
                parts.push(Vec::new());
                (parts.len() - 1, step.depth)
            });
            now_in.insert(step.thread, (part, root));
            let (file, function) = (step.file.to_owned(), step.function.to_owned());
            parts[part].push((step.depth - root, file, function));
        }
        let found_more = |part: &[Line]| {
            let same = |other: &&Vec<Line>| other[0] == part[0] && other.len() > part.len();
            parts.iter().any(|other| same(&other))
        };
        let kept = parts.iter().filter(|part| !found_more(part));
        Self(without_repetitions(kept.flatten().cloned().collect()))
    }

    pub(crate) fn lines(&self) -> Vec<Line> {
        self.0.clone()
    }
}

/// Whether the step is in a file, and of a function, that is named.
fn is_one_of(roots: &[(&str, &str)], step: &Step) -> bool {
    let named =
        |(file, function): &(&str, &str)| step.file.ends_with(file) && step.function == *function;
    roots.iter().any(named)
}

/// Drops every subtree that equals the one before it.
fn without_repetitions(mut lines: Vec<Line>) -> Vec<Line> {
    let mut at = 0;
    while at < lines.len() {
        let end = end_of(&lines, at);
        let next = end_of(&lines, end);
        if next > end && lines[at..end] == lines[end..next] {
            lines.drain(end..next);
        } else {
            at += 1;
        }
    }
    lines
}

/// Where the subtree that begins at `at` ends.
fn end_of(lines: &[Line], at: usize) -> usize {
    let Some((depth, ..)) = lines.get(at) else {
        return at;
    };
    let deeper = lines[at + 1..].iter().take_while(|line| line.0 > *depth);
    at + 1 + deeper.count()
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (depth, file, function) in &self.0 {
            writeln!(f, "{:indent$}{file:<44} {function}", "", indent = 2 * depth)?;
        }
        Ok(())
    }
}
