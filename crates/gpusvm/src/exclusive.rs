//! Pages that a device has for itself.

use crate::residence::covering;
use crate::{Access, DeviceVm, Error};
use gpusvm_pagemap::{Cause, MigrateError, exclusive};
use gpusvm_types::ByteSize;

impl DeviceVm {
    /// Gives this device the pages that hold some of `len` bytes at `pointer` for itself, and no others, and maps
    /// them: nobody else touches them, as atomic operations of a device need whose atomics do not work on
    /// RAM. They are exclusive ([`PageState::exclusive`](crate::PageState::exclusive)) until one is wanted
    /// elsewhere: by a touch of the CPU, another device, a fork. Then it goes, at once, and nobody is told.
    ///
    /// A lane that uses an atomic operation where the device has no mapping for it gets the same without being
    /// asked for, for as much as one range holds, but for the mark.
    ///
    /// # Errors
    ///
    /// `ZeroSized`; `Migrate` when not all of them came or stayed (`EBUSY`: memory of a kind that cannot, pages
    /// that are pinned, or were touched meanwhile); `Populate` when they cannot be written, or are not there;
    /// `Mm`. Some may be exclusive then.
    ///
    /// # Examples
    ///
    /// ```
    /// use gpusvm::{ByteSize, SoftGpu, Svm};
    ///
    /// let svm = Svm::builder().device(SoftGpu::with_vram(ByteSize::mib(8))?).build()?;
    /// let mut xs = svm.alloc_slice::<u64>(1024)?;
    /// xs[0] = 3;
    /// let (first, len) = (xs.as_ptr(), ByteSize::kib(8));
    /// let is_exclusive = || svm.vm(0).and_then(|vm| Ok(vm.snapshot(first, len)?[0].exclusive));
    /// svm.vm(0)?.migrate(first, len)?;
    /// assert!(!is_exclusive()?);
    /// svm.vm(0)?.make_exclusive(first, len)?;
    /// assert!(is_exclusive()?);
    /// assert_eq!(xs[0], 3);
    /// assert!(!is_exclusive()?);
    /// # Ok::<(), gpusvm::Error>(())
    /// ```
    pub fn make_exclusive<T>(&self, pointer: *const T, len: ByteSize) -> Result<(), Error> {
        let span = covering(pointer, len)?;
        self.process.settle_events();
        let device = self.device();
        let refused = |error| Error::Migrate { device, error };
        self.vm
            .migrate_exclusive(span, Cause::Asked)
            .map_err(refused)?;
        self.populate(pointer, len, Access::Write)?;
        // Last: what was touched meanwhile has gone, and shows.
        let collected = exclusive::make_exclusive(self.vm.region().pagemap(), span)?;
        match collected == span.page_count() {
            true => Ok(()),
            false => Err(refused(MigrateError::NotAllCollected { span, collected })),
        }
    }
}
