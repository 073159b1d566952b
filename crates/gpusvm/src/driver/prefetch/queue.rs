//! The prefetches of a device that are not done, and the threads that work on them.
//!
//! ```text
//!   Vm::prefetch ---> jobs: J1 J2 J3 ---> a thread does a piece of the first, which goes last
//!                         |               started when there is work, ended when there was none
//!                         `-------------> who waits for J2 does pieces of J2
//! ```
//!
//! Nothing works in the background before [`worker::start`](crate::driver::worker::start) says so: in a
//! simulated world whoever waits does the work, or a simulated thread does, by
//! [`VramRegion::work_on_prefetches`](crate::driver::VramRegion::work_on_prefetches).
//!
//! # Locking
//!
//! A leaf, held to queue a job and to take one. Threads hold nothing of the device but the queue.

use super::job::Job;
use core::time::Duration;
use gpusvm_device::FaultError;
use gpusvm_guarded::EngineThread;
use gpusvm_mm::AddressSpace;
use gpusvm_sync::{Arc, Condvar, Mutex};
use std::collections::VecDeque;
use std::thread::JoinHandle;

/// How many threads prefetch for one device: the copies of one go over the bus while the other looks for
/// pages and maps them. More would only take the bus from faults.
pub const PREFETCHERS: usize = 2;
/// How many prefetches of a device wait for a thread at most. Who asks for one more does it himself,
/// before he goes on.
pub const MAX_PREFETCHES: usize = 64;
/// How long a thread without work stays.
const REST: Duration = Duration::from_millis(200);

/// The prefetches of one device.
#[derive(Debug)]
pub(crate) struct Queue<M: AddressSpace> {
    state: Mutex<State<M>>,
    arrived: Condvar,
}

#[derive(Debug)]
struct State<M: AddressSpace> {
    jobs: VecDeque<Arc<Job<M>>>,
    /// Whether threads may be started.
    in_background: bool,
    running: usize,
    threads: Vec<JoinHandle<()>>,
    closed: bool,
}

impl<M: AddressSpace> Queue<M> {
    pub(crate) fn new() -> Arc<Self> {
        let state = State {
            jobs: VecDeque::new(),
            in_background: false,
            running: 0,
            threads: Vec::new(),
            closed: false,
        };
        Arc::new(Self {
            state: Mutex::new(state),
            arrived: Condvar::new(),
        })
    }

    /// From now on threads work on what is queued.
    pub(crate) fn go_to_background(&self) {
        self.state.lock().in_background = true;
    }

    /// Queues a job, or does it when there is no room.
    pub(super) fn add(self: &Arc<Self>, job: &Arc<Job<M>>) {
        let mut state = self.state.lock();
        if state.closed {
            drop(state);
            return job.stop(Some(closed));
        }
        // What its owner has done meanwhile.
        state.jobs.retain(|job| job.has_more());
        if state.jobs.len() >= MAX_PREFETCHES {
            drop(state);
            while job.work() {}
            return;
        }
        state.jobs.push_back(Arc::clone(job));
        if state.in_background {
            state.threads.retain(|thread| !thread.is_finished());
            for _ in state.running..PREFETCHERS {
                state.start(self);
            }
        }
        drop(state);
        self.arrived.notify_all();
    }

    /// Does a piece of the next job. Whether there was one.
    pub(crate) fn work(&self) -> bool {
        // Who gets nothing of a job sees another, or none: a job without more leaves the queue.
        while let Some(job) = self.take() {
            if job.work() {
                return true;
            }
        }
        false
    }

    /// The next job, which goes last: others may take of it too.
    fn take(&self) -> Option<Arc<Job<M>>> {
        let mut state = self.state.lock();
        state.jobs.retain(|job| job.has_more());
        let job = state.jobs.pop_front()?;
        state.jobs.push_back(Arc::clone(&job));
        Some(job)
    }

    /// What has not begun does not begin, and nothing is taken any more; returns when nothing is under
    /// way in a thread.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        let jobs = core::mem::take(&mut state.jobs);
        let threads = core::mem::take(&mut state.threads);
        drop(state);
        self.arrived.notify_all();
        jobs.iter().for_each(|job| job.stop(Some(closed)));
        let me = std::thread::current().id();
        // The last who holds a device may be one of them.
        let others = threads.into_iter().filter(|it| it.thread().id() != me);
        // Their panics were caught, and are errors of what they worked on.
        others.for_each(|thread| drop(thread.join()));
    }

    fn run(&self) {
        // As a worker that serves faults.
        let _engine = EngineThread::enter();
        loop {
            while self.work() {}
            let mut state = self.state.lock();
            if state.jobs.is_empty() && !state.closed {
                state = self.arrived.wait_timeout(state, REST).0;
            }
            if state.jobs.is_empty() || state.closed {
                state.running -= 1;
                return;
            }
        }
    }
}

impl<M: AddressSpace> State<M> {
    /// If no thread can be started, whoever waits does the work.
    fn start(&mut self, queue: &Arc<Queue<M>>) {
        let queue = Arc::clone(queue);
        let thread = std::thread::Builder::new().name("gpusvm-prefetch".into());
        if let Ok(thread) = thread.spawn(move || queue.run()) {
            self.running += 1;
            self.threads.push(thread);
        }
    }
}

const fn closed(at: gpusvm_types::VirtAddr) -> FaultError {
    FaultError::Closed { at }
}
