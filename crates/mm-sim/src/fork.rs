//! What fork does: everything comes home first, the child gets plain memory. And the end.
//!
//! ```text
//!   close the gate, wait for who moves pages to devices, bring all pages home
//!   copy the page table: both share the frames until one of them writes
//!   open the gate
//! ```
//!
//! Whoever locks a block that pages can leave holds a [`Pass`], and has it before the block. A CPU
//! fault, which only brings pages home, needs none.

use crate::Sim;
use crate::access::{Signal, word_at};
use crate::frame::Frames;
use crate::kernel::{Mapping, Prot, Pte};
use gpusvm_mm::{Reason, Wanted};
use gpusvm_sync::atomic::Ordering;
use gpusvm_sync::{Arc, Mutex};
use gpusvm_types::{PageIndex, Span, VirtAddr};
use std::collections::BTreeMap;

/// Lets migrations to devices through, except while the process forks.
#[derive(Debug, Default)]
pub(crate) struct Gate(Mutex<GateState>);

#[derive(Debug, Default)]
struct GateState {
    /// How many forks are under way.
    closers: u32,
    /// Who is inside, and how often. Who has a pass gets more: the gate waits for it anyway.
    inside: BTreeMap<Option<usize>, u32>,
}

/// Evidence that the process does not fork.
#[derive(Debug)]
pub struct Pass<'a> {
    gate: &'a Gate,
    thread: Option<usize>,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut gate = self.gate.0.lock();
        if let Some(count) = gate.inside.get_mut(&self.thread) {
            *count -= 1;
            if *count == 0 {
                gate.inside.remove(&self.thread);
            }
        }
    }
}

/// A child of fork: plain memory, and no engine.
#[derive(Debug)]
pub struct Child {
    mappings: Vec<Mapping>,
    pages: BTreeMap<PageIndex, Pte>,
    /// Its own, not counted with its parent's.
    frames: Frames,
}

impl Sim {
    /// Waits until the gate is open.
    pub(crate) fn pass(&self) -> Pass<'_> {
        let thread = self.runtime.me();
        let gate = &self.gate;
        self.runtime
            .wait_until(&"the end of a fork", None, &mut || {
                let mut state = gate.0.lock();
                let is_inside = state.inside.contains_key(&thread);
                let passes = state.closers == 0 || is_inside;
                if passes {
                    *state.inside.entry(thread).or_default() += 1;
                }
                passes
            });
        Pass { gate, thread }
    }

    /// Forks. The child's memory is as it was at this moment.
    pub fn fork(&self) -> Child {
        self.step(format_args!("fork"));
        self.gate.0.lock().closers += 1;
        let all_left = &mut || self.gate.0.lock().inside.is_empty();
        self.runtime
            .wait_until(&"migrations to end, to fork", None, all_left);
        let call = self.enter(format_args!("fork copies"));
        self.settle_events();
        for span in self.mirrored_spans() {
            if let Err(error) = self.bring_parts_home(span, Wanted::Fork) {
                self.note(format_args!("fork: {error}"));
            }
        }
        let child = self.copy();
        drop(call);
        self.gate.0.lock().closers -= 1;
        self.yield_now();
        child
    }

    fn copy(&self) -> Child {
        let mut kernel = self.kernel.lock();
        kernel.has_forked = true;
        // What is protected is not so in the child, which has no engine; copies are of the parent.
        let mut pages = kernel.pages.clone();
        // What could not come home: a bus error, never zeroes.
        for part in kernel.parts.all() {
            for page in part.span.pages() {
                let word = part.region.word(page).get();
                if !word.place.is_in_place() && !word.dropped {
                    pages.insert(page, Pte::Poisoned);
                }
            }
        }
        Child {
            mappings: kernel.mappings_in(everything()),
            frames: Frames::default(),
            pages,
        }
    }

    /// The process ends: every call answers `Gone` from now on, and device pages go back to their
    /// memory.
    pub fn exit(&self) {
        let call = self.enter(format_args!("exit"));
        self.settle_events();
        self.gone.store(true, Ordering::Release);
        for span in self.mirrored_spans() {
            self.unmirror(&call, span);
        }
        self.tell(everything(), Reason::Unmap);
        let mut kernel = self.kernel.lock();
        kernel.change(everything(), |_| None);
        kernel.pages.clear();
        kernel.huge.clear();
        kernel.pinned.clear();
        kernel.protected.clear();
    }
}

/// All that a process can map.
fn everything() -> Span {
    let end = VirtAddr::new(1 << 47);
    Span::new(VirtAddr::new(0), end).expect("not empty")
}

impl Child {
    /// A load of the child.
    ///
    /// # Errors
    ///
    /// The signal that it gets.
    pub fn read_u64(&self, at: VirtAddr) -> Result<u64, Signal> {
        self.check(at, false)?;
        match self.pages.get(&at.page()) {
            Some(Pte::Poisoned) => Err(Signal::Bus),
            Some(Pte::Zero) | None => Ok(0),
            Some(Pte::Frame(frame)) => {
                let mut page = *frame.bytes();
                Ok(u64::from_le_bytes(*word_at(&mut page, at)))
            }
        }
    }

    /// A store of the child, which its parent does not see.
    ///
    /// # Errors
    ///
    /// The signal that it gets.
    pub fn write_u64(&mut self, at: VirtAddr, value: u64) -> Result<(), Signal> {
        self.check(at, true)?;
        let frames = &self.frames;
        let pte = self.pages.entry(at.page()).or_insert(Pte::Zero);
        if matches!(pte, Pte::Zero) {
            *pte = Pte::Frame(frames.zeroed());
        }
        let Pte::Frame(frame) = pte else {
            return Err(Signal::Bus);
        };
        let page = Arc::make_mut(frame).bytes_mut();
        *word_at(page, at) = value.to_le_bytes();
        Ok(())
    }

    fn check(&self, at: VirtAddr, write: bool) -> Result<(), Signal> {
        let mut mappings = self.mappings.iter();
        let mapping = mappings.find(|mapping| mapping.span.contains(at));
        match mapping.map(|mapping| mapping.prot) {
            Some(Prot::ReadWrite) => Ok(()),
            Some(Prot::Read) if !write => Ok(()),
            _ => Err(Signal::Segv),
        }
    }
}
