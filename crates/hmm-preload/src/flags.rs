//! FLAGS: what the commands of a file are to meet.

use crate::command::Kind;
use crate::files::File;
use core::sync::atomic::{AtomicU64, Ordering};
use gpusvm::Injection;

/// The next large allocation fails: of device memory for what goes there, of RAM for what comes home.
const FAIL_ALLOC: u64 = 1;

/// The flags of a file. Its commands run one after the other.
#[derive(Debug, Default)]
pub(crate) struct Flags(AtomicU64);

impl Flags {
    /// Those of before are gone.
    pub(crate) fn set(&self, flags: u64) {
        self.0.store(flags, Ordering::Relaxed);
    }
}

/// Runs a command of `file` with what its flags have it meet. A failure that has happened is asked for no more.
pub(crate) fn met(
    file: &File,
    kind: Kind,
    run: impl FnOnce() -> Result<(), i32>,
) -> Result<(), i32> {
    let what = match kind {
        Kind::MigrateToDev => Injection::DeviceMemory(file.device),
        Kind::MigrateToSys => Injection::HugePage,
        _ => return run(),
    };
    let flags = &file.flags.0;
    if flags.load(Ordering::Relaxed) & FAIL_ALLOC == 0 {
        return run();
    }
    let injected = file.engine.svm.inject(what);
    let injected = injected.map_err(|error| error.errno())?;
    let done = run();
    if injected.has_happened() {
        flags.fetch_and(!FAIL_ALLOC, Ordering::Relaxed);
    }
    done
}
