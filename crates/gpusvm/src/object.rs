//! Memory of a device.

use crate::Error;
use crate::driver::{self, ObjectError};
use gpusvm_mm_linux::Process;
use gpusvm_sync::Arc;
use gpusvm_types::{ByteSize, DmaAddr, VirtAddr};

/// Memory of a device that is nobody's RAM ([`Svm::create_object`](crate::Svm::create_object)).
///
/// The device sees it where it is bound; the CPU reads and writes it by copies. It stays in device memory as
/// long as it lives, and is given back when it is dropped and bound nowhere any more.
#[derive(Debug)]
pub struct Object {
    device: usize,
    process: Arc<Process>,
    object: driver::Object<Process>,
}

/// How much is copied at once, by way of memory that no device and no engine moves.
const PIECE: usize = 256 << 10;

impl Object {
    pub(crate) fn new(
        process: &Arc<Process>,
        device: usize,
        created: Result<driver::Object<Process>, ObjectError>,
    ) -> Result<Self, Error> {
        match created {
            Ok(object) => Ok(Self {
                device,
                process: Arc::clone(process),
                object,
            }),
            Err(error) => Err(Error::Object { device, error }),
        }
    }

    pub(crate) fn of_driver(&self) -> &driver::Object<Process> {
        &self.object
    }

    /// The number of its device.
    pub fn device(&self) -> usize {
        self.device
    }

    /// How large it is: whole pages.
    pub fn size(&self) -> ByteSize {
        self.object.size()
    }

    /// Reads what is in it from `offset` on. What a launch writes there meanwhile may be seen in part.
    ///
    /// # Errors
    ///
    /// `Object`: not all of that is in the object (`EINVAL`), or the copy failed (`EIO`). `Mm` in a child of
    /// fork.
    pub fn read(&self, offset: ByteSize, into: &mut [u8]) -> Result<(), Error> {
        self.check(offset, into.len())?;
        let mut piece = vec![0; PIECE.min(into.len())];
        let mut at = offset;
        for part in into.chunks_mut(PIECE) {
            let len = ByteSize::from_usize(part.len());
            let copied = self.object.copy_to_ram(at, bus(piece.as_mut_ptr()), len);
            self.told(copied)?;
            part.copy_from_slice(&piece[..part.len()]);
            at += len;
        }
        Ok(())
    }

    /// Writes to it from `offset` on. A launch that reads it meanwhile may see it in part.
    ///
    /// # Errors
    ///
    /// As [`Object::read`]; part of it may be written when a copy fails.
    pub fn write(&self, offset: ByteSize, from: &[u8]) -> Result<(), Error> {
        self.check(offset, from.len())?;
        let mut piece = vec![0; PIECE.min(from.len())];
        let mut at = offset;
        for part in from.chunks(PIECE) {
            let len = ByteSize::from_usize(part.len());
            piece[..part.len()].copy_from_slice(part);
            let copied = self.object.copy_from_ram(at, bus(piece.as_mut_ptr()), len);
            self.told(copied)?;
            at += len;
        }
        Ok(())
    }

    /// All of it is there, before any of it is copied.
    fn check(&self, offset: ByteSize, len: usize) -> Result<(), Error> {
        self.process.check_ours()?;
        let pieces = self.object.pieces(offset, ByteSize::from_usize(len));
        self.told(pieces.map(drop))
    }

    fn told(&self, done: Result<(), ObjectError>) -> Result<(), Error> {
        let device = self.device;
        done.map_err(|error| Error::Object { device, error })
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        // In a child of fork it is not the child's to give back.
        if self.process.is_inherited() {
            core::mem::forget(self.object.clone());
        }
    }
}

/// Where the device reaches memory of this process.
fn bus(pointer: *mut u8) -> DmaAddr {
    DmaAddr::new(VirtAddr::from(pointer).get())
}
