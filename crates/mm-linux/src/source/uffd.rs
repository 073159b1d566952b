//! Messages of userfaultfd.
//!
//! Handlers sleep in one epoll, which wakes one of them when messages come, once: so whoever reads
//! takes all that are there. A read and what the events in it do to the page words happen under one
//! lock, so that a fault is never looked at before an event that came before it.

use super::{Arrival, FaultSink, FaultSource, Held};
use crate::sys::uffd::{Event, Message, Uffd};
use core::time::Duration;
use gpusvm_sync::atomic::{AtomicBool, Ordering};
use gpusvm_sync::{Arc, RwLock};
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use std::os::fd::OwnedFd;

/// Messages of userfaultfd.
#[derive(Debug)]
pub(crate) struct UffdSource {
    uffd: Arc<Uffd>,
    /// Of memory that is only watched.
    watcher: Option<Arc<Uffd>>,
    epoll: OwnedFd,
    stop: OwnedFd,
    /// Each write wakes one sleeper. Never read.
    bell: OwnedFd,
    stopped: AtomicBool,
    /// Held to write by who reads and applies events.
    reading: RwLock<()>,
}

/// How many messages are read at once.
const BATCH: usize = 16;
/// What an event of the epoll is about does not matter: the sleeper looks.
const ANY: u64 = 0;

impl UffdSource {
    /// Of the descriptor of the program's memory, and that of what of it is only watched.
    pub(crate) fn new(uffd: Arc<Uffd>, watcher: Option<Arc<Uffd>>) -> Result<Self, Errno> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let (stop, bell) = (eventfd(0, flags)?, eventfd(0, flags)?);
        let any = || epoll::EventData::new_u64(ANY);
        let once = epoll::EventFlags::IN | epoll::EventFlags::ET;
        for uffd in [Some(&uffd), watcher.as_ref()].into_iter().flatten() {
            epoll::add(&epoll, &**uffd, any(), once)?;
        }
        epoll::add(&epoll, &bell, any(), once)?;
        epoll::add(&epoll, &stop, any(), epoll::EventFlags::IN)?;
        Ok(Self {
            uffd,
            watcher,
            epoll,
            stop,
            bell,
            stopped: AtomicBool::new(false),
            reading: RwLock::new(()),
        })
    }

    /// Reads all that is there; the first fault is for the caller.
    fn read(&self, sink: &mut dyn FaultSink) -> Option<Arrival> {
        gpusvm_sync::walk!("read");
        let _reading = self.reading.write();
        // Whoever makes an event waits until it is read: so those of one address are read in order,
        // whichever descriptor they are of.
        let watched = self.watcher.as_ref();
        let first = watched.and_then(|watcher| Self::read_all(watcher, None, sink));
        Self::read_all(&self.uffd, first, sink)
    }

    fn read_all(
        uffd: &Uffd,
        mut first: Option<Arrival>,
        sink: &mut dyn FaultSink,
    ) -> Option<Arrival> {
        loop {
            let mut messages = [Message::EMPTY; BATCH];
            let mut room = &mut messages[..];
            if sink.reads_one_by_one() {
                if !uffd.has_messages() {
                    return first;
                }
                sink.look();
                room = &mut room[..1];
            }
            let most = room.len();
            let count = match uffd.read(room) {
                Ok(count) => count,
                Err(Errno::INTR) => continue,
                Err(_) => return first,
            };
            for message in &messages[..count] {
                match message.decode() {
                    Event::Fault { at, wp, tid, .. } => {
                        let arrival = Arrival {
                            at,
                            protected: wp,
                            tid,
                            told: 0,
                        };
                        match first {
                            None => first = Some(arrival),
                            Some(_) => sink.more(arrival),
                        }
                    }
                    event => sink.event(event),
                }
            }
            if count < most {
                return first;
            }
        }
    }

    /// Whether there is nothing to read, of what happened to mappings. Nobody reads meanwhile.
    fn has_told_all(&self) -> bool {
        let mut all = [Some(&self.uffd), self.watcher.as_ref()]
            .into_iter()
            .flatten();
        all.all(|uffd| uffd.has_told_all())
    }

    fn sleep(&self, timeout: Option<Duration>) {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(ANY),
        }];
        // Interrupted or timed out: the caller looks again.
        let _ = epoll::wait(&self.epoll, &mut events, timeout.as_ref());
    }
}

impl FaultSource for UffdSource {
    fn next(&self, timeout: Option<Duration>, sink: &mut dyn FaultSink) -> Option<Arrival> {
        gpusvm_sync::walk!("next");
        let arrival = self.read(sink);
        if arrival.is_some() || self.stopped.load(Ordering::Acquire) {
            return arrival;
        }
        self.sleep(timeout);
        self.read(sink)
    }

    fn hold(&self) -> Held<'_> {
        Held(Some(self.reading.read()))
    }

    fn if_all_is_told(&self, act: &mut dyn FnMut()) -> bool {
        let Some(_held) = self.reading.try_read() else {
            return false;
        };
        let is_told = self.has_told_all();
        if is_told {
            act();
        }
        is_told
    }

    fn unless_more_is_told(&self, act: &mut dyn FnMut(), undo: &mut dyn FnMut()) -> bool {
        let _held = self.reading.read();
        if !self.has_told_all() {
            return false;
        }
        act();
        let is_told = self.has_told_all();
        if !is_told {
            undo();
        }
        is_told
    }

    fn rouse(&self) {
        // Fails only when the counter is full, after 2^64 writes.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    fn interrupt(&self) {
        self.stopped.store(true, Ordering::Release);
        // Fails only when the counter is full, which wakes everybody as well.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::map::Request;
    use crate::sys::testing::{self, pages, started};
    use crate::sys::uffd::{Features, RegisterModes};
    use gpusvm_types::Span;
    use rustix::mm::MprotectFlags;

    #[derive(Default)]
    struct Told(Vec<Span>);

    impl FaultSink for Told {
        fn event(&mut self, event: Event) {
            if let Event::Unmap { start, end } = event {
                self.0.extend(Span::new(start, end));
            }
        }

        fn reads_one_by_one(&self) -> bool {
            false
        }

        fn look(&mut self) {}

        fn more(&mut self, arrival: Arrival) {
            panic!("nobody touches anything: {arrival:?}");
        }
    }

    /// Story: an address was another thread's a moment ago, which had unmapped it, and had yet to tell. Who
    /// mapped something there that no device can move began work, and the device wrote to what was there
    /// before.
    #[test]
    fn who_begins_work_waits_for_what_others_have_yet_to_tell() {
        let Some(uffd) = testing::uffd(Features::EVENT_UNMAP) else {
            return;
        };
        let source = Arc::new(UffdSource::new(Arc::new(uffd), None).unwrap());
        let memory = Request::new(pages(1)).dont_fork().map().unwrap();
        let span = memory.span();
        let modes = RegisterModes {
            missing: true,
            wp: false,
            minor: false,
        };
        // SAFETY: nobody touches it any more.
        unsafe { source.uffd.register(span, modes) }.unwrap();
        let unmapped = started(move || drop(memory));
        // SAFETY: nobody uses it.
        while unsafe { crate::sys::map::protect(span, MprotectFlags::READ) }.is_ok() {
            std::thread::yield_now();
        }

        let settling = Arc::clone(&source);
        let settled = started(move || settling.settle());
        let early = settled.recv_timeout(Duration::from_millis(50));
        let mut told = Told::default();
        while told.0.is_empty() {
            source.next(Some(Duration::ZERO), &mut told);
        }
        assert!(early.is_err(), "it did not wait");
        assert_eq!(told.0, [span]);
        settled.recv().unwrap();
        unmapped.recv().unwrap();
    }
}
