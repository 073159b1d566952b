//! How much memory there is, so that an absurd size is an error and not the death of the process.
//!
//! The software GPU's memory is memory of this machine, and shared memory is too: a page is in one or in
//! the other.

use crate::error::CliError;
use gpusvm::ByteSize;
use std::fs;

/// Refuses a run that cannot fit.
pub(crate) fn admit(working_set: Option<u64>, vram: ByteSize) -> Result<(), CliError> {
    match available() {
        Some(available) => fits(working_set, vram.get(), available),
        None => Ok(()),
    }
}

/// A working set of `None` is larger than any number.
fn fits(working_set: Option<u64>, vram: u64, available: u64) -> Result<(), CliError> {
    let working_set = working_set.unwrap_or(u64::MAX);
    let needed = working_set.saturating_add(vram);
    match needed <= available {
        true => Ok(()),
        false => Err(CliError::TooLarge {
            working_set,
            vram,
            needed,
            available,
        }),
    }
}

/// What the kernel says can be had, within the limit of the control group; `None` if it does not say.
fn available() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| mem_available(&text));
    let group = fs::read_to_string("/sys/fs/cgroup/memory.max")
        .ok()
        .and_then(|t| t.trim().parse().ok());
    [machine, group].into_iter().flatten().min()
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_when_both_together_do_not_fit() {
        assert!(fits(Some(60), 40, 100).is_ok());
        let error = fits(Some(61 << 20), 40 << 20, 100 << 20).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert_eq!(
            error.to_string(),
            "the run needs 101.00 MiB (61.00 MiB of working set, 40.00 MiB of VRAM), \
             and 100.00 MiB of memory are available"
        );
        for working_set in [None, Some(u64::MAX)] {
            assert!(fits(working_set, u64::MAX, u64::MAX - 1).is_err());
        }
    }

    #[test]
    fn the_line_of_meminfo() {
        let text = "MemTotal:       24 kB\nMemAvailable:   12 kB\n";
        assert_eq!(mem_available(text), Some(12 << 10));
        for broken in ["", "MemAvailable: x kB", "MemAvailable: 12"] {
            assert_eq!(mem_available(broken), None);
        }
    }
}
