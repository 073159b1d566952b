//! Bytes through the eyes of a device: read and written through its own translation.
//!
//! One lane does it, page by page, so that what is done is done in order. It keeps a page at a time on
//! its stack: what a unit writes to while it is in flight must not be memory that could fault.

use crate::{DeviceVm, Error, Grid, Launch};
use gpusvm_softgpu::{Lane, LaneError, SvmPtr};
use gpusvm_sync::{Arc, Mutex};
use gpusvm_types::{ByteSize, PAGE_SIZE, VirtAddr};

/// What a lane moves at a time.
const PIECE: usize = 4096;
const _: () = assert!(PAGE_SIZE.get() == PIECE as u64);

impl DeviceVm {
    /// The device reads the bytes at `from`. It faults like any lane where nothing is mapped.
    ///
    /// # Errors
    ///
    /// As [`DeviceVm::launch_resident`]; `Launch` with the first byte that the device could not read: then
    /// nothing is in `into` yet.
    ///
    /// # Safety
    ///
    /// As [`Svm::launch`](crate::Svm::launch), of a kernel that reads these bytes.
    #[expect(
        unsafe_code,
        reason = "a promise to the caller that only the caller can keep"
    )]
    pub unsafe fn read(&self, from: *const u8, into: &mut [u8]) -> Result<(), Error> {
        let mut bytes = Vec::new();
        // SAFETY: as the caller promises.
        unsafe { self.read_behind(from, ByteSize::from_usize(into.len()), &mut bytes) }?;
        into.copy_from_slice(&bytes);
        Ok(())
    }

    /// As [`DeviceVm::read`], `len` bytes, which come behind those that are in `into`: a copy less.
    ///
    /// # Errors
    ///
    /// As [`DeviceVm::read`]: then `into` has what it had before.
    ///
    /// # Safety
    ///
    /// As [`DeviceVm::read`].
    #[expect(
        unsafe_code,
        reason = "a promise to the caller that only the caller can keep"
    )]
    pub unsafe fn read_behind(
        &self,
        from: *const u8,
        len: ByteSize,
        into: &mut Vec<u8>,
    ) -> Result<(), Error> {
        let (len, before) = (len.as_usize(), into.len());
        into.reserve_exact(len);
        let at = VirtAddr::from(from);
        let bytes = Arc::new(Mutex::new(core::mem::take(into)));
        let filled = Arc::clone(&bytes);
        let kernel = move |lane: &mut Lane<'_>| load(lane, at, (len, &filled));
        // SAFETY: as the caller promises.
        let launch = unsafe { self.launch(Grid::new(1), kernel) };
        let read = launch.and_then(Launch::wait);
        *into = core::mem::take(&mut *bytes.lock());
        if read.is_err() {
            into.truncate(before);
        }
        read.map(drop)
    }

    /// The device writes `bytes` to `to`, from the first to the last. It faults like any lane where nothing is
    /// mapped to write.
    ///
    /// # Errors
    ///
    /// As [`DeviceVm::launch_resident`]; `Launch` with the first byte that the device could not write: what
    /// comes before its page is written.
    ///
    /// # Safety
    ///
    /// As [`Svm::launch`](crate::Svm::launch), of a kernel that writes these bytes.
    #[expect(
        unsafe_code,
        reason = "a promise to the caller that only the caller can keep"
    )]
    pub unsafe fn write(&self, to: *mut u8, bytes: &[u8]) -> Result<(), Error> {
        let at = VirtAddr::from(to.cast_const());
        let bytes = bytes.to_vec();
        let kernel = move |lane: &mut Lane<'_>| store(lane, at, &bytes);
        // SAFETY: as the caller promises.
        let launch = unsafe { self.launch(Grid::new(1), kernel) }?;
        launch.wait()?;
        Ok(())
    }
}

fn load(
    lane: &mut Lane<'_>,
    at: VirtAddr,
    (len, into): (usize, &Mutex<Vec<u8>>),
) -> Result<(), LaneError> {
    let mut piece = [0u8; PIECE];
    let mut done = 0;
    while done < len {
        let from = SvmPtr::<u8>::new(at).add(done);
        let here = (len - done).min(rest_of_page(from));
        lane.load_tile(from, &mut piece[..here])?;
        into.lock().extend_from_slice(&piece[..here]);
        done += here;
    }
    Ok(())
}

fn store(lane: &mut Lane<'_>, at: VirtAddr, bytes: &[u8]) -> Result<(), LaneError> {
    let mut piece = [0u8; PIECE];
    let mut done = 0;
    while done < bytes.len() {
        let to = SvmPtr::<u8>::new(at).add(done);
        let here = (bytes.len() - done).min(rest_of_page(to));
        piece[..here].copy_from_slice(&bytes[done..done + here]);
        lane.store_tile(to, &piece[..here])?;
        done += here;
    }
    Ok(())
}

/// How many bytes there are from here to the end of the page.
fn rest_of_page(at: SvmPtr<u8>) -> usize {
    let offset = at.addr().get() % PAGE_SIZE.get();
    usize::try_from(PAGE_SIZE.get() - offset).expect("less than a page")
}
