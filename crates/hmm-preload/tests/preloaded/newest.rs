//! What the kernel's HMM self-tests gained after Linux 6.12, as tests of our own through the same interface: by
//! their names and with their meaning. None of their code is here. Each goes through its table.

mod partial; // memory that is unmapped in part
mod remap; // memory that moves
mod huge; // huge pages: untouched, zero, freed
mod child; // a child of fork
