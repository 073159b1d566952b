//! `std`'s locks without poisoning, and with a say for the thread's [`Scheduler`] where they wait.

use crate::scheduler::{Scheduler, scheduler};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{PoisonError, TryLockError};
use std::time::Duration;

pub use std::sync::{RwLockReadGuard, RwLockWriteGuard};

/// A mutual exclusion lock.
#[derive(Default)]
pub struct Mutex<T: ?Sized>(std::sync::Mutex<T>);

/// A [`Mutex`] that is locked, until this is dropped.
#[must_use = "the lock is free again as soon as this is dropped"]
pub struct MutexGuard<'a, T: ?Sized> {
    lock: &'a Mutex<T>,
    held: std::sync::MutexGuard<'a, T>,
}

impl<T> Mutex<T> {
    /// A lock around `value`.
    pub const fn new(value: T) -> Self {
        Self(std::sync::Mutex::new(value))
    }

    /// The value, without the lock.
    pub fn into_inner(self) -> T {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: ?Sized> Mutex<T> {
    /// Waits until the lock is free and takes it.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.try_lock().unwrap_or_else(|| self.wait())
    }

    /// Takes the lock if it is free.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let held = unless_busy(self.0.try_lock())?;
        Some(MutexGuard { lock: self, held })
    }

    #[cold]
    fn wait(&self) -> MutexGuard<'_, T> {
        if let Some(scheduler) = scheduler() {
            return wait_for(scheduler, "a mutex", || self.try_lock());
        }
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        MutexGuard { lock: self, held }
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.held
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.held
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for MutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.held.fmt(f)
    }
}

/// A lock that many readers or one writer hold.
#[derive(Default)]
pub struct RwLock<T: ?Sized>(std::sync::RwLock<T>);

impl<T> RwLock<T> {
    /// A lock around `value`.
    pub const fn new(value: T) -> Self {
        Self(std::sync::RwLock::new(value))
    }
}

impl<T: ?Sized> RwLock<T> {
    /// Waits until no writer holds the lock and takes it to read.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        unless_busy(self.0.try_read()).unwrap_or_else(|| self.wait_to_read())
    }

    /// Takes the lock to read, unless a writer holds it.
    pub fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
        unless_busy(self.0.try_read())
    }

    /// Waits until nobody holds the lock and takes it to write.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        unless_busy(self.0.try_write()).unwrap_or_else(|| self.wait_to_write())
    }

    #[cold]
    fn wait_to_read(&self) -> RwLockReadGuard<'_, T> {
        match scheduler() {
            Some(scheduler) => wait_for(scheduler, "a lock to read", || {
                unless_busy(self.0.try_read())
            }),
            None => self.0.read().unwrap_or_else(PoisonError::into_inner),
        }
    }

    #[cold]
    fn wait_to_write(&self) -> RwLockWriteGuard<'_, T> {
        match scheduler() {
            Some(scheduler) => wait_for(scheduler, "a lock to write", || {
                unless_busy(self.0.try_write())
            }),
            None => self.0.write().unwrap_or_else(PoisonError::into_inner),
        }
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for RwLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Waits for a change under a [`Mutex`].
#[derive(Debug, Default)]
pub struct Condvar {
    sleepers: std::sync::Condvar,
    /// How often somebody was notified: what threads with a scheduler wait for.
    changes: AtomicU32,
}

impl Condvar {
    /// A condition nobody waits for.
    pub const fn new() -> Self {
        Self {
            sleepers: std::sync::Condvar::new(),
            changes: AtomicU32::new(0),
        }
    }

    /// Gives the lock back, waits to be notified, and takes the lock again. May return without that:
    /// look again at what you wait for.
    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        if let Some(scheduler) = scheduler() {
            return self.let_others_run(scheduler, guard, None).0;
        }
        let MutexGuard { lock, held } = guard;
        let held = self.sleepers.wait(held);
        MutexGuard {
            lock,
            held: held.unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// As `wait`, for at most `timeout`. Whether it ran out comes with the lock.
    pub fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        timeout: Duration,
    ) -> (MutexGuard<'a, T>, bool) {
        if let Some(scheduler) = scheduler() {
            return self.let_others_run(scheduler, guard, Some(timeout));
        }
        let MutexGuard { lock, held } = guard;
        let (held, result) = self
            .sleepers
            .wait_timeout(held, timeout)
            .unwrap_or_else(PoisonError::into_inner);
        (MutexGuard { lock, held }, result.timed_out())
    }

    /// Wakes one waiter; with schedulers, all: they look again.
    pub fn notify_one(&self) {
        self.changes.fetch_add(1, Ordering::Release);
        self.sleepers.notify_one();
    }

    /// Wakes every waiter.
    pub fn notify_all(&self) {
        self.changes.fetch_add(1, Ordering::Release);
        self.sleepers.notify_all();
    }

    #[cold]
    fn let_others_run<'a, T>(
        &self,
        scheduler: &dyn Scheduler,
        guard: MutexGuard<'a, T>,
        timeout: Option<Duration>,
    ) -> (MutexGuard<'a, T>, bool) {
        let lock = guard.lock;
        // Read under the lock: a change that is made after this guard is gone is a later one.
        let seen = self.changes.load(Ordering::Acquire);
        drop(guard);
        let notified = scheduler.wait_until("a condition", timeout, &mut || {
            self.changes.load(Ordering::Acquire) != seen
        });
        (lock.lock(), !notified)
    }
}

/// The guard, unless somebody else has it.
fn unless_busy<G>(tried: Result<G, TryLockError<G>>) -> Option<G> {
    match tried {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Lets others run until `take` has what it wants.
fn wait_for<G>(
    scheduler: &dyn Scheduler,
    what: &'static str,
    mut take: impl FnMut() -> Option<G>,
) -> G {
    let mut taken = None;
    while taken.is_none() {
        scheduler.wait_until(what, None, &mut || {
            taken = take();
            taken.is_some()
        });
    }
    taken.expect("looked at just now")
}
