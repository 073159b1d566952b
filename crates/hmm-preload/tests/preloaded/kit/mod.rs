//! What tests of the library have in common, and its benchmark.

mod started; // programs with the library
mod device; // a device, by a descriptor
mod command; // what it is asked for, and what it says
mod area; // memory
mod child; // children of fork, and the engine's threads

pub(crate) use area::{Area, HUGE, PAGE, READ_WRITE, Span, assert_same, huge_pages, pattern};
pub(crate) use child::{assert_child, engine_runs, fork};
pub(crate) use command::{Cmd, Do, is_local, request, seen};
pub(crate) use device::{DEVICES, Descriptor, Device};
pub(crate) use started::{
    again, assert_passes, assert_success, is_preloaded, is_preloaded_with, library, role,
};

/// The number of the error that was last.
pub(crate) fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap()
}
