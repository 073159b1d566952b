//! One typed ioctl: an opcode, and a structure that the kernel reads and writes.

use core::ffi::c_void;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};

/// An ioctl that is about to be made.
pub(super) struct Call<'a, T> {
    // INVARIANT: `opcode` reads and writes one `T` at its argument.
    opcode: Opcode,
    argument: &'a mut T,
}

impl<'a, T> Call<'a, T> {
    /// `opcode` with `argument`.
    ///
    /// # Safety
    ///
    /// `opcode` must be an ioctl whose argument is a pointer to one `T`, which the kernel may
    /// read and write. Addresses inside `argument` must be good for what the ioctl does there.
    pub(super) const unsafe fn new(opcode: Opcode, argument: &'a mut T) -> Self {
        Self { opcode, argument }
    }
}

// SAFETY: by the invariant the pointer goes with the opcode, it is good for the length of the
// call, and nothing is read back through it.
unsafe impl<T> Ioctl for Call<'_, T> {
    type Output = IoctlOutput;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        core::ptr::from_mut(self.argument).cast()
    }

    unsafe fn output_from_ptr(
        output: IoctlOutput,
        _argument: *mut c_void,
    ) -> rustix::io::Result<Self::Output> {
        Ok(output)
    }
}
