//! Where pages are and what a device has mapped, page by page: looked at, and changed on request.
//!
//! ```text
//!   snapshot        what is where; nothing faults        HMM_PFN_* without a request
//!   populate        mapped where it is; no page moves    hmm_range_fault
//!   migrate         pages to the device; nothing mapped  migrate_vma
//!   migrate_back    the device's own pages home          migrate_vma
//! ```

use crate::{Access, DeviceVm, Error, Protection, Svm};
use gpusvm_device::FaultError;
use gpusvm_mm::{AddressSpace, Seen};
use gpusvm_mm_linux::RamPage;
use gpusvm_pagemap::Cause;
use gpusvm_types::{ByteSize, PageCount, Span, VirtAddr};

/// A page, as it was when somebody looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageState {
    /// What its mapping in the process allows. `None`: there is no mapping.
    pub protection: Option<Protection>,
    /// Where it is.
    pub place: PagePlace,
    /// What the device may do with it without a fault: the most of what the device has mapped.
    pub mapped: Option<Access>,
}

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PagePlace {
    /// Nowhere yet: the first touch makes it, of zeroes or of a file.
    Nowhere,
    /// In RAM.
    Ram(RamPage),
    /// In the memory of the device with this number: a touch of the CPU brings it home.
    Device(usize),
    /// In the memory of the device with this number, where the CPU uses it too: a touch moves nothing.
    Coherent(usize),
    /// On its way.
    Moving,
}

impl DeviceVm {
    /// What each page is that holds some of `len` bytes at `pointer`: where it lives, and what this address
    /// space has mapped. Nothing faults, nothing moves, and it is out of date when it returns.
    ///
    /// # Errors
    ///
    /// `ZeroSized`; `Mm` when the engine has ended, or the system refused.
    ///
    /// # Examples
    ///
    /// ```
    /// use gpusvm::{ByteSize, PagePlace, SoftGpu, Svm};
    ///
    /// let svm = Svm::builder().device(SoftGpu::with_vram(ByteSize::mib(8))?).build()?;
    /// let mut xs = svm.alloc_slice::<u64>(1024)?;
    /// xs[0] = 3;
    /// let (first, len) = (xs.as_ptr(), ByteSize::kib(8));
    /// let look = || svm.vm(0).and_then(|vm| vm.snapshot(first, len));
    /// assert!(matches!(look()?[0].place, PagePlace::Ram(_)));
    /// assert_eq!(look()?[1].place, PagePlace::Nowhere);
    ///
    /// svm.vm(0)?.migrate(first, len)?;
    /// assert!(look()?.iter().all(|page| page.place == PagePlace::Device(0)));
    /// assert_eq!(svm.vm(0)?.migrate_back(first, len)?, 2);
    /// assert_eq!(xs[0], 3);
    /// # Ok::<(), gpusvm::Error>(())
    /// ```
    pub fn snapshot<T>(&self, pointer: *const T, len: ByteSize) -> Result<Vec<PageState>, Error> {
        let span = covering(pointer, len)?;
        self.process.settle_events();
        let looks = self.process.page_looks(span)?;
        let mut seen = vec![Seen::Absent; looks.len()];
        self.process.snapshot(span, &mut seen)?;
        let mapped = self.vm.mapped(span);
        let pages = looks.into_iter().zip(seen).zip(mapped);
        let state = |((look, seen), mapped): ((gpusvm_mm_linux::PageLook, Seen), _)| {
            let place = match (seen, look.ram) {
                (Seen::Device(page), _) => self.place_of(page, PagePlace::Device),
                (Seen::Coherent(page), _) => self.place_of(page, PagePlace::Coherent),
                (Seen::Moving, _) => PagePlace::Moving,
                (_, Some(page)) => PagePlace::Ram(page),
                (Seen::System | Seen::Unmapped | Seen::Absent, None) => PagePlace::Nowhere,
            };
            PageState {
                protection: look.protection,
                place,
                mapped,
            }
        };
        Ok(pages.map(state).collect())
    }

    /// Maps the memory that holds `len` bytes at `pointer` in this address space, for the device to do that
    /// with it without a fault. Pages stay where they are, unless only the memory of the device will do:
    /// one that does not reach RAM, or whose atomics do not work there. Pages of devices that this one
    /// does not reach come home.
    ///
    /// # Errors
    ///
    /// `ZeroSized`; `Populate` for the first page that cannot be mapped so: what is not mapped or cannot be
    /// read (`EFAULT`), a write to what cannot be written (`EPERM`), pages that kept changing (`EBUSY`).
    /// What comes before it is mapped.
    pub fn populate<T>(
        &self,
        pointer: *const T,
        len: ByteSize,
        access: Access,
    ) -> Result<(), Error> {
        let span = covering(pointer, len)?;
        self.process.settle_events();
        let populated = self.vm.populate(span, access);
        populated.map_err(|error| Error::Populate {
            device: self.device(),
            error: self.lacking(error),
        })
    }

    /// Moves the pages that hold `len` bytes at `pointer` to the device, and no others, as far as they can
    /// move, from wherever they are. Maps nothing: a touch of the device does, or [`DeviceVm::populate`].
    ///
    /// # Errors
    ///
    /// `ZeroSized`; `Migrate` with the first reason why a page did not move; the rest is tried all the same,
    /// unless nothing can move any more.
    pub fn migrate<T>(&self, pointer: *const T, len: ByteSize) -> Result<(), Error> {
        let span = covering(pointer, len)?;
        self.process.settle_events();
        let device = self.device();
        let moved = self.vm.migrate_pages(span, Cause::Asked);
        moved.map_err(|error| Error::Migrate { device, error })
    }

    /// Brings the pages home that hold some of `len` bytes at `pointer` and live on this device; those of
    /// others stay. Says how many. Pages that came together may come home together.
    ///
    /// # Errors
    ///
    /// `ZeroSized`; `Mm` with the first page that could not come.
    pub fn migrate_back<T>(&self, pointer: *const T, len: ByteSize) -> Result<u64, Error> {
        let span = covering(pointer, len)?;
        self.process.settle_events();
        let mut count = 0;
        for run in self.own_runs(span)? {
            self.vm.migrate_to_ram(run)?;
            count += run.page_count().get();
        }
        Ok(count)
    }

    /// The longest pieces of `span` that live on this device.
    fn own_runs(&self, span: Span) -> Result<Vec<Span>, Error> {
        let mut seen = vec![Seen::Absent; span.page_count().as_usize()];
        self.process.snapshot(span, &mut seen)?;
        let own = |seen: &Seen| match *seen {
            Seen::Device(page) | Seen::Coherent(page) => self.vm.region().pagemap().contains(page),
            _ => false,
        };
        let mut runs: Vec<Span> = Vec::new();
        for (page, _) in span.pages().zip(&seen).filter(|(_, seen)| own(seen)) {
            let page = Span::of_pages(page, PageCount::ONE);
            match runs.last_mut() {
                Some(run) if run.end() == page.start() => *run = run.union(page),
                _ => runs.push(page),
            }
        }
        Ok(runs)
    }

    fn place_of(&self, page: gpusvm_mm::DevicePage, kind: fn(usize) -> PagePlace) -> PagePlace {
        let pagemaps = self.vm.region().devices().pagemaps();
        let number = pagemaps
            .page_to_pagemap(page)
            .map(|pagemap| pagemap.peer().0);
        // Its device is just being taken down: everything of it comes home.
        number.map_or(PagePlace::Moving, |number| {
            kind(usize::try_from(number).expect("fewer devices than addresses"))
        })
    }

    /// What may not even be read is refused as that.
    fn lacking(&self, error: FaultError) -> FaultError {
        let FaultError::NotPermitted { at, .. } = error else {
            return error;
        };
        let vma = self.process.find_vma(at).ok().flatten();
        let readable = vma.is_some_and(|vma| vma.span.contains(at) && vma.readable);
        match readable {
            true => error,
            false => FaultError::NotPermitted {
                at,
                access: Access::Read,
            },
        }
    }
}

impl Svm {
    /// Brings every page home that lives on a device. The device stays in use: others may come at once.
    ///
    /// # Errors
    ///
    /// `NoDevice` when there is none with this number; `Evict` when pages could not leave, because a launch
    /// needs them there (`EBUSY`).
    pub fn evict(&self, device: usize) -> Result<(), Error> {
        let evicted = self.node(device)?.region.pagemap().evict_all(Cause::Asked);
        evicted.map_err(|error| Error::Evict { device, error })
    }
}

fn covering<T>(pointer: *const T, len: ByteSize) -> Result<Span, Error> {
    Span::covering(VirtAddr::from(pointer), len).map_err(|_| Error::ZeroSized)
}
