//! The library in programs that know nothing of it: what they do with descriptors, address space, threads,
//! children and other programs.

mod descriptors; // every way to open and to close
mod children; // of fork, vfork and exec, and what they inherit
mod programs; // of the system, that do not know of the device
mod opened; // programs that have it open
mod holes; // in the address space of a program
mod racing; // threads that open, close and run commands at once
mod report; // of devices that are opened and closed
