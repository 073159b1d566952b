//! The devices that are open: which descriptor is which.
//!
//! ```text
//!   fd, and each dup of it --> one memfd, told by its inode --> File: a device address space of its own
//! ```
//!
//! A descriptor is a real one, so that `dup`, `poll`, `fcntl` and `exec` do what they do. What is open ends
//! when the last descriptor of its memfd is closed.
//!
//! # Locking
//!
//! Opening and closing have a lock, under which the engine starts and ends. What is open has one of its own,
//! held for a few instructions: the engine's threads call `close` too, and look there. A command has the
//! lock of its file. A child of fork begins with nothing open and new locks.

use crate::engine::{COHERENT, Engine, PRIVATE};
use crate::{dmirror, next};
use core::ffi::{c_int, c_ulong, c_void};
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use gpusvm::{ByteSize, DeviceVm};
use rustix::fs::{Mode, OFlags, RawDir};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How many devices there are.
const DEVICES: usize = PRIVATE + COHERENT;

/// A device that is open.
#[derive(Debug)]
pub(crate) struct File {
    memfd: Inode,
    pub(crate) device: usize,
    pub(crate) vm: DeviceVm,
    pub(crate) engine: Arc<Engine>,
    /// Commands of one file run one after the other.
    running: Mutex<()>,
}

/// What tells one memfd from all others.
type Inode = (libc::dev_t, libc::ino_t);

/// Everything that is open in this process.
#[derive(Debug, Default)]
struct Table {
    /// Who opens or closes.
    changing: Mutex<()>,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    files: Vec<Arc<File>>,
    engine: Option<Arc<Engine>>,
}

/// Null until something is opened in this process. Never freed: a child of fork leaves its parent's behind.
static OPEN: AtomicPtr<Table> = AtomicPtr::new(core::ptr::null_mut());
/// How many files are open: what every other call of the program pays to look at.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Opens a device, and starts the engine if it is the first.
pub(crate) fn open(device: usize, flags: c_int) -> Result<c_int, c_int> {
    if device >= DEVICES {
        return Err(libc::ENOENT);
    }
    let table = table();
    let _changing = lock(&table.changing);
    let engine = match engine() {
        Some(engine) => engine,
        None => Arc::new(Engine::start().map_err(|error| {
            eprintln!("gpusvm-hmm: {error}");
            error.errno()
        })?),
    };
    if !engine.has(device) {
        return Err(libc::ENOENT);
    }
    let vm = engine.svm.create_vm(device);
    let vm = vm.map_err(|error| error.errno())?;
    let memfd = memfd(flags & libc::O_CLOEXEC)?;
    let file = Arc::new(File {
        memfd: inode_of(memfd.as_raw_fd()).ok_or(libc::EIO)?,
        device,
        vm,
        engine: Arc::clone(&engine),
        running: Mutex::new(()),
    });
    let mut open = lock(&table.open);
    open.engine = Some(engine);
    open.files.push(file);
    COUNT.store(open.files.len(), Ordering::Release);
    Ok(memfd.into_raw_fd())
}

/// What is open behind a descriptor, if it is one of ours.
pub(crate) fn find(fd: c_int) -> Option<Arc<File>> {
    if COUNT.load(Ordering::Acquire) == 0 || fd < 0 {
        return None;
    }
    let inode = inode_of(fd)?;
    let open = lock(&table().open);
    let file = open.files.iter().find(|file| file.memfd == inode);
    file.map(Arc::clone)
}

/// A descriptor of a file was closed. The last one ends the file, and the last file the engine.
pub(crate) fn closed(file: Arc<File>) -> Result<c_int, c_int> {
    if is_open(file.memfd) {
        return Ok(0);
    }
    let table = table();
    let _changing = lock(&table.changing);
    let last = {
        let mut open = lock(&table.open);
        open.files.retain(|other| !Arc::ptr_eq(other, &file));
        COUNT.store(open.files.len(), Ordering::Release);
        open.files.is_empty().then(|| open.engine.take()).flatten()
    };
    // A command that still runs, in another thread, ends with its address space.
    let evicted = file.engine.svm.evict(file.device);
    drop(file);
    let ended = last.map_or(Ok(()), Engine::end);
    match (evicted, ended) {
        (Ok(()), Ok(())) => Ok(0),
        (Err(error), _) | (_, Err(error)) => {
            eprintln!("gpusvm-hmm: close: {error}");
            Err(libc::EIO)
        }
    }
}

/// The program changed permissions.
pub(crate) fn was_protected(at: *const u8, len: usize) {
    if let Some(engine) = engine() {
        // No length is no memory: nothing has changed.
        let _ = engine.svm.was_protected(at, ByteSize::from_usize(len));
    }
}

/// The program unmapped memory.
pub(crate) fn was_unmapped(at: *const u8, len: usize) {
    if let Some(engine) = engine() {
        // As above.
        let _ = engine.svm.was_unmapped(at, ByteSize::from_usize(len));
    }
}

/// The engine, while there is one.
fn engine() -> Option<Arc<Engine>> {
    if COUNT.load(Ordering::Acquire) == 0 {
        return None;
    }
    lock(&table().open).engine.clone()
}

/// Nothing is open in a child of fork: engines stay with their processes.
pub(crate) fn forget() {
    COUNT.store(0, Ordering::Release);
    OPEN.store(core::ptr::null_mut(), Ordering::Release);
}

impl File {
    /// Runs one ioctl on it.
    pub(crate) fn command(&self, request: c_ulong, argument: *mut c_void) -> Result<c_int, c_int> {
        let _running = lock(&self.running);
        dmirror::run(self, request, argument).map(|()| 0)
    }
}

/// Maps pages that are zero, there already, and nobody else's: as the device driver inserts them.
///
/// # Safety
///
/// As `mmap`.
pub(crate) unsafe fn map_fresh_pages(
    at: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
) -> *mut c_void {
    let Ok(memfd) = memfd(libc::MFD_CLOEXEC.cast_signed()) else {
        return libc::MAP_FAILED;
    };
    let Ok(size) = libc::off_t::try_from(len) else {
        return libc::MAP_FAILED;
    };
    // SAFETY: a descriptor of our own.
    if unsafe { libc::ftruncate(memfd.as_raw_fd(), size) } != 0 {
        return libc::MAP_FAILED;
    }
    // SAFETY: as the caller promises; the pages are nobody's.
    let mapped = unsafe { next::mmap(at, len, protection, flags, memfd.as_raw_fd(), 0) };
    if mapped != libc::MAP_FAILED {
        // SAFETY: memory that has just been mapped; its bytes stay as they are. Where the system has no
        // such advice, pages are made when they are touched.
        let _ = unsafe { libc::madvise(mapped, len, libc::MADV_POPULATE_READ) };
    }
    mapped
}

/// A file of no bytes that nobody else has.
fn memfd(flags: c_int) -> Result<OwnedFd, c_int> {
    let flags = match flags {
        0 => 0,
        _ => libc::MFD_CLOEXEC,
    };
    // SAFETY: a C string.
    let fd = unsafe { libc::memfd_create(c"hmm_dmirror".as_ptr(), flags) };
    match fd {
        // SAFETY: a descriptor that nobody else has.
        0.. => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(libc::EMFILE),
    }
}

fn inode_of(fd: c_int) -> Option<Inode> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: room for what is told of any descriptor.
    if unsafe { libc::fstat(fd, stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: it was told.
    let stat = unsafe { stat.assume_init() };
    Some((stat.st_dev, stat.st_ino))
}

/// Whether a descriptor of the process still leads there.
///
/// By system calls alone: the C library would take memory from the program's heap to list a folder, and the
/// program may have written over that.
fn is_open(inode: Inode) -> bool {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(folder) = rustix::fs::open("/proc/self/fd", flags, Mode::empty()) else {
        return false;
    };
    let mut room = [MaybeUninit::<u8>::uninit(); 4096];
    let mut list = RawDir::new(&folder, &mut room);
    while let Some(Ok(entry)) = list.next() {
        let number = entry.file_name().to_str().ok();
        let number = number.and_then(|name| name.parse::<c_int>().ok());
        if number.and_then(inode_of) == Some(inode) {
            return true;
        }
    }
    false
}

fn table() -> &'static Table {
    let known = OPEN.load(Ordering::Acquire);
    if !known.is_null() {
        // SAFETY: from a box that is never freed.
        return unsafe { &*known };
    }
    let new = Box::into_raw(Box::default());
    let null = core::ptr::null_mut();
    match OPEN.compare_exchange(null, new, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: from a box that is never freed.
        Ok(_) => unsafe { &*new },
        Err(first) => {
            // SAFETY: nobody else has seen it.
            drop(unsafe { Box::from_raw(new) });
            // SAFETY: from a box that is never freed.
            unsafe { &*first }
        }
    }
}

/// A panic was reported, and left the data as it was.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
