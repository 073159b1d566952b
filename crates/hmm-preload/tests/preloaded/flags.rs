//! What newer kernels have beside the tests of 6.12: allocations that fail, reads that wait for the program, and
//! which pages are exclusive.

mod large; // FLAGS: allocations that fail
mod back; // TO_SYS: what was named
mod exclusive; // EXCLUSIVE, and CHECK_EXCLUSIVE
mod unlocked; // READ_UNLOCKED: pages that the program keeps back

/// As `kit::is_preloaded`. Pages that show in the page map come home one by one: nothing large would be left to fail.
fn is_preloaded(test: &str) -> bool {
    crate::kit::is_preloaded_with(test, &[("GPUSVM_HMM_PAGEMAP", "0")])
}
