//! One test for each rule.
#![forbid(unsafe_code)]

mod layers; // which crate may depend on which
mod files; // what files must and must not have
mod pages; // what pages name exists
