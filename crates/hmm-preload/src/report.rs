//! What is left in use when a device is closed, for who asserts that it is nothing.
//!
//! Where the environment names a file in `GPUSVM_HMM_REPORT`, a line is added to it for each device that is opened,
//! and for each that has ended:
//!
//! ```text
//!   open pid=17 device=0
//!   close pid=17 device=0 pages=0 bytes=0
//! ```
//!
//! A line is written at once, so that processes can share the file. One that cannot be written is an error of the
//! call.

use core::ffi::c_int;
use core::time::Duration;
use gpusvm::{ByteSize, Svm};
use rustix::fs::{Mode, OFlags};

/// The variable of the environment.
const VARIABLE: &str = "GPUSVM_HMM_REPORT";
/// How often to look whether the last pages have gone, for a second or a little more.
const LOOKS: u32 = 1000;
const LOOK: Duration = Duration::from_millis(1);

/// A device was opened.
pub(crate) fn opened(device: usize) -> Result<(), c_int> {
    add(&format!(
        "open pid={} device={device}\n",
        std::process::id()
    ))
}

/// A device has ended: everything has gone home. With `others` that have the device open, what is left may be
/// theirs: it is said of the last.
pub(crate) fn closed(svm: &Svm, device: usize, others: bool) -> Result<(), c_int> {
    let pid = std::process::id();
    if others {
        return add(&format!("close pid={pid} device={device} shared\n"));
    }
    let (pages, bytes) = left(svm, device);
    let bytes = bytes.get();
    add(&format!(
        "close pid={pid} device={device} pages={pages} bytes={bytes}\n"
    ))?;
    if pages != 0 || bytes != 0 {
        eprintln!(
            "gpusvm-hmm: device {device}: {pages} pages, {bytes} bytes of its memory were left behind"
        );
        return Err(libc::EIO);
    }
    Ok(())
}

/// What stays in use, also after a while.
fn left(svm: &Svm, device: usize) -> (u64, ByteSize) {
    let look = || svm.in_use(device).unwrap_or((0, ByteSize::ZERO));
    let mut left = look();
    for _ in 0..LOOKS {
        if left == (0, ByteSize::ZERO) {
            break;
        }
        std::thread::sleep(LOOK);
        left = look();
    }
    left
}

fn add(line: &str) -> Result<(), c_int> {
    let Some(path) = std::env::var_os(VARIABLE) else {
        return Ok(());
    };
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::CLOEXEC;
    let written = rustix::fs::open(&path, flags, Mode::from_raw_mode(0o644))
        .and_then(|file| rustix::io::write(&file, line.as_bytes()));
    written.map(drop).map_err(|errno| {
        eprintln!("gpusvm-hmm: {VARIABLE}: {}: {errno}", path.display());
        errno.raw_os_error()
    })
}
