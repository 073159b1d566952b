//! A page as one byte, as `HMM_DMIRROR_SNAPSHOT` tells it.

use gpusvm::{PagePlace, PageState, Protection};

/// Not mapped, or not readable.
const ERROR: u8 = 0xff;
/// Nothing there that the device could read without a fault.
const NONE: u8 = 0;
/// To read.
const READ: u8 = 1;
/// To write.
const WRITE: u8 = 2;
/// Part of a huge page.
const PMD: u8 = 4;
/// The page of zeroes.
const ZERO: u8 = 0x10;
/// In the memory of this device, out of the CPU's reach.
const PRIVATE_LOCAL: u8 = 0x20;
/// In the memory of this device, where the CPU uses it.
const COHERENT_LOCAL: u8 = 0x40;
/// In the memory of another device, where the CPU uses it.
const COHERENT_REMOTE: u8 = 0x50;

/// What `state` is for a program of device `device`.
pub(crate) fn byte(state: &PageState, device: usize) -> u8 {
    let writable = match state.protection {
        None | Some(Protection::None) => return ERROR,
        Some(Protection::Read) => false,
        Some(Protection::ReadWrite) => true,
    };
    let allows = |may_write| if may_write { WRITE } else { READ };
    match state.place {
        PagePlace::Ram(page) => {
            let kind = if page.zero { ZERO } else { 0 };
            let size = if page.huge { PMD } else { 0 };
            kind | size | allows(writable && !page.copied_on_write)
        }
        // It is not mapped then, for whoever does not fault.
        PagePlace::Device(_) if state.exclusive => NONE,
        PagePlace::Device(at) if at == device => {
            let size = if state.huge_on_device { PMD } else { 0 };
            PRIVATE_LOCAL | size | allows(writable)
        }
        PagePlace::Coherent(at) if at == device => COHERENT_LOCAL | allows(writable),
        PagePlace::Coherent(_) => COHERENT_REMOTE | allows(writable),
        // The kernel has no private page there for anybody but the device that has it.
        _ => NONE,
    }
}
