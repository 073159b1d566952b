//! What a page names.

use crate::source::words;
use crate::tree::File;

/// What stands between backticks outside of fenced blocks, with its line.
pub fn names(page: &File) -> Vec<(usize, &str)> {
    let prose = lines(page).filter(|(_, _, fenced)| !fenced);
    prose
        .flat_map(|(at, line, _)| {
            line.split('`')
                .skip(1)
                .step_by(2)
                .map(move |name| (at, name))
        })
        .collect()
}

/// The targets of links to other files of the checkout, with their line.
pub fn links(page: &File) -> Vec<(usize, &str)> {
    let prose = lines(page).filter(|(_, _, fenced)| !fenced);
    let targets = prose.flat_map(|(at, line, _)| {
        let ends = line.split("](").skip(1);
        ends.filter_map(move |rest| Some((at, rest.split(')').next()?)))
    });
    let is_file = |target: &str| !target.contains("://") && !target.starts_with('#');
    let file = |target: &'_ str| target.find('#').unwrap_or(target.len());
    targets
        .filter(|(_, target)| is_file(target))
        .map(|(at, target)| (at, &target[..file(target)]))
        .collect()
}

/// The steps of traces: lines of fenced blocks that begin with the path of a Rust file, and name a
/// function of it. As line, path, function.
pub fn steps(page: &File) -> Vec<(usize, &str, &str)> {
    let fenced = lines(page).filter(|(_, _, fenced)| *fenced);
    fenced
        .filter_map(|(at, line, _)| {
            let mut parts = line.split_whitespace();
            let path = parts.next().filter(|path| path.starts_with("crates/"))?;
            Some((at, path, parts.next()?))
        })
        .collect()
}

/// The rows of the tables of a page whose first column has this title: line, and cells.
pub fn rows<'a>(page: &'a File, title: &str) -> Vec<(usize, Vec<&'a str>)> {
    let mut found = Vec::new();
    let mut inside = false;
    for (at, line, _) in lines(page) {
        let Some(row) = line
            .strip_prefix('|')
            .and_then(|line| line.strip_suffix('|'))
        else {
            inside = false;
            continue;
        };
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let is_rule = cells
            .iter()
            .all(|cell| cell.chars().all(|c| c == '-' || c == ':'));
        if inside && !is_rule {
            found.push((at, cells));
        } else if cells.first() == Some(&title) {
            inside = true;
        }
    }
    found
}

/// Whether a name looks like a path of the checkout: `crates/x`, `folder/file.rs`.
pub fn is_path(name: &str) -> bool {
    let is_plain = name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c));
    let leads_somewhere = name.starts_with("crates/") || name.starts_with("docs/");
    is_plain && (leads_somewhere || (name.contains('/') && name.ends_with(".rs")))
}

/// The last word of a name of an item: `c` of `a::b::c()`. `None` when it is no such name.
pub fn item(name: &str) -> Option<&str> {
    let name = name.strip_suffix("()").unwrap_or(name);
    let is_item = !name.is_empty() && name.split("::").all(|part| words(part).eq([part]));
    is_item.then(|| name.rsplit("::").next()).flatten()
}

/// Lines, numbered, and whether each is in a fenced block.
fn lines(page: &File) -> impl Iterator<Item = (usize, &str, bool)> {
    let mut fenced = false;
    page.numbered().map(move |(at, line)| {
        let is_fence = line.trim_start().starts_with("```");
        fenced ^= is_fence;
        (at, line, fenced || is_fence)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(text: &str) -> File {
        File {
            path: "a.md".to_owned(),
            text: text.to_owned(),
        }
    }

    #[test]
    fn names_links_and_steps() {
        let page = page(
            "See `a::b` and `c`, [d](docs/d.md#e), [f](https://f), [g](#g).\n\
             ```text\n`h`\ncrates/x/src/y.rs  z  does it\n```\n`i`\n",
        );
        assert_eq!(names(&page), [(1, "a::b"), (1, "c"), (6, "i")]);
        assert_eq!(links(&page), [(1, "docs/d.md")]);
        assert_eq!(steps(&page), [(4, "crates/x/src/y.rs", "z")]);
    }

    #[test]
    fn tables_by_their_first_column() {
        let page = page("| a | b |\n|---|---|\n| 1 | 2 |\n\n| c |\n|---|\n| 3 |\n| 4 |\n");
        assert_eq!(rows(&page, "c"), [(7, vec!["3"]), (8, vec!["4"])]);
        assert_eq!(rows(&page, "a"), [(3, vec!["1", "2"])]);
    }

    #[test]
    fn paths_and_items() {
        assert!(is_path("crates/mm/src") && is_path("driver/fault.rs"));
        assert!(!is_path("crates/*/src") && !is_path("fault.rs") && !is_path("and/or"));
        assert_eq!(item("Outbound::commit"), Some("commit"));
        assert_eq!(item("commit()"), Some("commit"));
        assert_eq!(item("cargo test"), None);
        assert_eq!(item("-"), None);
    }
}
