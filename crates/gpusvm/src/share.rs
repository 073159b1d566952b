//! Memory of the program's own: shared, and for how long.

use crate::{AdoptError, Error, Svm};
use gpusvm_mm::{AddressSpace, ArmToken, Mirror};
use gpusvm_mm_linux::Process;
use gpusvm_sync::Arc;
use gpusvm_types::{ByteSize, Span, VirtAddr};

impl Svm {
    /// Shares memory of the program's own: the whole pages in `len` bytes at `pointer`, which must be
    /// private and readable: anonymous, like a large `Vec` or an `mmap`, or of shared memory (`memfd`, a file
    /// of tmpfs), of which what the program has written migrates. It stays the program's, to
    /// use, to protect ([`Svm::protect`]) and to unmap. To move more than 2 MiB of it with one `mremap`, see
    /// [`Svm::adopt_as_one`].
    ///
    /// # Errors
    ///
    /// `Memory`, with which part of it cannot be shared, and why.
    pub fn adopt<T>(&self, pointer: *const T, len: ByteSize) -> Result<Adopted, Error> {
        let span = self.process.adopt(VirtAddr::from(pointer), len)?;
        Ok(Adopted::of(&self.process, span))
    }

    /// As [`Svm::adopt`], memory of any size that the program moves with `mremap` while it is shared.
    ///
    /// ```text
    ///   adopt         | RAM | device | RAM |   three mappings of the kernel: mremap of all is EFAULT
    ///   adopt_as_one  | RAM | device | RAM |   one: mremap moves all of it, or any part
    /// ```
    ///
    /// What a device uses is watched, and watched memory is a mapping of the kernel's own, of which `mremap`
    /// moves one at a time. So all of this memory is watched together, from when a device first uses any of
    /// it, or it is [advised](Svm::advise), until the sharing ends or the memory is unmapped. Where it was
    /// moved to, it is shared and watched too, until it is unmapped. What this returned does not end that:
    /// adopt the new place for something that does.
    ///
    /// The cost: from then on, where the CPU is the first to touch pages, anywhere in it, a message to another
    /// thread is needed for each 64 KiB, and no huge pages come there: filled page by page, fresh memory took 1.7
    /// times as long as memory that is not shared, in the `migration_cost` example of `gpusvm-mm-linux`. On
    /// the rung of user mode, a system call on pages that nobody has touched yet fails with `EFAULT`. So fill
    /// it first, or adopt with [`Svm::adopt`] what does not move.
    ///
    /// Memory that is several mappings of the kernel already stays several.
    ///
    /// # Errors
    ///
    /// As [`Svm::adopt`].
    pub fn adopt_as_one<T>(&self, pointer: *const T, len: ByteSize) -> Result<Adopted, Error> {
        let span = self.process.adopt_as_one(VirtAddr::from(pointer), len)?;
        Ok(Adopted::of(&self.process, span))
    }

    /// Shares what of the memory that holds `len` bytes at `pointer` can be shared and is not yet: whole
    /// pages, piece by piece. What cannot be is left as it is, for devices to use in place; what is shared
    /// already stays so, with whoever shared it. For who does not know what kind of memory it is.
    ///
    /// # Errors
    ///
    /// `ZeroSized`; `Memory` when there is no memory for it, or the engine has ended; `Mm` when the system
    /// does not tell what is mapped.
    pub fn adopt_all<T>(&self, pointer: *const T, len: ByteSize) -> Result<Vec<Adopted>, Error> {
        let span = Span::covering(VirtAddr::from(pointer), len).map_err(|_| Error::ZeroSized)?;
        // What was unmapped there before is shared no more.
        self.process.settle_events();
        let mut adopted = Vec::new();
        let mut rest = Some(span);
        // Each step ends behind the one before, at the end of a mapping, of what is shared, or of a gap.
        while let Some(left) = rest {
            let vma = self.process.find_vma(left.start())?;
            let Some(vma) = vma.filter(|vma| vma.span.start() < left.end()) else {
                break;
            };
            let Some(here) = vma.span.intersection(left) else {
                break;
            };
            let mirror = self.process.mirrored(here.start());
            let piece = mirror.span().intersection(here).unwrap_or(here);
            if let Mirror::Gap(_) = mirror {
                adopted.extend(self.adopt_if_it_can_be(piece)?);
            }
            rest = Span::new(piece.end(), span.end()).ok();
        }
        Ok(adopted)
    }

    /// `None` when it is of a kind that cannot be shared, or somebody else has it.
    fn adopt_if_it_can_be(&self, piece: Span) -> Result<Option<Adopted>, Error> {
        match self.process.adopt(piece.start(), piece.len()) {
            Ok(span) => Ok(Some(Adopted::of(&self.process, span))),
            Err(error @ (AdoptError::NoMemory { .. } | AdoptError::Gone)) => Err(error.into()),
            Err(_) => Ok(None),
        }
    }
}

/// Memory of the program's own that is shared. Dropping it ends the sharing: everything comes home.
#[derive(Debug)]
pub struct Adopted {
    process: Arc<Process>,
    span: Span,
    /// Which adoption: the memory may have been adopted again since.
    token: Option<ArmToken>,
}

impl Adopted {
    /// The pages that are shared.
    pub fn span(&self) -> Span {
        self.span
    }

    /// Whether they still are: nobody has adopted them again since, and, as far as is known, they were not
    /// unmapped.
    pub fn is_current(&self) -> bool {
        self.token.is_some() && self.process.adoption_of(self.span.start()) == self.token
    }

    fn of(process: &Arc<Process>, span: Span) -> Self {
        Self {
            process: Arc::clone(process),
            span,
            token: process.adoption_of(span.start()),
        }
    }
}

impl Drop for Adopted {
    fn drop(&mut self) {
        // Fails when the engine is gone, which brought everything home, or when a page cannot come
        // home, which the engine reports: then it stays shared.
        if let Some(token) = self.token {
            let _ = self.process.unadopt_if(self.span, token);
        }
    }
}
