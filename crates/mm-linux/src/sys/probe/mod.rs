//! What this machine offers the process, and which rung of the ladder that makes.
//!
//! ```text
//!   Capabilities::probe()  ->  facts  ->  Rung::of(offers)  ->  report
//! ```
//!
//! Probing opens and closes descriptors and reads settings; it changes nothing.

mod rung; // the ladder
mod report; // the text of `gpusvm doctor`

pub use rung::{Offers, Rung};

use super::thp::Thp;
use super::uffd::{DEVICE, Features, Flavour, OpenError, Uffd};
use super::{futex, pagemap::PageMap, procmap::VmaTable};
use gpusvm_types::ByteSize;
use rustix::fs::Access;
use rustix::process::Resource;
use rustix::thread::CapabilitySet;
use std::fs;

/// What a file is to this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It is not there.
    Absent,
    /// It is there, for others.
    Denied,
    /// It may be opened to read and write.
    Allowed,
}

/// What this machine offers this process.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// The kernel's release.
    pub kernel: String,
    /// The user that we act as.
    pub euid: u32,
    /// Whether we have `CAP_SYS_PTRACE`: a full userfaultfd, and its fork events.
    pub sys_ptrace: bool,
    /// Whether we have `CAP_IPC_LOCK`: memory can be locked without limit.
    pub ipc_lock: bool,
    /// `vm.unprivileged_userfaultfd`, if the kernel has it.
    pub unprivileged_userfaultfd: Option<u64>,
    /// `/dev/userfaultfd`.
    pub device: Presence,
    /// What a full userfaultfd offers, or why there is none.
    pub full: Result<Features, OpenError>,
    /// What a user-mode userfaultfd offers, or why there is none.
    pub user_mode: Result<Features, OpenError>,
    /// Whether fork events are granted, not only offered.
    pub fork_events: bool,
    /// Whether page tables can be scanned in runs.
    pub pagemap_scan: bool,
    /// Whether one mapping can be asked for.
    pub procmap_query: bool,
    /// Whether a barrier can be run on all threads of the process.
    pub membarrier: bool,
    /// When memory gets huge pages.
    pub thp: Thp,
    /// How many mappings a process may have.
    pub max_map_count: Option<u64>,
    /// How much may be locked in RAM, or `None` without limit.
    pub memlock: Option<ByteSize>,
}

impl Capabilities {
    /// Looks at the machine.
    pub fn probe() -> Self {
        let capabilities = rustix::thread::capabilities(None)
            .map_or(CapabilitySet::empty(), |sets| sets.effective);
        Self {
            kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            euid: rustix::process::geteuid().as_raw(),
            sys_ptrace: capabilities.contains(CapabilitySet::SYS_PTRACE),
            ipc_lock: capabilities.contains(CapabilitySet::IPC_LOCK),
            unprivileged_userfaultfd: setting("/proc/sys/vm/unprivileged_userfaultfd"),
            device: presence(DEVICE),
            full: Uffd::offered(Flavour::Full),
            user_mode: Uffd::offered(Flavour::UserModeOnly),
            fork_events: fork_events(),
            pagemap_scan: PageMap::open().is_ok_and(|pagemap| pagemap.has_scan()),
            procmap_query: VmaTable::open().is_ok_and(|table| table.has_query()),
            membarrier: futex::has_membarrier(),
            thp: Thp::read(),
            max_map_count: setting("/proc/sys/vm/max_map_count"),
            memlock: rustix::process::getrlimit(Resource::Memlock)
                .current
                .map(ByteSize::new),
        }
    }

    /// Whether the kernel is of this version, or a later one.
    pub(crate) fn is_at_least(&self, major: u32, minor: u32) -> bool {
        let mut numbers = self.kernel.split(|c: char| !c.is_ascii_digit());
        let mut next = || numbers.next().and_then(|number| number.parse::<u32>().ok());
        (next(), next()) >= (Some(major), Some(minor))
    }

    /// The highest rung that can be stood on here.
    pub fn best_rung(&self) -> Rung {
        Rung::of(self.offers())
    }

    /// Whether a rung can be stood on here.
    ///
    /// # Errors
    ///
    /// What is missing, for people to read.
    pub fn carries(&self, rung: Rung) -> Result<(), String> {
        if rung.is_carried_by(self.offers()) {
            return Ok(());
        }
        let offered = match rung {
            Rung::Move | Rung::Copy => &self.full,
            Rung::UserMode { .. } | Rung::Signals => &self.user_mode,
        };
        Err(match offered {
            Ok(features) => format!("userfaultfd offers no more than {features}"),
            Err(error) => error.to_string(),
        })
    }

    fn offers(&self) -> Offers {
        Offers {
            full: self.full.ok(),
            user_mode: self.user_mode.ok(),
        }
    }
}

fn setting(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn presence(path: &str) -> Presence {
    if rustix::fs::access(path, Access::READ_OK | Access::WRITE_OK).is_ok() {
        Presence::Allowed
    } else if rustix::fs::access(path, Access::EXISTS).is_ok() {
        Presence::Denied
    } else {
        Presence::Absent
    }
}

fn fork_events() -> bool {
    [Flavour::Full, Flavour::UserModeOnly]
        .into_iter()
        .any(|flavour| {
            Uffd::open(flavour, Features::EVENT_FORK)
                .is_ok_and(|uffd| uffd.features().contains(Features::EVENT_FORK))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_is_the_same_twice_and_its_report_names_the_rung() {
        let found = Capabilities::probe();
        assert_eq!(found, Capabilities::probe());
        let report = found.to_string();
        eprintln!("{report}");
        assert!(report.contains(&found.kernel));
        assert!(report.contains(&format!("rung {} of 4", found.best_rung().number())));
        assert!(report.lines().all(|line| !line.ends_with(' ')));
    }
}
