//! Skip, or fail where there must be no skipping.
//!
//! A test that needs something of the machine says so and returns when it is not there. Where
//! `GPUSVM_REQUIRE_UFFD=1` is set, as in continuous integration, it fails instead: nobody notices a
//! test that is always skipped.

use std::io;

/// The variable that turns skipping into failing.
pub const REQUIRE: &str = "GPUSVM_REQUIRE_UFFD";

/// What a test needs is not there: prints why.
///
/// # Panics
///
/// Where `GPUSVM_REQUIRE_UFFD=1` is set.
pub fn unavailable(reason: &str) {
    let required = std::env::var_os(REQUIRE).is_some_and(|value| value == "1");
    assert!(!required, "{REQUIRE}=1, but {reason}");
    eprintln!("skipped: {reason}");
}

/// Whether there is a userfaultfd for this process, of any flavour; says so if not.
///
/// # Panics
///
/// When there is none, where `GPUSVM_REQUIRE_UFFD=1` is set.
pub fn require_uffd() -> bool {
    match opens() {
        Ok(()) => true,
        Err(error) => {
            unavailable(&format!("no userfaultfd: {error}"));
            false
        }
    }
}

fn opens() -> io::Result<()> {
    /// `UFFD_USER_MODE_ONLY`, the least that there can be.
    const USER_MODE_ONLY: libc::c_int = 1;
    // SAFETY: it takes an integer; no memory is involved.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) };
    let Ok(fd) = libc::c_int::try_from(fd) else {
        return Err(io::Error::other("not a descriptor"));
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: opened above, and nobody else has it.
    unsafe { libc::close(fd) };
    Ok(())
}
