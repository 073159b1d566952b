//! One test for each rule.
#![forbid(unsafe_code)]

mod layers; // which crate may depend on which
mod files; // what files must and must not have
mod pages; // what pages name exists
mod bounds; // how every loop of the fault path ends
mod kernel_map; // what the kernel has is there, or why not
mod kernel_names; // what the kernel has
