//! The rules of this repository, as tests.
//!
//! ```text
//!   tree     the files of the checkout
//!     |-- source   what a Rust file must and must not have
//!     `-- pages    what a page names: paths, functions, rows of tables
//!
//!   tests/suite    one test for each rule; a failure lists every place that breaks it
//! ```
//!
//! Nothing depends on this crate. A rule that clippy can check is clippy's.
//!
//! # Non-goals
//!
//! This is no parser. It looks at lines and words, which is enough for code that rustfmt wrote, and
//! errs on the side of a false alarm: whoever meets one makes the rule more exact.
#![forbid(unsafe_code)]

pub mod tree; // the files
pub mod source; // rules of Rust files
pub mod pages; // what pages name

/// Fails with every finding, one a line, and what to do about them.
///
/// # Panics
///
/// When there is a finding.
#[track_caller]
pub fn assert_none(rule: &str, findings: &[String]) {
    assert!(
        findings.is_empty(),
        "{rule}:\n  {}\n",
        findings.join("\n  ")
    );
}
