//! One ioctl: a number, and 40 bytes that the program has in memory.

use core::ffi::{c_ulong, c_void};
use gpusvm::ByteSize;
use libc::{EFAULT, EINVAL};

/// The size of a page, which commands count in.
pub(crate) const PAGE: u64 = 4096;

/// What a command is about: the five words of `struct hmm_dmirror_cmd`, in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Command {
    /// The first byte of the memory.
    pub(crate) addr: u64,
    /// Where the program has, or wants, the data.
    pub(crate) ptr: u64,
    /// How many pages.
    pub(crate) npages: u64,
    /// Out: how many it was done to.
    pub(crate) cpages: u64,
    /// Out: how often the device faulted.
    pub(crate) faults: u64,
}

const _: () = assert!(size_of::<Command>() == 40);

/// Which of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    MigrateToDev,
    MigrateToSys,
    Snapshot,
    Exclusive,
    CheckExclusive,
    Release,
    Flags,
    ReadUnlocked,
}

impl Kind {
    /// What an ioctl number stands for: `_IOWR('H', n, struct hmm_dmirror_cmd)`.
    pub(crate) fn of(request: c_ulong) -> Result<Self, i32> {
        /// Read and write, 40 bytes, 'H'.
        const IOWR: c_ulong = 3 << 30 | 40 << 16 | 0x48 << 8;
        match request.checked_sub(IOWR) {
            Some(0) => Ok(Self::Read),
            Some(1) => Ok(Self::Write),
            Some(2) => Ok(Self::MigrateToDev),
            Some(3) => Ok(Self::MigrateToSys),
            Some(4) => Ok(Self::Snapshot),
            Some(5) => Ok(Self::Exclusive),
            Some(6) => Ok(Self::CheckExclusive),
            Some(7) => Ok(Self::Release),
            Some(8) => Ok(Self::Flags),
            Some(9) => Ok(Self::ReadUnlocked),
            _ => Err(EINVAL),
        }
    }
}

impl Command {
    /// The command at `argument`, with nothing done yet. Flags are about no memory.
    pub(crate) fn read(kind: Kind, argument: *mut c_void) -> Result<Self, i32> {
        let mut command = Self::default();
        let into = (&raw mut command).cast::<u8>();
        copy(into, argument.cast::<u8>(), size_of::<Self>())?;
        if kind != Kind::Flags {
            command.check()?;
        }
        Ok(Self {
            cpages: 0,
            faults: 0,
            ..command
        })
    }

    /// Whether it names whole pages, at least one.
    fn check(&self) -> Result<(), i32> {
        let bytes = self.npages.checked_mul(PAGE).ok_or(EINVAL)?;
        let end = self.addr.checked_add(bytes).ok_or(EINVAL)?;
        if !self.addr.is_multiple_of(PAGE) || end <= self.addr {
            return Err(EINVAL);
        }
        Ok(())
    }

    /// Tells the program what came of it.
    pub(crate) fn write(&self, argument: *mut c_void) -> Result<(), i32> {
        let from = core::ptr::from_ref(self).cast::<u8>();
        copy(argument.cast::<u8>(), from, size_of::<Self>())
    }

    /// The first byte of the memory.
    pub(crate) fn at(&self) -> *mut u8 {
        address(self.addr)
    }

    /// How long it is.
    pub(crate) fn len(&self) -> ByteSize {
        ByteSize::new(self.npages * PAGE)
    }

    /// Where the data is.
    pub(crate) fn data(&self) -> *mut u8 {
        address(self.ptr)
    }

    /// So many bytes, all zero.
    pub(crate) fn room(len: u64) -> Result<Vec<u8>, i32> {
        let mut room = Self::empty_room(len)?;
        room.resize(usize::try_from(len).map_err(|_| libc::ENOMEM)?, 0);
        Ok(room)
    }

    /// Room for so many bytes, and none in it.
    pub(crate) fn empty_room(len: u64) -> Result<Vec<u8>, i32> {
        let len = usize::try_from(len).map_err(|_| libc::ENOMEM)?;
        let mut room = Vec::new();
        room.try_reserve_exact(len).map_err(|_| libc::ENOMEM)?;
        Ok(room)
    }
}

/// Gives bytes to the program.
pub(crate) fn give(to: *mut u8, bytes: &[u8]) -> Result<(), i32> {
    copy(to, bytes.as_ptr(), bytes.len())
}

/// Takes bytes from the program.
pub(crate) fn take(into: &mut [u8], from: *const u8) -> Result<(), i32> {
    copy(into.as_mut_ptr(), from, into.len())
}

/// Copies, as the kernel does for a system call: what the program may not touch is an error.
fn copy(to: *mut u8, from: *const u8, len: usize) -> Result<(), i32> {
    // SAFETY: one side is a value of our own; the other is what the program named in a command, and is for
    // the program to vouch for, as with the system call that it believes this is.
    unsafe { gpusvm_guarded::copy(to, from, len) }.map_err(|_| EFAULT)
}

fn address(word: u64) -> *mut u8 {
    usize::try_from(word).map_or(
        core::ptr::null_mut(),
        core::ptr::with_exposed_provenance_mut,
    )
}
