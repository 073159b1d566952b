//! The conformance suite: what the engine promises a program, on every world and device.
//!
//! ```text
//!   case (generic)  x  World: sim, linux  x  device: faulting, declared; dmirror, softgpu
//!      |
//!      |-- anon, migrate, huge, fork, pair   the cases of the kernel's hmm-tests.c, by their names
//!      |-- bind                              what is bound where in a device address space
//!      |-- advice                            what the program says of its memory beforehand
//!      |-- coherent                          pages of a device that the CPU uses in place
//!      `-- windows, races                    what that suite lacks: things that happen at once
//! ```
//!
//! A case is a function of a [`Kit`], which makes a [`Bench`] for it: a new world with devices in it. When
//! the case is done the bench settles, and everything is checked across the layers.
//!
//! `docs/conformance.md` lists the cases and what each means.
#![expect(
    clippy::missing_panics_doc,
    reason = "a case panics when the engine is wrong: that is what it is for"
)]

mod bench; // a world with devices, and words to tell pages apart
mod kit; // which device, which seeds
mod anon; // read, write, permissions
mod migrate; // to the device and back
mod huge; // 2 MiB at once
mod fork; // children
mod pair; // two devices
mod files; // what is mapped in place
mod duplicate; // pages that are read in copies
mod coherent; // pages of a device that the CPU uses in place
mod advice; // what the program says beforehand
mod windows; // what happens while a copy is under way
mod races; // what happens at any time
mod bind; // what is bound where
mod prefetch; // what is wanted before it is touched
mod teardown; // devices that leave while all are at work

pub use bench::{Bench, Part, Places, Setup};
pub use kit::{Kit, Model};

/// Calls the macro `$then` with the names of all cases: `$then! { $with... ; name, name, ... }`.
#[macro_export]
macro_rules! conformance_cases {
    ($then:ident $(, $with:tt)*) => {
        $then! {
            $($with),* ;
            // As in the kernel's hmm-tests.c.
            open_close, anon_read, anon_read_prot, anon_write, anon_write_prot, anon_write_child,
            anon_write_child_shared, anon_write_huge, file_read, file_write, migrate,
            migrate_file_private, migrate_fault, migrate_release, migrate_shared, migrate_mixed,
            migrate_multiple, anon_read_multiple, anon_teardown, snapshot, compound, double_map,
            exclusive, exclusive_mprotect, exclusive_cow, hmm_cow_in_device,
            migrate_anon_huge_empty, migrate_anon_huge_zero, migrate_anon_huge_free,
            migrate_anon_huge_fault, migrate_partial_unmap_fault, migrate_remap_fault,
            migrate_anon_huge_err, migrate_anon_huge_zero_err,
            // What it lacks.
            unmap_during_copy, remap_during_copy, dontneed_during_copy, protect_during_migration,
            duplicate, duplicate_empty, duplicate_evicted, duplicate_racing_cpu_writes,
            duplicate_racing_device_writes, duplicate_racing_system_calls, duplicate_then_dontneed,
            duplicate_then_fork, duplicate_then_remap, duplicate_then_unmap, duplicate_then_write,
            coherent, coherent_empty, coherent_evicted, coherent_exclusive, coherent_of_two_devices,
            coherent_and_private, coherent_racing_dontneed, coherent_racing_exit, coherent_racing_fork,
            coherent_racing_moves, coherent_racing_peers, coherent_racing_remap, coherent_racing_unmap,
            coherent_then_dontneed, coherent_then_fork, coherent_then_remap, coherent_then_unmap,
            lost_cpu_writes_in_the_copy_window, device_pages_do_not_leak,
            what_is_left_of_a_cut_range_comes_home, a_device_ends_with_its_program,
            two_threads_fault_one_block, cpu_and_device_fault_one_block, migrate_racing_unmap,
            migrate_racing_dontneed, migrate_racing_remap, migrate_racing_fork,
            migrate_racing_exit, evict_racing_cpu_fault, two_devices_race_for_one_block,
            two_peers_race_for_one_block, prefetch_then_no_fault, prefetch_cancelled,
            prefetch_racing_unmap, prefetch_racing_cpu_touch, bo_map, bo_unmap, busy, bind_racing_faults,
            bind_over_memory_in_place, unbind_with_work_under_way, close_with_work_under_way,
            advised_places, advice_cuts_ranges, advice_lasts_as_long_as_its_mapping, advice_of_atomics,
            eviction_as_advised, contradictory_advice_of_two_devices, advise_racing_all_else,
        }
    };
}

/// Every test of the kernel's `hmm-tests.c` up to the newest.
pub const KERNEL: &[&str] = &[
    "open_close",
    "anon_read",
    "anon_read_prot",
    "anon_write",
    "anon_write_prot",
    "anon_write_child",
    "anon_write_child_shared",
    "anon_write_huge",
    "anon_write_hugetlbfs",
    "file_read",
    "file_write",
    "migrate",
    "migrate_file_private",
    "migrate_fault",
    "migrate_release",
    "migrate_shared",
    "migrate_mixed",
    "migrate_multiple",
    "anon_read_multiple",
    "anon_teardown",
    "mixedmap",
    "snapshot",
    "compound",
    "double_map",
    "exclusive",
    "exclusive_mprotect",
    "exclusive_cow",
    "hmm_gup_test",
    "hmm_cow_in_device",
    "migrate_anon_huge_empty",
    "migrate_anon_huge_zero",
    "migrate_anon_huge_free",
    "migrate_anon_huge_fault",
    "migrate_partial_unmap_fault",
    "migrate_remap_fault",
    "migrate_anon_huge_err",
    "migrate_anon_huge_zero_err",
    "benchmark_thp_migration",
    "userfaultfd_read",
];

/// Those that have no case here, and why.
pub const WITHOUT: &[(&str, &str)] = &[
    (
        "anon_write_hugetlbfs",
        "pages of hugetlbfs are never migrated and need a pool set aside by root; mapping in place is \
         what file_write tests",
    ),
    (
        "mixedmap",
        "there is no device file to map whose driver inserts pages of its own",
    ),
    (
        "hmm_gup_test",
        "the pins are taken by a test module of the kernel; there is nothing of the engine in it",
    ),
    (
        "benchmark_thp_migration",
        "a benchmark: times are measured by programs made for it, not asserted by tests",
    ),
    (
        "userfaultfd_read",
        "memory that the program registered with its own userfaultfd is refused by adopt, so no device \
         page of it exists",
    ),
];

macro_rules! names_of {
    (; $($name:ident),* $(,)?) => {
        /// The cases, by name.
        pub const CASES: &[&str] = &[$(stringify!($name)),*];
    };
}
conformance_cases!(names_of);

pub use advice::{
    advice_cuts_ranges, advice_lasts_as_long_as_its_mapping, advice_of_atomics,
    advise_racing_all_else, advised_places, contradictory_advice_of_two_devices,
    eviction_as_advised,
};
pub use anon::{
    anon_read, anon_read_multiple, anon_read_prot, anon_teardown, anon_write, anon_write_huge,
    anon_write_prot, compound, open_close,
};
pub use bind::{bind_over_memory_in_place, bind_racing_faults, bo_map, bo_unmap, busy};
pub use coherent::{
    coherent, coherent_and_private, coherent_empty, coherent_evicted, coherent_exclusive,
    coherent_of_two_devices, coherent_racing_dontneed, coherent_racing_exit, coherent_racing_fork,
    coherent_racing_moves, coherent_racing_peers, coherent_racing_remap, coherent_racing_unmap,
    coherent_then_dontneed, coherent_then_fork, coherent_then_remap, coherent_then_unmap,
};
pub use duplicate::{
    duplicate, duplicate_empty, duplicate_evicted, duplicate_racing_cpu_writes,
    duplicate_racing_device_writes, duplicate_racing_system_calls, duplicate_then_dontneed,
    duplicate_then_fork, duplicate_then_remap, duplicate_then_unmap, duplicate_then_write,
};
pub use files::{file_read, file_write, migrate_file_private, migrate_shared};
pub use fork::{anon_write_child, anon_write_child_shared, exclusive_cow, hmm_cow_in_device};
pub use huge::{
    migrate_anon_huge_empty, migrate_anon_huge_err, migrate_anon_huge_fault,
    migrate_anon_huge_free, migrate_anon_huge_zero, migrate_anon_huge_zero_err,
    migrate_partial_unmap_fault, migrate_remap_fault,
};
pub use migrate::{
    a_device_ends_with_its_program, device_pages_do_not_leak, exclusive, exclusive_mprotect,
    migrate, migrate_fault, migrate_multiple, migrate_release,
    what_is_left_of_a_cut_range_comes_home,
};
pub use pair::{
    double_map, migrate_mixed, snapshot, two_devices_race_for_one_block,
    two_peers_race_for_one_block,
};
pub use prefetch::{
    prefetch_cancelled, prefetch_racing_cpu_touch, prefetch_racing_unmap, prefetch_then_no_fault,
};
pub use races::{
    cpu_and_device_fault_one_block, evict_racing_cpu_fault, lost_cpu_writes_in_the_copy_window,
    migrate_racing_dontneed, migrate_racing_exit, migrate_racing_fork, migrate_racing_remap,
    migrate_racing_unmap, two_threads_fault_one_block,
};
pub use teardown::{close_with_work_under_way, unbind_with_work_under_way};
pub use windows::{
    dontneed_during_copy, protect_during_migration, remap_during_copy, unmap_during_copy,
};
