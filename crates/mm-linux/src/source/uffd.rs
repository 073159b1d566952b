//! Messages of userfaultfd.
//!
//! Handlers sleep in one epoll, which wakes one of them for each message. A read and what the events
//! in it do to the page words happen under one lock, so that a fault is never looked at before an
//! event that came before it.

use super::{Arrival, FaultSource};
use crate::sys::uffd::{Event, Message, Uffd};
use core::time::Duration;
use gpusvm_sync::atomic::{AtomicBool, Ordering};
use gpusvm_sync::{Arc, Mutex};
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use std::os::fd::OwnedFd;

/// Messages of userfaultfd.
#[derive(Debug)]
pub(crate) struct UffdSource {
    uffd: Arc<Uffd>,
    epoll: OwnedFd,
    stop: OwnedFd,
    stopped: AtomicBool,
    /// Held by who reads and applies events.
    reading: Mutex<()>,
}

const MESSAGE: u64 = 0;
const STOP: u64 = 1;

impl UffdSource {
    /// Of the descriptor of the program's memory.
    pub(crate) fn new(uffd: Arc<Uffd>) -> Result<Self, Errno> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let message = epoll::EventData::new_u64(MESSAGE);
        epoll::add(
            &epoll,
            &*uffd,
            message,
            epoll::EventFlags::IN | epoll::EventFlags::ET,
        )?;
        epoll::add(
            &epoll,
            &stop,
            epoll::EventData::new_u64(STOP),
            epoll::EventFlags::IN,
        )?;
        let (stopped, reading) = (AtomicBool::new(false), Mutex::new(()));
        Ok(Self {
            uffd,
            epoll,
            stop,
            stopped,
            reading,
        })
    }

    /// Reads up to the next fault.
    fn read(&self, apply: &mut dyn FnMut(Event)) -> Option<Arrival> {
        let _reading = self.reading.lock();
        let mut message = [Message::EMPTY];
        loop {
            match self.uffd.read(&mut message) {
                Ok(1) => {}
                Err(Errno::INTR) => continue,
                _ => return None,
            }
            match message[0].decode() {
                Event::Fault { at, wp, tid, .. } => {
                    return Some(Arrival {
                        at,
                        protected: wp,
                        tid,
                    });
                }
                event => apply(event),
            }
        }
    }

    fn sleep(&self, timeout: Option<Duration>) {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(MESSAGE),
        }];
        // Interrupted or timed out: the caller looks again.
        let _ = epoll::wait(&self.epoll, &mut events, timeout.as_ref());
    }
}

impl FaultSource for UffdSource {
    fn next(&self, timeout: Option<Duration>, apply: &mut dyn FnMut(Event)) -> Option<Arrival> {
        let arrival = self.read(apply);
        if arrival.is_some() || self.stopped.load(Ordering::Acquire) {
            return arrival;
        }
        self.sleep(timeout);
        self.read(apply)
    }

    fn interrupt(&self) {
        self.stopped.store(true, Ordering::Release);
        // Fails only when the counter is full, which wakes everybody as well.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }
}
