//! Threads of the engine: their stacks, and what runs when they end, are not taken from where the program's are.
//! Threads of the program are as ever.

use crate::{next, stacks};
use core::ffi::{c_int, c_void};
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicU32, Ordering};
use libc::{pthread_attr_t, pthread_t};

type Start = extern "C" fn(*mut c_void) -> *mut c_void;
type Destructor = unsafe extern "C" fn(*mut c_void);

/// # Safety
///
/// As `pthread_create`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pthread_create(
    thread: *mut pthread_t,
    attributes: *const pthread_attr_t,
    start: Start,
    argument: *mut c_void,
) -> c_int {
    if is_ours(start as *const c_void) {
        // SAFETY: as the caller promises.
        if let Some(created) = unsafe { create_ours(thread, attributes, start, argument) } {
            return created;
        }
    }
    // SAFETY: as the caller promises.
    unsafe { next::pthread_create(thread, attributes, start, argument) }
}

/// # Safety
///
/// As `pthread_join`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pthread_join(thread: pthread_t, result: *mut *mut c_void) -> c_int {
    // SAFETY: as the caller promises.
    let joined = unsafe { next::pthread_join(thread, result) };
    if let (0, Ok(at)) = (joined, usize::try_from(thread)) {
        // SAFETY: the thread has ended, and nobody asks for it any more.
        unsafe { stacks::give_back(at) };
    }
    joined
}

/// Creates a thread on a stack of ours. `None`: it was not tried.
///
/// # Safety
///
/// As `pthread_create`.
unsafe fn create_ours(
    thread: *mut pthread_t,
    attributes: *const pthread_attr_t,
    start: Start,
    argument: *mut c_void,
) -> Option<c_int> {
    let mut size = 0;
    if !attributes.is_null() {
        // SAFETY: attributes, as the caller promises.
        unsafe { libc::pthread_attr_getstacksize(attributes, &raw mut size) };
    }
    let (stack, len) = stacks::take(size)?;
    let mut ours = MaybeUninit::<pthread_attr_t>::uninit();
    // SAFETY: room for attributes.
    unsafe { libc::pthread_attr_init(ours.as_mut_ptr()) };
    // SAFETY: attributes that were just made, and a stack that nobody has.
    unsafe { libc::pthread_attr_setstack(ours.as_mut_ptr(), stack, len) };
    // SAFETY: as the caller promises, but for the attributes, of which a thread of ours has no others.
    let created = unsafe { next::pthread_create(thread, ours.as_ptr(), start, argument) };
    // SAFETY: as above; nobody uses them any more.
    unsafe { libc::pthread_attr_destroy(ours.as_mut_ptr()) };
    if created != 0 {
        // SAFETY: no thread came to be on it.
        unsafe { stacks::give_back(stack.addr()) };
    }
    Some(created)
}

/// Whether that is a function of this library.
fn is_ours(function: *const c_void) -> bool {
    let image = |of: *const c_void| {
        let mut about = MaybeUninit::<libc::Dl_info>::uninit();
        // SAFETY: room for what is told of any address.
        let is_known = unsafe { libc::dladdr(of, about.as_mut_ptr()) } != 0;
        // SAFETY: it was told.
        is_known.then(|| unsafe { about.assume_init() }.dli_fbase)
    };
    let ours = image(pthread_join as *const c_void);
    ours.is_some() && image(function) == ours
}

/// What is to run when this thread ends, of this library: the last is the first to run.
struct AtEnd {
    run: Destructor,
    object: *mut c_void,
    before: Option<Box<AtEnd>>,
}

/// The C library's key for the list, with one added. Zero until there is one.
static KEY: AtomicU32 = AtomicU32::new(0);

/// Makes the key, from when no other thread is there.
pub(crate) fn prepare() {
    let mut key = 0;
    // SAFETY: room for a key, and a function for what is kept under it.
    if unsafe { libc::pthread_key_create(&raw mut key, Some(run_all)) } == 0 {
        KEY.store(key + 1, Ordering::Release);
    }
}

/// What the Rust library calls for each value of a thread that is to be dropped. The C library would take memory
/// for that from the program's heap, and make a heap for the thread first.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn __cxa_thread_atexit_impl(
    run: Destructor,
    object: *mut c_void,
    library: *mut c_void,
) -> c_int {
    let key = KEY.load(Ordering::Acquire);
    if key == 0 || !is_ours(run as *const c_void) {
        // SAFETY: as the caller promises.
        return unsafe { next::__cxa_thread_atexit_impl(run, object, library) };
    }
    // SAFETY: a key of ours.
    let before = unsafe { libc::pthread_getspecific(key - 1) }.cast::<AtEnd>();
    // SAFETY: from a box of this thread, or null.
    let before = (!before.is_null()).then(|| unsafe { Box::from_raw(before) });
    let list = Box::new(AtEnd {
        run,
        object,
        before,
    });
    // SAFETY: as above.
    unsafe { libc::pthread_setspecific(key - 1, Box::into_raw(list).cast()) }
}

/// Runs them all. What they add is run by another call, as the C library does for keys.
unsafe extern "C" fn run_all(list: *mut c_void) {
    // SAFETY: from a box, which nobody else has: the key is empty by now.
    let mut list = Some(unsafe { Box::from_raw(list.cast::<AtEnd>()) });
    while let Some(first) = list {
        // SAFETY: what was asked for, once.
        unsafe { (first.run)(first.object) };
        list = first.before;
    }
}
