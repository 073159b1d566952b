//! What ARCHITECTURE.md says about the walks.

use crate::trace::Line;

/// The lines of the walk under `heading`: indentation, file and function; the remark is for readers.
pub(crate) fn walk(heading: &str) -> Vec<Line> {
    let page = include_str!("../../../../ARCHITECTURE.md");
    let (_, section) = page
        .split_once(&format!("\n### {heading}\n"))
        .expect("the page has the walk");
    let (_, block) = section.split_once("```text\n").expect("it has a trace");
    let (block, _) = block.split_once("```").expect("the trace ends");
    block.lines().map(line).collect()
}

fn line(text: &str) -> Line {
    let words = text.trim_start();
    let depth = (text.len() - words.len()) / 2;
    let mut words = words.split_whitespace().map(str::to_owned);
    let (file, function) = (words.next(), words.next());
    (depth, file.expect("a file"), function.expect("a function"))
}
