//! Memory of the device, over memory of the program.
//!
//! ```text
//!   the program's buffer      commands in, results out, by copies
//!         | ^
//!         v |
//!   the device's object       bound where the buffer is: so the device sees it there
//! ```
//!
//! # Differences from the suite
//!
//! There the program maps the object itself, and the device sees it at the same address. Here an object
//! has no address for the CPU: what the CPU reads and writes is copied.

use crate::buffer::Buffer;
use crate::engine::Engine;
use gpusvm::{ByteSize, Grid, Object, Span, SvmPtr};

/// An object that is bound over a buffer until this is dropped.
#[derive(Debug)]
pub(crate) struct Bound<'m> {
    engine: Engine<'m>,
    object: Object,
    span: Span,
}

impl<'m> Bound<'m> {
    /// An empty object.
    pub(crate) fn over(engine: Engine<'m>, buffer: &Buffer) -> Self {
        let (span, vm) = (buffer.span(), engine.vm());
        let object = engine
            .machine()
            .svm()
            .create_object(vm.device(), span.len());
        let object = object.expect("room for an object");
        vm.bind_object(span, &object, ByteSize::ZERO)
            .expect("no device has it mapped");
        Self {
            engine,
            object,
            span,
        }
    }

    /// Has the object hold what is in the buffer.
    pub(crate) fn write(&self, buffer: &Buffer) {
        let written = self.object.write(ByteSize::ZERO, buffer.bytes());
        written.expect("all of the object");
    }

    /// What is in the object.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.span.len().as_usize()];
        let read = self.object.read(ByteSize::ZERO, &mut bytes);
        read.expect("all of the object");
        bytes
    }

    /// Has the buffer hold what the device wrote into the object: in the buffer itself it did not.
    pub(crate) fn read(&self, buffer: &Buffer) {
        let bytes = self.bytes();
        assert_ne!(bytes, buffer.bytes(), "the device writes into the object");
        buffer.set(&bytes);
    }
}

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        let mirrored = self.engine.vm().bind_mirror(self.span);
        if !std::thread::panicking() {
            mirrored.expect("an open address space");
        }
    }
}

/// Binds a device object over memory, has the device write there, and binds the mirror again: the buffer
/// is what it was.
pub(crate) fn bind_and_unbind(engine: Engine<'_>, buffer: &Buffer) {
    const VALUE: u32 = 0x600d_600d;
    let bound = Bound::over(engine, buffer);
    let at = SvmPtr::from(buffer.at().cast::<u32>());
    let launch = engine.launch(Grid::new(1), move |lane| lane.store(at, VALUE));
    launch.wait().expect("a store into an object");
    let bytes = bound.bytes();
    assert_eq!(bytes[..4], VALUE.to_ne_bytes());
    assert!(bytes[4..].iter().all(|byte| *byte == 0), "an empty object");
    drop(bound);
    buffer.check_untouched(0, buffer.len());
}
