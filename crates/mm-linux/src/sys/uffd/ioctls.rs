//! Opcodes and modes, where the bindings have none of their own.

use linux_raw_sys::general as raw;
use rustix::ioctl::{Opcode, opcode};

const GROUP: u8 = 0xAA;

pub(super) const API: Opcode = opcode::read_write::<raw::uffdio_api>(GROUP, 0x3F);
pub(super) const REGISTER: Opcode = opcode::read_write::<raw::uffdio_register>(GROUP, 0x00);
pub(super) const UNREGISTER: Opcode = opcode::read::<raw::uffdio_range>(GROUP, 0x01);
pub(super) const WAKE: Opcode = opcode::read::<raw::uffdio_range>(GROUP, 0x02);
pub(super) const COPY: Opcode = opcode::read_write::<raw::uffdio_copy>(GROUP, 0x03);
pub(super) const ZEROPAGE: Opcode = opcode::read_write::<raw::uffdio_zeropage>(GROUP, 0x04);
pub(super) const MOVE: Opcode = opcode::read_write::<raw::uffdio_move>(GROUP, 0x05);
pub(super) const WRITEPROTECT: Opcode = opcode::read_write::<raw::uffdio_writeprotect>(GROUP, 0x06);
pub(super) const CONTINUE: Opcode = opcode::read_write::<raw::uffdio_continue>(GROUP, 0x07);
pub(super) const POISON: Opcode = opcode::read_write::<raw::uffdio_poison>(GROUP, 0x08);

/// `USERFAULTFD_IOC_NEW`, on `/dev/userfaultfd`.
pub(super) const DEVICE_NEW: Opcode = opcode::none(GROUP, 0x00);

pub(super) const MOVE_MODE_DONTWAKE: u32 = 1 << 0;
pub(super) const MOVE_MODE_ALLOW_SRC_HOLES: u32 = 1 << 1;
pub(super) const CONTINUE_MODE_WP: u32 = 1 << 1;
pub(super) const POISON_MODE_DONTWAKE: u32 = 1 << 0;
pub(super) const WRITEPROTECT_MODE_WP: u32 = 1 << 0;
pub(super) const WRITEPROTECT_MODE_DONTWAKE: u32 = 1 << 1;

#[cfg(test)]
mod tests {
    use super::*;
    use linux_raw_sys::ioctl as known;

    #[test]
    fn opcodes_are_those_of_the_bindings_where_these_have_them() {
        for (ours, theirs) in [
            (API, known::UFFDIO_API),
            (REGISTER, known::UFFDIO_REGISTER),
            (UNREGISTER, known::UFFDIO_UNREGISTER),
            (WAKE, known::UFFDIO_WAKE),
            (COPY, known::UFFDIO_COPY),
            (ZEROPAGE, known::UFFDIO_ZEROPAGE),
            (WRITEPROTECT, known::UFFDIO_WRITEPROTECT),
            (CONTINUE, known::UFFDIO_CONTINUE),
            (MOVE, 0xC028_AA05),
            (POISON, 0xC020_AA08),
        ] {
            assert_eq!(ours, theirs, "{ours:#x} and {theirs:#x}");
        }
    }
}
