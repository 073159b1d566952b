//! What a kernel sees: one lane of a launch, and memory through it.

use crate::port::{Port, aligned, pages_of};
use crate::{Grid, SvmPtr, Word};
use gpusvm_device::{Access, FaultError};
use gpusvm_guarded as guarded;
use gpusvm_types::{ByteSize, VirtAddr};

/// Why a lane stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LaneError {
    /// An access at an address that is not a multiple of the size of its type.
    #[error("{at} is not aligned for what is accessed there")]
    Misaligned {
        /// The address.
        at: VirtAddr,
    },
    /// An access that could not be served.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// The launch was cancelled, or the device went away.
    #[error("the launch was cancelled")]
    Cancelled,
    /// The kernel panicked in this lane.
    #[error("the kernel panicked")]
    Panicked,
}

/// A tile is moved in pieces of at most this: how long a flush may have to wait for one.
const PIECE: u64 = ByteSize::kib(64).get();

/// One lane of a launch.
///
/// A kernel is called once for each lane, and reaches memory only through it: every access is
/// translated, may fault, and may be replayed. It cannot hold a reference to shared memory across
/// accesses, so that nothing a kernel does can stop memory from migrating.
///
/// An error of an access is best returned from the kernel, with `?`: it stops the lane.
#[derive(Debug)]
pub struct Lane<'u> {
    pub(crate) port: Port<'u>,
    pub(crate) id: usize,
}

impl Lane<'_> {
    /// Which lane of the grid it is.
    #[inline(always)]
    pub fn id(&self) -> usize {
        self.id
    }

    /// Which unit it runs on.
    #[inline(always)]
    pub fn unit(&self) -> usize {
        self.port.unit
    }

    /// The grid it belongs to.
    #[inline(always)]
    pub fn grid(&self) -> Grid {
        self.port.launch.grid
    }

    /// Whether the launch was cancelled: for kernels that compute for long between accesses.
    pub fn is_cancelled(&self) -> bool {
        self.port.launch.is_cancelled()
    }

    /// Loads a word. Relaxed: other lanes and the CPU may write there meanwhile.
    ///
    /// # Errors
    ///
    /// `Misaligned`, `Fault`, `Cancelled`.
    #[inline(always)]
    pub fn load<T: Word>(&mut self, from: impl Into<SvmPtr<T>>) -> Result<T, LaneError> {
        self.port.load(from.into().addr().get())
    }

    /// Stores a word. Relaxed.
    ///
    /// # Errors
    ///
    /// As [`Lane::load`].
    #[inline(always)]
    pub fn store<T: Word>(&mut self, to: impl Into<SvmPtr<T>>, value: T) -> Result<(), LaneError> {
        self.port.store(to.into().addr().get(), value)
    }

    /// Loads consecutive words into memory of the kernel: the fast way to move much.
    ///
    /// `into` must be memory that is not mirrored, such as the stack or the heap of the kernel: the
    /// unit is in flight while it writes there. Towards concurrent writers it is not one access but
    /// many, in no order.
    ///
    /// # Errors
    ///
    /// As [`Lane::load`]; what was loaded before the error is in `into`.
    pub fn load_tile<T: Word>(
        &mut self,
        from: impl Into<SvmPtr<T>>,
        into: &mut [T],
    ) -> Result<(), LaneError> {
        let at = from.into().addr().get();
        aligned::<T>(at)?;
        self.tile(
            at,
            into.as_mut_ptr().cast::<u8>(),
            size_of_val(into),
            Access::Read,
        )
    }

    /// Stores consecutive words from memory of the kernel.
    ///
    /// # Errors
    ///
    /// As [`Lane::load_tile`]; part of the words may be stored.
    pub fn store_tile<T: Word>(
        &mut self,
        to: impl Into<SvmPtr<T>>,
        from: &[T],
    ) -> Result<(), LaneError> {
        let at = to.into().addr().get();
        aligned::<T>(at)?;
        let local = from.as_ptr().cast::<u8>().cast_mut();
        self.tile(at, local, size_of_val(from), Access::Write)
    }

    /// Moves `len` bytes between `at` and `local`: reads shared memory, or writes it.
    fn tile(
        &mut self,
        at: u64,
        local: *mut u8,
        len: usize,
        access: Access,
    ) -> Result<(), LaneError> {
        let mut done = 0;
        while done < len {
            let at = at.wrapping_add(done as u64);
            done += self.piece(at, local.wrapping_add(done), len - done, access)?;
        }
        Ok(())
    }

    /// Moves what one translation and one piece allow, and says how much that was.
    fn piece(
        &mut self,
        at: u64,
        local: *mut u8,
        len: usize,
        access: Access,
    ) -> Result<usize, LaneError> {
        let most = (len as u64).min(PIECE - at % PIECE);
        loop {
            let hit = self.port.open(at, access, pages_of(at, most))?;
            let len = ByteSize::new(most.min(hit.rest())).as_usize();
            let (to, from) = match access {
                Access::Read => (local, hit.pointer()),
                Access::Write | Access::Atomic => (hit.pointer(), local),
            };
            // SAFETY: one side is the kernel's slice; the other is VRAM, or RAM or VRAM of a peer, for
            // which the one who launched vouches, or a fault, which is reported.
            let moved = unsafe { guarded::copy(to, from.cast_const(), len) };
            self.port.end();
            match moved {
                Ok(()) => return Ok(len),
                Err(refused) if refused.addr.wrapping_sub(local.addr()) < len => {
                    let at = VirtAddr::new(refused.addr as u64);
                    return Err(LaneError::Fault(FaultError::OutOfReach { at }));
                }
                Err(refused) => {
                    // Where it stopped, not where it began: that page is the one out of date.
                    let by = refused.addr.wrapping_sub(hit.pointer().addr());
                    let by = if by < len { by as u64 } else { 0 };
                    self.port.refused(at + by, access, hit.refusal())?;
                }
            }
        }
    }
}
