//! The devices that are open: which descriptor is which.
//!
//! ```text
//!   fd, and each dup of it --> one memfd, told by its inode --> File: a device address space of its own
//! ```
//!
//! A descriptor is a real one, so that `dup`, `poll`, `fcntl` and `exec` do what they do. What is open ends
//! when the last descriptor of its memfd is closed in the process that opened it, and, as in the kernel, when
//! the last command that was under way by then is done: who lets go last ends it.
//!
//! # Children
//!
//! A child of fork begins with nothing open. What it inherits is a plain file there, which refuses commands with
//! `ENOTTY`, and which it may close without its parent hearing of it. A child of vfork has its parent's memory,
//! and these tables with it; so whoever is not the process that opened finds nothing here.
//!
//! # Locking
//!
//! Opening and ending have a lock, under which the engine starts and ends. What closes descriptors of devices has
//! another, until it is known which devices have none any more. What is open has one of its own, held for a
//! few instructions: the engine's threads call `close` too, and look there. A command has the lock of its
//! file. A child of fork begins with new locks.

use crate::descriptor::{self, Inode, inode_of, memfd};
use crate::engine::{COHERENT, Engine, PRIVATE};
use crate::flags::Flags;
use crate::{dmirror, next, report};
use core::ffi::{c_int, c_ulong, c_void};
use core::ops::Deref;
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use gpusvm::{ByteSize, DeviceVm};
use std::os::fd::{AsRawFd, IntoRawFd};
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
    pub(crate) flags: Flags,
    /// Commands of one file run one after the other.
    running: Mutex<()>,
}

/// A file that somebody is at. The last to let go of what was closed ends it.
#[derive(Debug)]
pub(crate) struct InUse(Option<Arc<File>>);

/// Everything that is open in this process.
#[derive(Debug)]
struct Table {
    /// Whose it is. A child may have the same memory.
    owner: u32,
    /// Who opens or ends.
    changing: Mutex<()>,
    /// Who closes descriptors of files.
    closing: Mutex<()>,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    files: Vec<Arc<File>>,
    /// The device of each file that has not ended.
    devices: Vec<usize>,
    /// As long as a file has not ended.
    engine: Option<Arc<Engine>>,
}

/// Null until something is opened in this process. Never freed: a child of fork leaves its parent's behind.
static OPEN: AtomicPtr<Table> = AtomicPtr::new(core::ptr::null_mut());
/// How many files have not ended: what every other call of the program pays to look at.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Opens a device, and starts the engine if it is the first.
pub(crate) fn open(device: usize, flags: c_int) -> Result<c_int, c_int> {
    if device >= DEVICES {
        return Err(libc::ENOENT);
    }
    let table = table();
    if !table.is_ours() {
        return Err(libc::ENODEV);
    }
    // What was closed unseen.
    closing(|| ()).1?;
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
        flags: Flags::default(),
        running: Mutex::new(()),
    });
    report::opened(device)?;
    let mut open = lock(&table.open);
    open.engine = Some(engine);
    open.files.push(file);
    open.devices.push(device);
    COUNT.fetch_add(1, Ordering::AcqRel);
    Ok(memfd.into_raw_fd())
}

/// Whether anything is, and so worth a look.
pub(crate) fn is_any_open() -> bool {
    COUNT.load(Ordering::Acquire) != 0
}

/// What is open behind a descriptor, if it is one of ours.
pub(crate) fn find(fd: c_int) -> Option<InUse> {
    let table = ours().filter(|_| fd >= 0)?;
    let inode = inode_of(fd)?;
    let open = lock(&table.open);
    let file = open.files.iter().find(|file| file.memfd == inode);
    file.map(|file| InUse(Some(Arc::clone(file))))
}

/// Runs what closes descriptors of files, or puts others in their place. Devices without any end before this
/// returns, also those that were closed unseen before.
pub(crate) fn closing<R>(close: impl FnOnce() -> R) -> (R, Result<(), c_int>) {
    let Some(table) = ours() else {
        return (close(), Ok(()));
    };
    let closing = lock(&table.closing);
    let result = close();
    let closed = table.sweep();
    drop(closing);
    let ended = closed.map_or_else(Err, |files| {
        let each = files.into_iter().map(|file| InUse(Some(file)).let_go());
        each.fold(Ok(()), Result::and)
    });
    (result, ended)
}

/// The engine's descriptors, ascending: none of them is the program's to close, or to take the number of.
pub(crate) fn of_the_engine() -> Arc<[c_int]> {
    engine().map_or_else(|| Arc::from([]), |engine| Arc::clone(&engine.descriptors))
}

/// The last who had a file let go of it. The last file ends the engine.
fn end(file: File) -> Result<(), c_int> {
    let table = table();
    let _changing = lock(&table.changing);
    let File {
        device, vm, engine, ..
    } = file;
    let evicted = engine.svm.evict(device);
    drop(vm);
    let others = {
        let mut open = lock(&table.open);
        let this = open.devices.iter().position(|other| *other == device);
        this.map(|this| open.devices.swap_remove(this));
        open.devices.contains(&device)
    };
    let reported = report::closed(&engine.svm, device, others);
    drop(engine);
    let last = match COUNT.fetch_sub(1, Ordering::AcqRel) {
        1 => lock(&table.open).engine.take(),
        _ => None,
    };
    let ended = last.map_or(Ok(()), Engine::end);
    let ended = evicted.and(ended).map_err(|error| {
        eprintln!("gpusvm-hmm: close: {error}");
        libc::EIO
    });
    ended.and(reported)
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
    lock(&ours()?.open).engine.clone()
}

/// The table, if there is anything in it, and it is of this process.
fn ours() -> Option<&'static Table> {
    is_any_open().then(table).filter(|table| table.is_ours())
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

impl InUse {
    fn let_go(mut self) -> Result<(), c_int> {
        self.take_leave()
    }

    fn take_leave(&mut self) -> Result<(), c_int> {
        // One of those who had it gets it, the last.
        self.0.take().and_then(Arc::into_inner).map_or(Ok(()), end)
    }
}

impl Deref for InUse {
    type Target = File;

    fn deref(&self) -> &File {
        self.0.as_deref().expect("until it is let go of")
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        // It has said so, and there is nobody to tell.
        let _ = self.take_leave();
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

impl Table {
    fn new() -> Self {
        Self {
            owner: std::process::id(),
            changing: Mutex::default(),
            closing: Mutex::default(),
            open: Mutex::default(),
        }
    }

    /// Takes files out that no descriptor leads to any more. Called with `closing` held.
    fn sweep(&self) -> Result<Vec<Arc<File>>, c_int> {
        // What is opened from here on has a descriptor.
        let mut gone = lock(&self.open).files.clone();
        descriptor::each(|fd| {
            if let Some(inode) = inode_of(fd) {
                gone.retain(|file| file.memfd != inode);
            }
        })?;
        let is_gone = |file: &Arc<File>| gone.iter().any(|other| Arc::ptr_eq(file, other));
        lock(&self.open).files.retain(|file| !is_gone(file));
        Ok(gone)
    }

    fn is_ours(&self) -> bool {
        self.owner == std::process::id()
    }
}

fn table() -> &'static Table {
    let known = OPEN.load(Ordering::Acquire);
    if !known.is_null() {
        // SAFETY: from a box that is never freed.
        return unsafe { &*known };
    }
    let new = Box::into_raw(Box::new(Table::new()));
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
