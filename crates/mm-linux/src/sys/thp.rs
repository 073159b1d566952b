//! The system's setting for transparent huge pages.

use core::fmt;
use std::fs;

const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// When anonymous memory gets huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thp {
    /// Wherever they fit.
    Always,
    /// Where they were asked for.
    Madvise,
    /// Nowhere, or the kernel has none.
    Never,
}

impl Thp {
    /// The setting now.
    pub(crate) fn read() -> Self {
        fs::read_to_string(SETTING).map_or(Self::Never, |text| Self::parse(&text))
    }

    /// The file lists all settings and has the one in force in brackets.
    fn parse(text: &str) -> Self {
        if text.contains("[always]") {
            Self::Always
        } else if text.contains("[madvise]") {
            Self::Madvise
        } else {
            Self::Never
        }
    }
}

impl fmt::Display for Thp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Always => "always",
            Self::Madvise => "madvise",
            Self::Never => "never",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_setting_is_the_one_in_brackets() {
        for (text, want) in [
            ("[always] madvise never\n", Thp::Always),
            ("always [madvise] never\n", Thp::Madvise),
            ("always madvise [never]\n", Thp::Never),
            ("", Thp::Never),
        ] {
            assert_eq!(Thp::parse(text), want, "{text:?}");
        }
    }
}
