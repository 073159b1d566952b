//! Page frames: real bytes, counted, shared after fork until somebody writes.

use gpusvm_sync::Arc;
use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_types::PAGE_SIZE;

/// The bytes of a page.
pub(crate) const PAGE_BYTES: usize = PAGE_SIZE.as_usize();
/// What is in memory that nobody wrote: a device that forgets to copy is found out.
const JUNK: u8 = 0xa5;

/// One page of RAM. A clone is a copy, and counts.
#[derive(Debug)]
pub(crate) struct Frame {
    bytes: Box<[u8; PAGE_BYTES]>,
    alive: Arc<AtomicU64>,
}

/// A frame that a page table or a slot has; two page tables share it after fork.
pub(crate) type FrameRef = Arc<Frame>;

/// Where frames come from.
#[derive(Clone, Debug, Default)]
pub(crate) struct Frames(Arc<AtomicU64>);

impl Frames {
    /// A page of zeroes.
    pub(crate) fn zeroed(&self) -> FrameRef {
        self.filled(0)
    }

    /// A page that has whatever was there.
    pub(crate) fn junk(&self) -> FrameRef {
        self.filled(JUNK)
    }

    /// How many there are.
    pub(crate) fn alive(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    fn filled(&self, byte: u8) -> FrameRef {
        self.0.fetch_add(1, Ordering::AcqRel);
        Arc::new(Frame {
            bytes: Box::new([byte; PAGE_BYTES]),
            alive: Arc::clone(&self.0),
        })
    }
}

impl Frame {
    /// To read.
    pub(crate) fn bytes(&self) -> &[u8; PAGE_BYTES] {
        &self.bytes
    }

    /// To write.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8; PAGE_BYTES] {
        &mut self.bytes
    }
}

impl Clone for Frame {
    fn clone(&self) -> Self {
        self.alive.fetch_add(1, Ordering::AcqRel);
        Self {
            bytes: self.bytes.clone(),
            alive: Arc::clone(&self.alive),
        }
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_count_and_sharing_does_not() {
        let frames = Frames::default();
        let mut frame = frames.zeroed();
        let shared = Arc::clone(&frame);
        assert_eq!(frames.alive(), 1);
        Arc::make_mut(&mut frame).bytes_mut()[0] = 1;
        assert_eq!((frames.alive(), shared.bytes()[0]), (2, 0));
        drop((frame, shared));
        assert_eq!(frames.alive(), 0);
    }
}
