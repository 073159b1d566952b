//! The ladder: what can be had, what is lost on each rung, and what leads up.
//!
//! ```text
//!   1  full userfaultfd, MOVE
//!   2  full userfaultfd, write-protect and copy
//!   3  user-mode userfaultfd, as 1 or as 2
//!   4  page protection and signals
//! ```

use crate::sys::uffd::Features;

/// A rung of the capability ladder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rung {
    /// 1: everything.
    Move,
    /// 2: pages are copied instead of moved.
    Copy,
    /// 3: system calls do not wait for pages that are elsewhere.
    UserMode {
        /// Whether pages are moved, as on 1, or copied, as on 2.
        moves: bool,
    },
    /// 4: page protection and SIGSEGV.
    Signals,
}

/// What the choice of a rung rests on: the features of each flavour that opens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offers {
    /// Of a full userfaultfd.
    pub full: Option<Features>,
    /// Of a user-mode one.
    pub user_mode: Option<Features>,
}

/// What it is, in a line.
impl core::fmt::Display for Rung {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.description())
    }
}

impl Rung {
    /// The highest rung that `offers` carry.
    pub fn of(offers: Offers) -> Self {
        // Without MOVE, a page is taken out by write protection.
        let (moves, copies) = (Features::MOVE, Features::WP);
        match (offers.full, offers.user_mode) {
            (Some(full), _) if full.contains(moves) => Self::Move,
            (Some(full), _) if full.contains(copies) => Self::Copy,
            (_, Some(user)) if user.contains(moves) => Self::UserMode { moves: true },
            (_, Some(user)) if user.contains(copies) => Self::UserMode { moves: false },
            _ => Self::Signals,
        }
    }

    /// The rung with this number; of the third, the variant that moves pages.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Move),
            2 => Some(Self::Copy),
            3 => Some(Self::UserMode { moves: true }),
            4 => Some(Self::Signals),
            _ => None,
        }
    }

    /// Whether it can be stood on with `offers`; the last one always can.
    pub fn is_carried_by(self, offers: Offers) -> bool {
        let has = |offered: Option<Features>, wanted| {
            offered.is_some_and(|features| features.contains(wanted))
        };
        match self {
            Self::Move => has(offers.full, Features::MOVE),
            Self::Copy => has(offers.full, Features::WP),
            Self::UserMode { moves: true } => has(offers.user_mode, Features::MOVE),
            Self::UserMode { moves: false } => has(offers.user_mode, Features::WP),
            Self::Signals => true,
        }
    }

    /// Its number: 1 is the highest.
    pub const fn number(self) -> u8 {
        match self {
            Self::Move => 1,
            Self::Copy => 2,
            Self::UserMode { .. } => 3,
            Self::Signals => 4,
        }
    }

    /// What it is, in a line.
    pub const fn description(self) -> &'static str {
        match self {
            Self::Move => "full userfaultfd, pages are moved",
            Self::Copy => "full userfaultfd, pages are write-protected and copied",
            Self::UserMode { moves: true } => "user-mode userfaultfd, pages are moved",
            Self::UserMode { moves: false } => {
                "user-mode userfaultfd, pages are write-protected and copied"
            }
            Self::Signals => "page protection and signals, pages are remapped",
        }
    }

    /// What is lost on it, compared with the highest.
    pub const fn lost(self) -> &'static str {
        match self {
            Self::Move => "nothing",
            Self::Copy => "speed: pages are copied twice instead of moved",
            Self::UserMode { moves: true } => {
                "system calls on buffers that are on a device fail with EFAULT: touch them first"
            }
            Self::UserMode { moves: false } => {
                "system calls on buffers that are on a device fail with EFAULT: touch them first; \
                 pages are copied twice instead of moved"
            }
            Self::Signals => {
                "only memory of the library's own allocator is mirrored; no unmap events; system \
                 calls on buffers that are on a device fail with EFAULT; slower"
            }
        }
    }

    /// How to get to a better one.
    pub const fn advice(self) -> &'static str {
        match self {
            Self::Move => "this is the best there is",
            Self::Copy => "boot Linux 6.8 or later",
            Self::UserMode { moves: true } => PRIVILEGE,
            Self::UserMode { moves: false } => {
                "boot Linux 6.8 or later, and give this user read and write access to \
                 /dev/userfaultfd, or set vm.unprivileged_userfaultfd=1, or grant CAP_SYS_PTRACE"
            }
            Self::Signals => {
                "in a container: pass /dev/userfaultfd in (--device /dev/userfaultfd) or let \
                 seccomp allow the userfaultfd system call; else boot a kernel with \
                 CONFIG_USERFAULTFD, 5.11 or later"
            }
        }
    }
}

const PRIVILEGE: &str = "give this user read and write access to /dev/userfaultfd \
     (setfacl -m u:USER:rw /dev/userfaultfd), or set vm.unprivileged_userfaultfd=1 \
     (sysctl -w vm.unprivileged_userfaultfd=1), or grant CAP_SYS_PTRACE \
     (setcap cap_sys_ptrace+ep PROGRAM)";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offers_to_rung_table() {
        let none = Some(Features::NONE);
        let copy = Some(Features::WP);
        let both = Some(Features::WP | Features::MOVE);
        let moves = Some(Features::MOVE);
        for (full, user_mode, want) in [
            (both, both, Rung::Move),
            (moves, None, Rung::Move),
            (copy, copy, Rung::Copy),
            (copy, None, Rung::Copy),
            (None, both, Rung::UserMode { moves: true }),
            (None, copy, Rung::UserMode { moves: false }),
            (none, none, Rung::Signals),
            (none, None, Rung::Signals),
            (None, none, Rung::Signals),
            (None, None, Rung::Signals),
        ] {
            let offers = Offers { full, user_mode };
            assert_eq!(Rung::of(offers), want, "{full:?} and {user_mode:?}");
            assert!(want.is_carried_by(offers));
            let all = [Rung::Move, Rung::Copy, Rung::UserMode { moves: true }];
            for rung in all {
                let better = rung.number() < want.number();
                assert!(!(better && rung.is_carried_by(offers)), "{rung:?}");
            }
        }
    }

    #[test]
    fn advice_names_what_to_set() {
        let advice = Rung::UserMode { moves: true }.advice();
        for part in [
            "/dev/userfaultfd",
            "vm.unprivileged_userfaultfd=1",
            "CAP_SYS_PTRACE",
        ] {
            assert!(advice.contains(part), "{part} in {advice}");
        }
    }
}
