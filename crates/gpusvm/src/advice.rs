//! What the program says of its memory beforehand.

use crate::driver::{Advice, AdviseError, Advised};
use crate::{Error, Svm, SvmSlice};
use gpusvm_mm::{AddressSpace, Mirror};
use gpusvm_mm_linux::Plain;
use gpusvm_types::{ByteSize, Span, VirtAddr};

impl Svm {
    /// Advises something of the shared pages that hold any of `len` bytes at `pointer`, for all devices:
    /// see [`advice`](crate::driver::advice) for what counts when advice contradicts itself, and how
    /// long it lasts. Pages at the ends that are only partly meant count if they are shared.
    ///
    /// ```
    /// # use gpusvm::{ByteSize, Error, SoftGpu, Svm};
    /// use gpusvm::{Advice, Preferred};
    /// # let svm = Svm::builder().device(SoftGpu::with_vram(ByteSize::mib(4))?).build()?;
    /// let xs = svm.alloc_slice::<u64>(1 << 16)?;
    /// svm.advise_slice(&xs, Advice::PreferredLocation(Preferred::Device(0)))?;
    /// svm.advise(xs.as_ptr(), ByteSize::kib(4), Advice::ReadMostly(true))?;
    /// let advised = svm.advice(xs.as_ptr(), ByteSize::kib(64))?;
    /// assert_eq!(advised.len(), 2);
    /// assert!(advised[0].attributes.read_mostly && !advised[1].attributes.read_mostly);
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// `ZeroSized`, or `Advise`: memory that is not shared, with which of it is not (`ENOENT`), a device that is not
    /// there (`ENODEV`), a granularity that is none (`EINVAL`). `Mm` when the engine is its parent's.
    pub fn advise<T>(&self, pointer: *const T, len: ByteSize, advice: Advice) -> Result<(), Error> {
        self.process.check_ours()?;
        // Memory that moved is shared where it is now.
        self.process.settle_events();
        let span = self.span_of(VirtAddr::from(pointer), len)?;
        Ok(self.nodes[0].vm.advise(span, advice)?)
    }

    /// As [`Svm::advise`], of all of a slice.
    ///
    /// # Errors
    ///
    /// As [`Svm::advise`].
    pub fn advise_slice<T: Plain>(&self, slice: &SvmSlice<T>, advice: Advice) -> Result<(), Error> {
        self.process.check_ours()?;
        Ok(self.nodes[0].vm.advise(slice.span(), advice)?)
    }

    /// What is advised of the pages that hold any of `len` bytes at `pointer`: ascending, without holes,
    /// also where that is nothing.
    ///
    /// # Errors
    ///
    /// `ZeroSized`, or `Mm` when the engine is its parent's.
    pub fn advice<T>(&self, pointer: *const T, len: ByteSize) -> Result<Vec<Advised>, Error> {
        let span = Span::covering(VirtAddr::from(pointer), len).map_err(|_| Error::ZeroSized)?;
        self.process.check_ours()?;
        Ok(self.nodes[0].vm.advice(span))
    }

    /// Memory is shared by whole pages: what was adopted leaves out those that are at its ends in part.
    fn span_of(&self, at: VirtAddr, len: ByteSize) -> Result<Span, Error> {
        let span = Span::covering(at, len).map_err(|_| Error::ZeroSized)?;
        let is_shared =
            |page: Span| matches!(self.process.mirrored(page.start()), Mirror::Mapping(_));
        let (mut start, mut end) = (span.start(), span.end());
        let first = Span::page_of(start);
        if at > start && !is_shared(first) {
            start = first.end();
        }
        let last = span.pages().next_back().expect("a span has a page");
        let last = Span::page_of(last.start());
        if at + len < end && !is_shared(last) {
            end = last.start();
        }
        let shared = Span::new(start, end);
        shared.map_err(|_| AdviseError::NotMirrored { span }.into())
    }
}
