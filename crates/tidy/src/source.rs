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
    functions_of(&file.text)
}

fn functions_of(text: &str) -> BTreeSet<&str> {
    let name = |line| {
        let mut words = words(line);
        words.find(|word| *word == "fn")?;
        words.next()
    };
    code(text).filter_map(name).collect()
}

/// The lines that are no comments.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
}

/// The name that a line declares.
fn declared(line: &str) -> Option<&str> {
    const KEYWORDS: [&str; 8] = [
        "fn", "struct", "enum", "trait", "type", "const", "static", "mod",
    ];
    let line = without_visibility(line.trim());
    let line = line.strip_prefix("unsafe ").unwrap_or(line);
    let mut rest = words(line);
    let first = rest.next()?;
    if KEYWORDS.contains(&first) {
        return rest.find(|word| !KEYWORDS.contains(word) && *word != "unsafe");
    }
    let after = line.strip_prefix(first)?.trim_start();
    let is_variant = first.starts_with(|c: char| c.is_ascii_uppercase())
        && (after.is_empty() || after.starts_with([',', '(', '{', '=']));
    let is_field = after.starts_with(':') && !after.starts_with("::");
    (is_variant || is_field).then_some(first)
}

/// The names of the tests of a file, and of the functions that its tests call. In `testkit`, which is
/// for tests, every function is one.
pub fn tests(file: &File) -> BTreeSet<&str> {
    let is_all =
        !file.is_source() || file.path.contains("/tests") || file.krate() == Some("testkit");
    let from = if is_all {
        Some(0)
    } else {
        file.text.find("#[cfg(test)]")
    };
    from.map_or_else(BTreeSet::new, |from| functions_of(&file.text[from..]))
}

/// What a file declares: what comes after a keyword, fields and variants. Fields of struct literals
/// look the same.
pub fn items(file: &File) -> BTreeSet<&str> {
    code(&file.text).filter_map(declared).collect()
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

fn without_qualifiers(line: &str) -> &str {
    let line = without_visibility(line);
    line.strip_prefix("const ").unwrap_or(line)
}

fn without_visibility(line: &str) -> &str {
    let Some(rest) = line.strip_prefix("pub") else {
        return line;
    };
    let rest = rest.trim_start();
    let after = rest.strip_prefix('(').and_then(|rest| rest.split_once(')'));
    after.map_or(rest, |(_, rest)| rest.trim_start())
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

    #[test]
    fn items_are_what_is_declared() {
        let text = "//! mod doc\npub mod a;\npub(crate) struct B<T> {\n    pub(crate) c: T,\n}\n\
                    enum D {\n    E(u8),\n    F,\n}\npub const fn g() {\n    let h = i::j();\n}\n\
                    const K: u8 = 1;\n";
        let file = file(text);
        assert_eq!(
            items(&file),
            BTreeSet::from(["a", "B", "c", "D", "E", "F", "g", "K"])
        );
    }

    #[test]
    fn tests_are_functions_of_tests() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n    #[test]\n    fn b() {}\n}\n";
        assert_eq!(tests(&file(text)), BTreeSet::from(["b"]));
        let path = "crates/x/tests/y.rs".to_owned();
        let text = "fn c(world: &World) {}\n".to_owned();
        assert_eq!(tests(&File { path, text }), BTreeSet::from(["c"]));
    }
}
