//! A setting of the system, put back afterwards.

use crate::hmm_selftests::Failed;
use std::path::{Path, PathBuf};

/// What a setting was before.
#[derive(Debug)]
pub(crate) struct Setting {
    path: PathBuf,
    before: String,
}

impl Setting {
    /// What it is. Of a choice, the word that is chosen.
    pub(crate) fn read(path: &Path) -> Result<String, Failed> {
        let text = std::fs::read_to_string(path).map_err(|error| Failed::Run {
            what: "reading a setting of the system",
            error,
        })?;
        let chosen = text
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'));
        Ok(chosen.map_or(text.trim(), |(word, _)| word).to_owned())
    }

    /// Sets it.
    pub(crate) fn set(path: &Path, value: &str) -> Result<Self, Failed> {
        let before = Self::read(path)?;
        if before != value {
            std::fs::write(path, value).map_err(|error| Failed::Run {
                what: "changing a setting of the system",
                error,
            })?;
        }
        let path = path.to_owned();
        Ok(Self { path, before })
    }

    /// Makes a number larger, if it is smaller.
    pub(crate) fn at_least(path: &Path, least: u64) -> Result<Self, Failed> {
        let now = Self::read(path)?;
        let is_enough = now.parse::<u64>().is_ok_and(|now| now >= least);
        let value = if is_enough { now } else { least.to_string() };
        Self::set(path, &value)
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        // It was allowed a moment ago; if it is not any more, there is nothing to be done about it.
        if Self::read(&self.path).is_ok_and(|now| now != self.before) {
            let _ = std::fs::write(&self.path, &self.before);
        }
    }
}
