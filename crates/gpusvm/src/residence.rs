//! Where pages are and what a device has mapped, page by page: looked at, and changed on request.
//!
//! ```text
//!   snapshot        what is where; nothing faults        HMM_PFN_* without a request
//!   populate        mapped where it is; no page moves    hmm_range_fault
//!   populate_unlocked  the same, and waits for the program's own userfaultfd
//!   migrate         pages to the device; nothing mapped  migrate_vma
//!   migrate_back    the device's own pages home          migrate_vma
//!   make_exclusive  to the device, for itself            make_device_exclusive
//! ```

use crate::{Access, DeviceVm, Error, Protection, Svm};
use gpusvm_device::FaultError;
use gpusvm_mm::{AddressSpace, DeviceRun, Mirror, Seen};
use gpusvm_mm_linux::{FaultInError, PageLook, RamPage, Wait};
use gpusvm_pagemap::{Cause, migrate_back};
use gpusvm_types::{BLOCK_SIZE, ByteSize, PageCount, PageIndex, Span, VirtAddr};

/// A page, as it was when somebody looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageState {
    /// What its mapping in the process allows. `None`: there is no mapping.
    pub protection: Option<Protection>,
    /// Where it is.
    pub place: PagePlace,
    /// What the device may do with it without a fault: the most of what the device has mapped. Nothing where
    /// nobody has made the page yet, and no engine would.
    pub mapped: Option<Access>,
    /// Whether the device has it for itself: [`DeviceVm::make_exclusive`].
    pub exclusive: bool,
    /// Of a page on a device: the 2 MiB around it are there in one piece, which one entry of a page table
    /// maps. A page of RAM says for itself ([`RamPage::huge`]).
    pub huge_on_device: bool,
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
        let seen = self.process.seen_elsewhere(span)?;
        let huge = self.huge_on_device(span, &seen)?;
        let mapped = self.vm.mapped(span);
        let pagemap = self.vm.region().pagemap();
        let looks = looks.into_iter().zip(seen);
        let pages = span.pages().zip(looks.zip(mapped.into_iter().zip(huge)));
        type Known = ((PageLook, Seen), (Option<Access>, bool));
        let state = |(page, ((look, seen), (mapped, huge_on_device))): (PageIndex, Known)| {
            let place = match (seen, look.ram) {
                _ if look.protection.is_none() => PagePlace::Nowhere,
                (Seen::Device(page), _) => self.place_of(page, PagePlace::Device),
                (Seen::Coherent(page), _) => self.place_of(page, PagePlace::Coherent),
                (Seen::Moving, _) => PagePlace::Moving,
                (_, Some(page)) => PagePlace::Ram(page),
                (Seen::System | Seen::Unmapped | Seen::Absent, None) => PagePlace::Nowhere,
            };
            let is_to_be_made = (place == PagePlace::Nowhere || look.swapped)
                && matches!(self.process.mirrored(page.start()), Mirror::Gap(_));
            PageState {
                protection: look.protection,
                place,
                mapped: mapped.filter(|_| !is_to_be_made),
                exclusive: matches!(seen, Seen::Device(page) if pagemap.is_exclusive(page)),
                huge_on_device,
            }
        };
        Ok(pages.map(state).collect())
    }

    /// Maps the memory that holds `len` bytes at `pointer` in this address space, for the device to do that
    /// with it without a fault. Pages stay where they are, unless only the memory of the device will do:
    /// one that does not reach RAM, or whose atomics do not work there. Pages of devices that this one
    /// does not reach come home. Pages of memory that is not shared, and that are not there yet, are made, as a
    /// read of the CPU makes them.
    ///
    /// # Errors
    ///
    /// `ZeroSized`; `Populate` for the first page that cannot be mapped so: what is not mapped or cannot be
    /// read (`EFAULT`), a write to what cannot be written (`EPERM`), pages that kept changing (`EBUSY`).
    /// What comes before it is mapped. Before all of that, `KeptBack` (`EFAULT`) for pages that a userfaultfd of
    /// the program has to make: then nothing is mapped.
    pub fn populate<T>(
        &self,
        pointer: *const T,
        len: ByteSize,
        access: Access,
    ) -> Result<(), Error> {
        self.populate_in((covering(pointer, len)?, access), Wait::Never)
    }

    /// As [`DeviceVm::populate`], and waits for pages that a userfaultfd of the program has to make: for its
    /// handler, as long as that takes. No device and nothing of the engine is kept waiting meanwhile. If the
    /// memory is unmapped under it, it waits no more.
    ///
    /// # Errors
    ///
    /// As [`DeviceVm::populate`]: `Unmapped` for what was unmapped, `KeptBack` for what no handler can make.
    pub fn populate_unlocked<T>(
        &self,
        pointer: *const T,
        len: ByteSize,
        access: Access,
    ) -> Result<(), Error> {
        self.populate_in((covering(pointer, len)?, access), Wait::ForHandler)
    }

    fn populate_in(&self, (span, access): (Span, Access), wait: Wait) -> Result<(), Error> {
        self.process.settle_events();
        let device = self.device();
        match self.process.fault_in(span, wait) {
            Ok(()) => {}
            Err(FaultInError::Mm(error)) => return Err(error.into()),
            Err(FaultInError::KeptBack { at }) => {
                let error = FaultError::KeptBack { at };
                return Err(Error::Populate { device, error });
            }
            Err(FaultInError::Gone { at }) => {
                let error = FaultError::Unmapped { at };
                return Err(Error::Populate { device, error });
            }
        }
        let populated = self.vm.populate(span, access);
        populated.map_err(|error| Error::Populate {
            device,
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

    /// Brings the pages home that hold some of `len` bytes at `pointer` and live on this device, and no
    /// others: those of other devices stay, and so does what came here together with them. Says how many came.
    /// Timeslices do not hold; launches that need pages do, and are waited for.
    ///
    /// # Errors
    ///
    /// `ZeroSized`; `Migrate` with why pages could not come (`EBUSY`: a launch needs them).
    pub fn migrate_back<T>(&self, pointer: *const T, len: ByteSize) -> Result<u64, Error> {
        let span = covering(pointer, len)?;
        self.process.settle_events();
        let device = self.device();
        let pagemap = self.vm.region().pagemap();
        let came = migrate_back::migrate_back(pagemap, span, Cause::Asked);
        let came = came.map_err(|error| Error::Migrate { device, error })?;
        Ok(came.get())
    }

    /// Which pages of `span`, of which `seen` tells, are of a block that is in one piece on a device.
    fn huge_on_device(&self, span: Span, seen: &[Seen]) -> Result<Vec<bool>, Error> {
        let mut huge = vec![false; seen.len()];
        for piece in span.blocks() {
            let first = span.index_of(piece.first_page());
            if !matches!(seen[first], Seen::Device(_)) {
                continue;
            }
            let block = Span::block_of(piece.start());
            let pages = first..first + piece.page_count().as_usize();
            let is_huge = match piece == block {
                true => is_one_piece(&seen[pages.clone()]),
                false => is_one_piece(&self.process.seen_elsewhere(block)?),
            };
            huge[pages].fill(is_huge);
        }
        Ok(huge)
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

    /// What of its memory a device has in use: the pages of the process that live there, and the bytes that
    /// anything takes. Pages that have just gone home may still take some for a moment.
    ///
    /// # Errors
    ///
    /// `NoDevice` when there is none with this number.
    pub fn in_use(&self, device: usize) -> Result<(u64, ByteSize), Error> {
        let region = &self.node(device)?.region;
        let pages = region.pagemap().pages_in_use();
        Ok((pages.get(), region.used().bytes()))
    }
}

/// Whether all pages of a block are on one device, one after the other, and begin as a large entry of a page
/// table does.
fn is_one_piece(block: &[Seen]) -> bool {
    let Some(&Seen::Device(first)) = block.first() else {
        return false;
    };
    let run = |count| DeviceRun {
        first,
        count: PageCount::from_usize(count),
    };
    let follows = |(n, seen): (usize, &Seen)| match *seen {
        Seen::Device(page) => n == 0 || run(n).continues_with(page),
        _ => false,
    };
    first.pfn.dev_addr().get().is_multiple_of(BLOCK_SIZE.get())
        && block.iter().enumerate().all(follows)
}

pub(crate) fn covering<T>(pointer: *const T, len: ByteSize) -> Result<Span, Error> {
    Span::covering(VirtAddr::from(pointer), len).map_err(|_| Error::ZeroSized)
}
