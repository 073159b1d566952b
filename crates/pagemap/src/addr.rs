//! How a device reaches a page: `drm_pagemap_addr`.

use gpusvm_types::{ByteSize, DevAddr, DmaAddr};

/// A page as a device reaches it. The variant is the kernel's `protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagemapAddr {
    /// RAM, in place.
    System(DmaAddr),
    /// The device's own memory.
    Vram(DevAddr),
    /// The memory of another device, by its bus address.
    Peer(DmaAddr),
}

impl PagemapAddr {
    /// Whether `next` is what follows a page at this address after `len` bytes.
    pub fn continues_with(self, next: Self, len: ByteSize) -> bool {
        match (self, next) {
            (Self::System(a), Self::System(b)) | (Self::Peer(a), Self::Peer(b)) => a + len == b,
            (Self::Vram(a), Self::Vram(b)) => a + len == b,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_neighbours_of_one_protocol_continue() {
        let (a, b) = (DmaAddr::new(0x1000), DmaAddr::new(0x2000));
        let len = ByteSize::new(0x1000);
        assert!(PagemapAddr::System(a).continues_with(PagemapAddr::System(b), len));
        assert!(PagemapAddr::Peer(a).continues_with(PagemapAddr::Peer(b), len));
        assert!(!PagemapAddr::Peer(a).continues_with(PagemapAddr::System(b), len));
        assert!(!PagemapAddr::System(b).continues_with(PagemapAddr::System(a), len));
    }
}
