//! Device memory that belongs to nobody's RAM: a buffer object.
//!
//! ```text
//!   create: room is made ---> cleared ---> bound in address spaces, read and written by the CPU
//!              |                                       |
//!              SVM residents go                        the last handle and the last binding are gone:
//!                                                      given back, cleared if memory is scrubbed
//! ```
//!
//! An object is in device memory as long as it lives: it is never evicted, since it has no other place. So
//! what objects take is not there for pages of the process. It need not be in one run.
//!
//! # Differences from the kernel
//!
//! As `xe_bo` with `XE_BO_FLAG_PINNED`, and in VRAM only. Its other placements, its eviction and its
//! sharing between devices do not exist.

use crate::driver::VramRegion;
use crate::driver::devmem::Bo;
use crate::driver::region::Memory;
use gpusvm_device::{CopyOp, DeviceError};
use gpusvm_mm::AddressSpace;
use gpusvm_pagemap::{DevmemError, DevmemOps};
use gpusvm_sync::Arc;
use gpusvm_types::{ByteSize, DevAddr, DmaAddr, PAGE_SIZE, PageCount};

/// Memory of a device. Cloning it makes another handle of the same memory.
#[derive(Debug)]
pub struct Object<M: AddressSpace>(Arc<Contents<M>>);

#[derive(Debug)]
struct Contents<M: AddressSpace> {
    bo: Bo<M>,
    pages: PageCount,
}

/// Why there is no object, or nothing of it can be read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ObjectError {
    /// An object of no bytes.
    #[error("an object of no bytes")]
    Empty,
    /// Device memory has no room for it, with all evicted that can go.
    #[error("no room for {wanted:?} in a device memory of {total:?}")]
    NoSpace {
        /// How much was wanted.
        wanted: PageCount,
        /// How much the device has.
        total: PageCount,
    },
    /// The device was taken out of use.
    #[error("the device memory is unbound")]
    Unbound,
    /// Not all of that is in the object.
    #[error("{len} at {offset} of an object of {size}")]
    OutOfBounds {
        /// Where it begins.
        offset: ByteSize,
        /// How long it is.
        len: ByteSize,
        /// How large the object is.
        size: ByteSize,
    },
    /// The device's part failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A copy failed.
    #[error(transparent)]
    Copy(#[from] DevmemError),
}

impl ObjectError {
    /// What the kernel's twin returns.
    pub const fn errno(&self) -> i32 {
        match self {
            Self::Empty | Self::OutOfBounds { .. } => 22, // EINVAL
            Self::NoSpace { .. } => 28,                   // ENOSPC
            Self::Unbound => 19,                          // ENODEV
            Self::Device(_) => 5,                         // EIO
            Self::Copy(error) => error.errno(),
        }
    }
}

impl<M: AddressSpace> VramRegion<M> {
    /// An object of `len` bytes, rounded up to pages, all of them zero. Makes room for it by evicting
    /// pages of the process; nothing ever evicts it.
    ///
    /// # Errors
    ///
    /// `Empty`, `NoSpace`, `Unbound`; `Device` when it could not be cleared.
    pub fn create_object(&self, len: ByteSize) -> Result<Object<M>, ObjectError> {
        let pages = len.get().div_ceil(PAGE_SIZE.get());
        let wanted = PageCount::new(pages);
        if wanted == PageCount::ZERO {
            return Err(ObjectError::Empty);
        }
        if !self.pagemap().is_bound() {
            return Err(ObjectError::Unbound);
        }
        let bo = self.allocate_object(wanted).ok_or(ObjectError::NoSpace {
            wanted,
            total: self.total(),
        })?;
        bo.memory().traffic.add_object(wanted);
        let object = Object(Arc::new(Contents { bo, pages: wanted }));
        // What was freed to be cleared comes before this in the same engine.
        if let Some(fence) = object.0.bo.clear()? {
            self.device().copy_engine().wait(fence)?;
        }
        Ok(object)
    }
}

impl<M: AddressSpace> Object<M> {
    /// How large it is: whole pages.
    pub fn size(&self) -> ByteSize {
        self.0.pages.bytes()
    }

    /// Whether it is in this memory.
    pub(crate) fn is_in(&self, memory: &Arc<Memory<M>>) -> bool {
        Arc::ptr_eq(self.0.bo.memory(), memory)
    }

    /// Where `len` bytes at `offset` are: contiguous pieces, in order.
    ///
    /// # Errors
    ///
    /// `OutOfBounds`.
    pub(crate) fn pieces(
        &self,
        offset: ByteSize,
        len: ByteSize,
    ) -> Result<impl Iterator<Item = (DevAddr, ByteSize)>, ObjectError> {
        let size = self.size();
        let end = offset.get().checked_add(len.get());
        let end = end.filter(|end| *end <= size.get());
        let end = end.ok_or(ObjectError::OutOfBounds { offset, len, size })?;
        let start = offset.get();
        let mut before = 0;
        let runs = self.0.bo.runs().iter().filter_map(move |run| {
            let (first, len) = (before, run.count.bytes().get());
            before += len;
            let (from, to) = (start.max(first), end.min(first + len));
            let at = || run.first.dev_addr() + ByteSize::new(from - first);
            (from < to).then(|| (at(), ByteSize::new(to - from)))
        });
        Ok(runs)
    }

    /// Copies `len` bytes at `offset` to RAM that nobody moves, where the device reaches it at `to`.
    pub(crate) fn copy_to_ram(
        &self,
        offset: ByteSize,
        to: DmaAddr,
        len: ByteSize,
    ) -> Result<(), ObjectError> {
        let mut to = to;
        let mut ops = self.pieces(offset, len)?.map(|(from, len)| {
            let op = CopyOp::ToRam { from, to, len };
            to = to + len;
            op
        });
        Ok(self.0.bo.copy(&mut ops, None).map(drop)?)
    }

    /// As `copy_to_ram`, the other way.
    pub(crate) fn copy_from_ram(
        &self,
        offset: ByteSize,
        from: DmaAddr,
        len: ByteSize,
    ) -> Result<(), ObjectError> {
        let mut from = from;
        let mut ops = self.pieces(offset, len)?.map(|(to, len)| {
            let op = CopyOp::ToDevice { from, to, len };
            from = from + len;
            op
        });
        Ok(self.0.bo.copy(&mut ops, None).map(drop)?)
    }
}

impl<M: AddressSpace> Clone for Object<M> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<M: AddressSpace> Drop for Contents<M> {
    fn drop(&mut self) {
        self.bo.memory().traffic.remove_object(self.pages);
        self.bo.release();
    }
}
