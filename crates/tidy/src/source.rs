//! What a Rust file must and must not have.

use crate::tree::File;
use std::collections::BTreeSet;

/// A file longer than this is a failure.
pub const MOST_LINES: usize = 600;
/// A file longer than this is worth a thought.
pub const MANY_LINES: usize = 400;

/// Whether a crate says `#![attribute]`.
pub fn says(root: &File, attribute: &str) -> bool {
    let wanted = format!("#![{attribute}]");
    root.text.lines().any(|line| line.trim() == wanted)
}

/// The words of a text: what could be a name in Rust.
pub fn words(text: &str) -> impl Iterator<Item = &str> {
    let is_other = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    text.split(is_other).filter(|word| !word.is_empty())
}

/// The names of the functions of a file.
pub fn functions(file: &File) -> BTreeSet<&str> {
    let name = |line| {
        let mut words = words(line);
        words.find(|word| *word == "fn")?;
        words.next()
    };
    let code = file
        .text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    code.filter_map(name).collect()
}

/// The places where a word is, in code or comments.
pub fn word_places(file: &File, wanted: &str) -> Vec<String> {
    let found = file
        .numbered()
        .filter(|(_, line)| words(line).any(|word| word == wanted));
    found.map(|(at, _)| file.at(at, wanted)).collect()
}

/// The places where a text is.
pub fn text_places(file: &File, wanted: &str) -> Vec<String> {
    let found = file.numbered().filter(|(_, line)| line.contains(wanted));
    found.map(|(at, _)| file.at(at, wanted)).collect()
}

/// The lines with a character that `is_bad`.
pub fn lines_with(file: &File, is_bad: impl Fn(char) -> bool) -> Vec<String> {
    let found = file.numbered().filter(|(_, line)| line.contains(&is_bad));
    found.map(|(at, line)| file.at(at, line.trim())).collect()
}

/// `unsafe impl` without a reason above it, `unsafe fn` and `unsafe trait` without `# Safety` in
/// their documentation. Methods of a trait's `impl` have the trait's; functions with a foreign ABI
/// have callers that read no documentation.
pub fn undocumented_unsafe(file: &File) -> Vec<String> {
    let lines: Vec<&str> = file.text.lines().collect();
    let wants = |at: usize| {
        let line = without_qualifiers(lines[at].trim_start());
        let is_method = line.starts_with("unsafe fn") && !is_in_trait_impl(&lines, at);
        if line.starts_with("unsafe impl") {
            Some("SAFETY:")
        } else if line.starts_with("unsafe trait") || is_method {
            Some("# Safety")
        } else {
            None
        }
    };
    let lacks = |at: &usize| {
        wants(*at).is_some_and(|wanted| !above(&lines, *at).any(|line| line.contains(wanted)))
    };
    let found = (0..lines.len()).filter(lacks);
    found.map(|at| file.at(at + 1, lines[at].trim())).collect()
}

/// The locks that a file declares, as fields and statics, outside of its tests.
pub fn locks(file: &File) -> Vec<String> {
    const KINDS: [&str; 3] = ["Mutex<", "RwLock<", "OnceLock<"];
    let code = file
        .numbered()
        .take_while(|(_, line)| line.trim() != "#[cfg(test)]");
    let declares = |line: &str| {
        let line = line.trim_start();
        let is_code = !line.starts_with("//") && !line.starts_with("impl");
        is_code && !line.contains("fn ") && KINDS.iter().any(|kind| is_declared(line, kind))
    };
    let found = code.filter(|(_, line)| declares(line));
    found.map(|(at, line)| file.at(at, line.trim())).collect()
}

/// As the type of a field or a static: `name: Mutex<`, or in a tuple or array: `(Mutex<`, `([Mutex<`.
fn is_declared(line: &str, kind: &str) -> bool {
    line.match_indices(kind).any(|(at, _)| {
        let before = line[..at].trim_end_matches('[');
        before.ends_with(": ") || before.ends_with('(')
    })
}

/// The comments and attributes right above a line.
fn above<'a>(lines: &'a [&'a str], at: usize) -> impl Iterator<Item = &'a str> {
    let ends = move |line: &str| line.is_empty() || line.ends_with(['}', '{', ';']);
    let belongs = move |line: &&str| line.starts_with("//") || !ends(line);
    lines[..at]
        .iter()
        .rev()
        .map(|line| line.trim())
        .take_while(belongs)
}

fn without_qualifiers(mut line: &str) -> &str {
    if let Some(rest) = line.strip_prefix("pub") {
        line = rest.trim_start();
        if line.starts_with('(') {
            line = line
                .split_once(')')
                .map_or(line, |(_, rest)| rest.trim_start());
        }
    }
    line.strip_prefix("const ").unwrap_or(line)
}

/// Whether the block around a line is `impl .. for ..`.
fn is_in_trait_impl(lines: &[&str], at: usize) -> bool {
    let indent = |line: &str| line.len() - line.trim_start().len();
    let mine = indent(lines[at]);
    let outside = lines[..at]
        .iter()
        .rev()
        .filter(|line| !line.trim().is_empty() && indent(line) < mine);
    let header = outside.map(|line| line.trim_start()).find(|line| {
        [
            "impl",
            "unsafe impl",
            "trait",
            "pub trait",
            "mod",
            "pub mod",
        ]
        .iter()
        .any(|keyword| line.starts_with(keyword))
    });
    header.is_some_and(|line| line.contains("impl") && line.contains(" for "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> File {
        File {
            path: "crates/x/src/lib.rs".to_owned(),
            text: text.to_owned(),
        }
    }

    #[test]
    fn unsafe_items_want_their_reasons() {
        let good = [
            "/// Does it.",
            "///",
            "/// # Safety",
            "///",
            "/// As it says.",
            "#[expect(",
            "    unsafe_code,",
            "    reason = \"a promise\"",
            ")]",
            "pub(crate) unsafe fn f() {}",
            "// SAFETY: atomics.",
            "unsafe impl Send for X {}",
            "unsafe impl GlobalAlloc for X {",
            "    unsafe fn alloc() {}",
            "}",
        ];
        let found = undocumented_unsafe(&file(&good.join("\n")));
        assert_eq!(
            found,
            ["crates/x/src/lib.rs:13: unsafe impl GlobalAlloc for X {"]
        );
        let bad =
            "impl X {\n    /// Does it.\n    pub const unsafe fn f() {}\n}\nunsafe trait T {}\n";
        assert_eq!(undocumented_unsafe(&file(bad)).len(), 2);
    }

    #[test]
    fn locks_are_found_where_they_are_declared() {
        let text = "struct A {\n    list: RwLock<Vec<u8>>,\n    // a: Mutex<u8>,\n}\n\
                    struct B(Mutex<u8>);\nstruct C([OnceLock<u8>; 4]);\n\
                    static D: Mutex<u8> = Mutex::new(0);\nfn f(x: Mutex<u8>) {}\n\
                    impl Deref for Mutex<u8> {}\n#[cfg(test)]\nstatic E: Mutex<u8>;\n";
        assert_eq!(locks(&file(text)).len(), 4);
    }

    #[test]
    fn words_and_functions() {
        let text = "fn a() { b::c(1) }\n// fn d\n    pub(crate) fn e<T>() {}\n";
        let found = words(text).take(4).collect::<Vec<_>>();
        assert_eq!(found, ["fn", "a", "b", "c"]);
        assert_eq!(functions(&file(text)), BTreeSet::from(["a", "e"]));
    }
}
