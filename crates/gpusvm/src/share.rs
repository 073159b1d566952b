//! Memory of the program's own, as much of it as can be shared.

use crate::{AdoptError, Adopted, Error, Svm};
use gpusvm_mm::{AddressSpace, Mirror};
use gpusvm_types::{ByteSize, Span, VirtAddr};

impl Svm {
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
