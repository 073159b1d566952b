//! The report of `gpusvm doctor`: one aligned line for each fact, then the rung.

use super::{Capabilities, Presence};
use crate::sys::uffd::{Features, OpenError};
use core::fmt;

/// The width of the names.
const NAMES: usize = 28;

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rung = self.best_rung();
        line(f, "kernel", &self.kernel)?;
        line(f, "effective user", &self.euid)?;
        line(f, "CAP_SYS_PTRACE", &yes(self.sys_ptrace))?;
        line(f, "CAP_IPC_LOCK", &yes(self.ipc_lock))?;
        line(
            f,
            "vm.unprivileged_userfaultfd",
            &OrAbsent(self.unprivileged_userfaultfd),
        )?;
        line(f, "/dev/userfaultfd", &self.device)?;
        offers(f, "userfaultfd, full", &self.full)?;
        offers(f, "userfaultfd, user mode", &self.user_mode)?;
        line(
            f,
            "fork events",
            &if self.fork_events {
                "granted"
            } else {
                "not granted"
            },
        )?;
        line(f, "PAGEMAP_SCAN", &yes(self.pagemap_scan))?;
        line(f, "PROCMAP_QUERY", &yes(self.procmap_query))?;
        line(f, "membarrier", &yes(self.membarrier))?;
        line(f, "transparent huge pages", &self.thp)?;
        line(f, "vm.max_map_count", &OrAbsent(self.max_map_count))?;
        match self.memlock {
            Some(limit) => line(f, "RLIMIT_MEMLOCK", &limit)?,
            None => line(f, "RLIMIT_MEMLOCK", &"unlimited")?,
        }
        writeln!(f)?;
        writeln!(f, "rung {} of 4: {}", rung.number(), rung.description())?;
        writeln!(f, "  lost:   {}", rung.lost())?;
        writeln!(f, "  better: {}", rung.advice())
    }
}

fn line(f: &mut fmt::Formatter<'_>, name: &str, value: &dyn fmt::Display) -> fmt::Result {
    writeln!(f, "{name:NAMES$} {value}")
}

fn offers(
    f: &mut fmt::Formatter<'_>,
    name: &str,
    offered: &Result<Features, OpenError>,
) -> fmt::Result {
    match offered {
        Ok(features) => line(f, name, features),
        Err(error) => {
            line(f, name, &"refused")?;
            error
                .attempts
                .iter()
                .flatten()
                .try_for_each(|attempt| line(f, "", attempt))
        }
    }
}

const fn yes(there: bool) -> &'static str {
    if there { "yes" } else { "no" }
}

struct OrAbsent(Option<u64>);

impl fmt::Display for OrAbsent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(value) => write!(f, "{value}"),
            None => f.write_str("absent"),
        }
    }
}

impl fmt::Display for Presence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Absent => "absent",
            Self::Denied => "present, not ours to open",
            Self::Allowed => "present, may be opened",
        })
    }
}
