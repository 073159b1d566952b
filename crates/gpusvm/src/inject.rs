//! Allocations that fail once, for who wants to see that his program, or this engine, does without.
//!
//! ```text
//!   DeviceMemory   a migration to the device finds no run of device pages: it takes them one by one
//!   HugePage       a block that comes home finds no huge page: it comes in base pages
//! ```
//!
//! Neither fails a migration: both make it take the way of many small steps.

use crate::driver::VramRegion;
use crate::{Error, Svm};
use gpusvm_mm_linux::Process;
use gpusvm_sync::{Arc, OneShot};

/// What is not to be had, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Injection {
    /// A run of pages in the memory of the device with this number. The next allocation there of more than
    /// one page is made of single pages, no two of them in a row.
    DeviceMemory(usize),
    /// A huge page for a block of 2 MiB that left RAM as one and comes home whole. It comes home in 512 base
    /// pages. On rungs that copy pages home, and where huge pages are never used, no block comes home in one.
    HugePage,
}

/// A failure that was asked for. Dropping it takes it back, unless it has happened.
#[derive(Debug)]
#[must_use = "dropping it takes it back"]
pub struct Injected(Step);

#[derive(Debug)]
enum Step {
    Device(Arc<VramRegion<Process>>),
    Home(Arc<Process>),
}

impl Svm {
    /// Has the next such allocation fail, whoever makes it. Asked for twice, it fails once.
    ///
    /// # Errors
    ///
    /// `NoDevice` when there is none with this number; `Mm` in a child of fork.
    ///
    /// # Examples
    ///
    /// ```
    /// use gpusvm::{ByteSize, Injection, SoftGpu, Svm};
    ///
    /// let svm = Svm::builder().device(SoftGpu::with_vram(ByteSize::mib(8))?).build()?;
    /// let mut xs = svm.alloc_slice::<u64>(1 << 18)?;
    /// xs[700] = 3;
    /// let failure = svm.inject(Injection::DeviceMemory(0))?;
    /// svm.vm(0)?.migrate(xs.as_ptr(), ByteSize::mib(2))?;
    /// assert!(failure.has_happened());
    /// assert_eq!(svm.vm(0)?.migrate_back(xs.as_ptr(), ByteSize::mib(2))?, 512);
    /// assert_eq!(xs[700], 3);
    /// # Ok::<(), gpusvm::Error>(())
    /// ```
    pub fn inject(&self, what: Injection) -> Result<Injected, Error> {
        self.process.check_ours()?;
        let step = match what {
            Injection::DeviceMemory(device) => Step::Device(Arc::clone(&self.node(device)?.region)),
            Injection::HugePage => Step::Home(Arc::clone(&self.process)),
        };
        let injected = Injected(step);
        injected.shot().arm();
        Ok(injected)
    }
}

impl Injected {
    /// Whether it has happened.
    pub fn has_happened(&self) -> bool {
        !self.shot().is_armed()
    }

    fn shot(&self) -> &OneShot {
        match &self.0 {
            Step::Device(region) => region.no_run(),
            Step::Home(process) => process.no_huge_page(),
        }
    }
}

impl Drop for Injected {
    fn drop(&mut self) {
        self.shot().disarm();
    }
}
