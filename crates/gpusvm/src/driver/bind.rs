//! What is bound in a device address space, and what that does to its ranges: xe's `VM_BIND`.
//!
//! ```text
//!   bind, unbind:  nobody works on the address space
//!      |-- a mirror in the way: ranges of mirrored memory with mappings? Busy. The others are removed
//!      |-- an object in the way: its entries are taken away
//!      |-- the map of VMAs
//!      `-- an object: its entries are made
//!
//!   fault:  mirror ---> a range, which stays inside the VMA
//!           object ---> its entries were lost: they are made again
//!           hole   ---> an error
//! ```
//!
//! Taking a mirror away from under mappings is refused: pages of the process that the device reaches
//! would have to be fenced off from an address where something else is then. Who wants that lets the ranges
//! become unmapped first, by a touch of the CPU. Memory that nobody mirrors, which the device uses in place,
//! is not in the way: the CPU has it already, no touch would unmap it, and nobody tells when it is
//! gone, so its ranges can be those of what was at the address before.
//!
//! # Locking
//!
//! Binding holds `working` to write: passes over faults of this address space wait for as long as it takes
//! to remove ranges and write page tables, and no longer. It is rare, and faults of others go on.

use crate::driver::counters;
use crate::driver::gpuva::Vma;
use crate::driver::object::Object;
use crate::driver::vm::{Vm, Working};
use gpusvm_device::{Access, DeviceError, FaultError};
use gpusvm_mm::AddressSpace;
use gpusvm_pagemap::PagemapAddr;
use gpusvm_svm::{PageRun, Permission, Range};
use gpusvm_sync::Arc;
use gpusvm_types::{ByteSize, DevAddr, PAGE_SIZE, Span, VirtAddr};

pub(crate) use crate::driver::gpuva::Binding;

/// Why something cannot be bound or unbound.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// The device has pages of the process mapped there.
    #[error("the device has {span} mapped")]
    Busy {
        /// The first range that is in the way.
        span: Span,
    },
    /// Not all of that is in the object, or it does not begin at a page.
    #[error("{span} would begin at {offset} of an object of {size}")]
    OutOfBounds {
        /// Where it was to be bound.
        span: Span,
        /// What of it.
        offset: ByteSize,
        /// How large the object is.
        size: ByteSize,
    },
    /// The object is memory of another device.
    #[error("what was to be bound at {span} is in another device memory")]
    OtherDevice {
        /// Where it was to be bound.
        span: Span,
    },
    /// The device address space is closed.
    #[error("{span} of a device address space that is closed")]
    Closed {
        /// What was to be changed.
        span: Span,
    },
    /// The device refused: what was bound before still is.
    #[error("binding {span}: {error}")]
    Device {
        /// What was to be bound.
        span: Span,
        /// Why not.
        error: DeviceError,
    },
}

impl BindError {
    /// What the kernel's twin returns.
    pub const fn errno(&self) -> i32 {
        match self {
            Self::Busy { .. } => 16,                                   // EBUSY
            Self::OutOfBounds { .. } | Self::OtherDevice { .. } => 22, // EINVAL
            Self::Closed { .. } => 2,                                  // ENOENT
            Self::Device { .. } => 12,                                 // ENOMEM
        }
    }
}

impl<M: AddressSpace> Vm<M> {
    /// Binds what of `object` begins at `offset`, a multiple of the page size, at `span`: the device sees
    /// it there, to read and write, and nothing of the process. What was bound there is replaced.
    ///
    /// # Errors
    ///
    /// `Busy` where the device has mirrored pages of the process mapped (`EBUSY`), `OutOfBounds`,
    /// `OtherDevice` (both `EINVAL`), `Closed` (`ENOENT`), `Device` (`ENOMEM`).
    pub fn bind_object(
        &self,
        span: Span,
        object: &Object<M>,
        offset: ByteSize,
    ) -> Result<(), BindError> {
        self.bind_writable(span, object, offset, true)
    }

    /// As [`Vm::bind_object`], to read only.
    ///
    /// # Errors
    ///
    /// As [`Vm::bind_object`].
    pub fn bind_object_read_only(
        &self,
        span: Span,
        object: &Object<M>,
        offset: ByteSize,
    ) -> Result<(), BindError> {
        self.bind_writable(span, object, offset, false)
    }

    fn bind_writable(
        &self,
        span: Span,
        object: &Object<M>,
        offset: ByteSize,
        writable: bool,
    ) -> Result<(), BindError> {
        if !object.is_in(self.region.memory()) {
            return Err(BindError::OtherDevice { span });
        }
        let size = object.size();
        let aligned = offset.get().is_multiple_of(PAGE_SIZE.get());
        if !aligned || object.pieces(offset, span.len()).is_err() {
            return Err(BindError::OutOfBounds { span, offset, size });
        }
        let object = object.clone();
        let binding = Binding {
            object,
            offset,
            writable,
        };
        self.replace(span, Some(Vma::Object(binding)))
    }

    /// Lets `span` mirror the process, where it does not already.
    ///
    /// # Errors
    ///
    /// `Closed` (`ENOENT`).
    pub fn bind_mirror(&self, span: Span) -> Result<(), BindError> {
        self.replace(span, Some(Vma::Mirror))
    }

    /// Makes a hole of `span`: the device sees nothing there, and a fault is an error.
    ///
    /// # Errors
    ///
    /// `Busy` where the device has mirrored pages of the process mapped (`EBUSY`), `Closed` (`ENOENT`).
    pub fn unbind(&self, span: Span) -> Result<(), BindError> {
        self.replace(span, None)
    }

    fn replace(&self, span: Span, vma: Option<Vma<Object<M>>>) -> Result<(), BindError> {
        // Objects that are bound no more go after the lock: the last one gives its memory back.
        let _before = {
            let working = self.exclude().ok_or(BindError::Closed { span })?;
            if !matches!(vma, Some(Vma::Mirror)) {
                self.remove_ranges(span)?;
            }
            let before = self.vmas.replace(span, vma.clone());
            self.take_away(&before);
            let bound = match &vma {
                Some(Vma::Object(binding)) => self.bind_entries(span, binding),
                Some(Vma::Mirror) | None => Ok(()),
            };
            if let Err(error) = bound {
                self.put_back(span, before);
                return Err(BindError::Device { span, error });
            }
            drop(working);
            before
        };
        Ok(())
    }

    /// Removes the ranges of the mirrors in `span`, unless one of them is mapped that a touch of the CPU
    /// would unmap: then none. Their pages stay where they are, and come home when the CPU touches them.
    fn remove_ranges(&self, span: Span) -> Result<(), BindError> {
        let inside = self.vmas.inside(span);
        let is_mirror = |(_, vma): &&(Span, Vma<Object<M>>)| matches!(vma, Vma::Mirror);
        let mirrors = || inside.iter().filter(is_mirror).map(|(piece, _)| *piece);
        for piece in mirrors().filter(|piece| self.svm().has_mapping(*piece)) {
            // It can be gone by now; nobody maps one meanwhile.
            let ranges = self.svm().ranges_in(piece);
            let is_in_the_way = |range: &&Arc<Range<M>>| range.is_mapped() && range.can_migrate();
            if let Some(range) = ranges.iter().find(is_in_the_way) {
                return Err(BindError::Busy { span: range.span() });
            }
        }
        for range in mirrors().flat_map(|piece| self.svm().ranges_in(piece)) {
            // Who leases what it declared looks at it meanwhile.
            let _serving = range.serve();
            self.svm().range_remove(&range);
        }
        Ok(())
    }

    /// Takes the entries of objects away. What is in flight by them has ended then.
    pub(crate) fn take_away(&self, vmas: &[(Span, Vma<Object<M>>)]) {
        let tables = self.device().page_tables();
        let _proof = self.svm().quiesce();
        for (span, vma) in vmas {
            if matches!(vma, Vma::Object(_)) {
                tables.zap(self.id(), *span);
                tables.flush(self.id(), *span);
            }
        }
    }

    /// Undoes a binding that failed half way.
    fn put_back(&self, span: Span, before: Vec<(Span, Vma<Object<M>>)>) {
        let failed = self.vmas.replace(span, None);
        self.take_away(&failed);
        for (piece, vma) in before {
            if let Vma::Object(binding) = &vma {
                // What does not fit any more is made by the fault that wants it.
                let _ = self.bind_entries(piece, binding);
            }
            self.vmas.replace(piece, Some(vma));
        }
    }

    /// Makes the entries of an object.
    fn bind_entries(&self, span: Span, binding: &Binding<Object<M>>) -> Result<(), DeviceError> {
        let permission = match binding.writable {
            true => Permission::Atomic,
            false => Permission::Read,
        };
        let mut runs = Vec::new();
        let mut at = span.start();
        let pieces = binding.object.pieces(binding.offset, span.len());
        for (from, len) in pieces.expect("looked at when it was bound") {
            let piece = Span::from_len(at, len).expect("a piece of a span, in pages");
            runs.push(PageRun {
                span: piece,
                address: PagemapAddr::Vram(from),
                permission,
            });
            at = piece.end();
        }
        self.bind(&self.svm().quiesce(), &runs)
    }

    /// The mirror that a fault is in. `None` when it is in an object, whose entries are there again.
    ///
    /// # Errors
    ///
    /// `NotBound` in a hole, `NotPermitted` for a write to what is bound to be read.
    pub(crate) fn find_mirror(
        &self,
        _working: &Working<'_>,
        (at, access): (VirtAddr, Access),
    ) -> Result<Option<Span>, FaultError> {
        let (span, vma) = self.vmas.find(at).ok_or(FaultError::NotBound { at })?;
        let binding = match vma {
            Vma::Mirror => return Ok(Some(span)),
            Vma::Object(binding) => binding,
        };
        if access.is_write() && !binding.writable {
            return Err(FaultError::NotPermitted { at, access });
        }
        counters::count(&self.counters.rebound);
        match self.bind_entries(span, &binding) {
            Ok(()) => Ok(None),
            Err(_) => Err(FaultError::Gave {
                at,
                reason: "its object could not be bound again",
            }),
        }
    }

    /// Where in device memory the page of an object is that is bound at `at`, if one is: for checkers.
    pub fn object_at(&self, at: VirtAddr) -> Option<DevAddr> {
        let (span, vma) = self.vmas.find(at)?;
        let Vma::Object(binding) = vma else {
            return None;
        };
        let page = at.align_down(PAGE_SIZE);
        let offset = binding.offset + page.offset_from(span.start());
        let mut pieces = binding.object.pieces(offset, PAGE_SIZE).ok()?;
        pieces.next().map(|(at, _)| at)
    }

    /// Where the object that is bound at `at` ends.
    pub(crate) fn object_end(&self, at: VirtAddr) -> Option<VirtAddr> {
        let (span, vma) = self.vmas.find(at)?;
        matches!(vma, Vma::Object(_)).then_some(span.end())
    }
}
