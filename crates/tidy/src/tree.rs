//! The files of the checkout.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A text file of the checkout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// From the root on, with slashes.
    pub path: String,
    /// What is in it.
    pub text: String,
}

impl File {
    /// The crate it belongs to, by its folder: `mm-linux`. `None` outside of `crates`.
    pub fn krate(&self) -> Option<&str> {
        self.path.strip_prefix("crates/")?.split('/').next()
    }

    /// Whether it is source of a crate, not a test, benchmark or example of it.
    pub fn is_source(&self) -> bool {
        self.is_rust() && self.path.split('/').nth(2) == Some("src")
    }

    /// Whether it is Rust.
    pub fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Whether it is a page.
    pub fn is_page(&self) -> bool {
        self.path.ends_with(".md")
    }

    /// Its lines, numbered from one.
    pub fn numbered(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.text.lines())
    }

    /// A finding in it, as editors like to read it.
    pub fn at(&self, line: usize, what: &str) -> String {
        format!("{}:{line}: {what}", self.path)
    }
}

/// The text files of the checkout.
#[derive(Clone, Debug)]
pub struct Tree {
    root: PathBuf,
    files: Vec<File>,
}

impl Tree {
    /// What git would commit, or, where there is no checkout, everything but hidden and built files.
    pub fn read() -> Self {
        let root = root();
        let mut paths = by_git(&root).unwrap_or_else(|| by_walking(&root));
        paths.sort();
        let file = |path: String| {
            // Binary files, and files that were deleted but not committed, have no text to check.
            let text = fs::read_to_string(root.join(&path)).ok()?;
            Some(File { path, text })
        };
        let files = paths.into_iter().filter_map(file).collect();
        Self { root, files }
    }

    /// All of them, by path.
    pub fn files(&self) -> &[File] {
        &self.files
    }

    /// Rust files of crates.
    pub fn rust(&self) -> impl Iterator<Item = &File> {
        self.files
            .iter()
            .filter(|file| file.is_rust() && file.krate().is_some())
    }

    /// The source of crates, without tests.
    pub fn sources(&self) -> impl Iterator<Item = &File> {
        self.rust().filter(|file| file.is_source())
    }

    /// The crates, by their folder.
    pub fn crates(&self) -> BTreeSet<&str> {
        self.files.iter().filter_map(File::krate).collect()
    }

    /// The file with this path.
    pub fn file(&self, path: &str) -> Option<&File> {
        self.files.iter().find(|file| file.path == path)
    }

    /// Whether there is a file or folder at this path, or a file whose path ends with it.
    pub fn has(&self, path: &str) -> bool {
        let path = path.trim_end_matches('/');
        let ends_with = |file: &File| {
            file.path
                .strip_suffix(path)
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
        };
        self.root.join(path).exists() || self.files.iter().any(ends_with)
    }
}

/// The root of the workspace: where cargo runs the tests, which need not be where they were built.
pub fn root() -> PathBuf {
    let built = || env!("CARGO_MANIFEST_DIR").to_owned();
    let here = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| built()));
    here.ancestors().nth(2).unwrap_or(&here).to_path_buf()
}

fn by_git(root: &Path) -> Option<Vec<String>> {
    if !root.join(".git").exists() {
        return None;
    }
    let listed = Command::new("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .current_dir(root)
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    let text = String::from_utf8(listed.stdout).ok()?;
    Some(text.split_terminator('\0').map(str::to_owned).collect())
}

fn by_walking(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        for path in entries.map(|entry| entry.path()) {
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            if name == "target" || name == ".git" {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if let Some(path) = path.strip_prefix(root).ok().and_then(Path::to_str) {
                found.push(path.to_owned());
            }
        }
    }
    found
}
