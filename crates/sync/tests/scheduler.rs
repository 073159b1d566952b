//! Waits of a thread with a scheduler go through it.

use gpusvm_sync::{Condvar, Mutex, RwLock, Scheduler, set_scheduler};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::time::Duration;

/// Runs what the test put on the list, one piece at each turn, and adds up the time.
struct Turns;

type Piece = Box<dyn FnOnce()>;

thread_local! {
    static PIECES: RefCell<VecDeque<Piece>> = const { RefCell::new(VecDeque::new()) };
    static SLEPT: RefCell<Duration> = const { RefCell::new(Duration::ZERO) };
}

impl Scheduler for Turns {
    fn yield_now(&self) {
        let piece = PIECES.with_borrow_mut(VecDeque::pop_front);
        piece.expect("nobody is left to go on")();
    }

    fn sleep(&self, for_: Duration) {
        SLEPT.with_borrow_mut(|slept| *slept += for_);
        if let Some(piece) = PIECES.with_borrow_mut(VecDeque::pop_front) {
            piece();
        }
    }
}

fn scheduled(pieces: Vec<Piece>, body: impl FnOnce()) {
    PIECES.with_borrow_mut(|list| list.extend(pieces));
    set_scheduler(Some(&Turns));
    body();
    set_scheduler(None);
    assert!(PIECES.with_borrow(VecDeque::is_empty));
}

fn leak<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

#[test]
fn a_busy_mutex_lets_others_run_until_it_is_free() {
    let lock = leak(Mutex::new(1));
    let held = RefCell::new(Some(lock.lock()));
    let held: &'static _ = leak(held);
    let pieces: Vec<Piece> = vec![
        Box::new(|| assert!(lock.try_lock().is_none())),
        Box::new(|| drop(held.take())),
    ];
    scheduled(pieces, || assert_eq!(*lock.lock(), 1));
}

#[test]
fn a_busy_rwlock_lets_others_run_until_it_is_free() {
    let lock = leak(RwLock::new(2));
    let reading: &'static _ = leak(RefCell::new(Some(lock.read())));
    let pieces: Vec<Piece> = vec![Box::new(|| drop(reading.take()))];
    scheduled(pieces, || *lock.write() += 1);
    let writing: &'static _ = leak(RefCell::new(Some(lock.write())));
    let pieces: Vec<Piece> = vec![Box::new(|| {}), Box::new(|| drop(writing.take()))];
    scheduled(pieces, || assert_eq!(*lock.read(), 3));
}

#[test]
fn free_locks_ask_nobody() {
    let (mutex, rwlock) = (Mutex::new(()), RwLock::new(()));
    scheduled(Vec::new(), || {
        drop(mutex.lock());
        drop(rwlock.read());
        drop(rwlock.write());
    });
}

#[test]
fn a_condition_gives_the_lock_back_and_hears_of_a_change() {
    let pair = leak((Mutex::new(false), Condvar::new()));
    let pieces: Vec<Piece> = vec![
        Box::new(|| *pair.0.lock() = true),
        Box::new(|| pair.1.notify_one()),
    ];
    scheduled(pieces, || {
        let mut ready = pair.0.lock();
        while !*ready {
            ready = pair.1.wait(ready);
        }
    });
}

#[test]
fn a_condition_that_does_not_change_times_out_in_the_schedulers_time() {
    let (lock, changed) = (Mutex::new(()), Condvar::new());
    scheduled(Vec::new(), || {
        let (_, timed_out) = changed.wait_timeout(lock.lock(), Duration::from_micros(7));
        assert!(timed_out);
    });
    assert_eq!(SLEPT.take(), Duration::from_micros(7));
    scheduled(Vec::new(), || gpusvm_sync::sleep(Duration::from_secs(3600)));
    assert_eq!(SLEPT.take(), Duration::from_secs(3600));
}

#[test]
fn threads_without_a_scheduler_wait_as_ever() {
    let pair = (Mutex::new(0), Condvar::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut count = pair.0.lock();
            while *count < 10 {
                count = pair.1.wait(count);
            }
        });
        for _ in 0..10 {
            gpusvm_sync::yield_now();
            *pair.0.lock() += 1;
            pair.1.notify_all();
        }
    });
    let (guard, timed_out) = pair.1.wait_timeout(pair.0.lock(), Duration::from_millis(1));
    assert!(timed_out);
    assert_eq!(*guard, 10);
}
