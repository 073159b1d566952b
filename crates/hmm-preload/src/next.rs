//! The functions that would have been called without this library: the next ones of these names.
//!
//! # Locking
//!
//! None. Two threads that look a function up at the same time find the same one.

use core::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};
use core::mem::transmute;
use core::sync::atomic::{AtomicPtr, Ordering};
use libc::{FILE, mode_t, off_t, pthread_attr_t, pthread_t, size_t};

/// A function of the C library, looked up when it is first called.
struct Next {
    name: &'static CStr,
    found: AtomicPtr<c_void>,
}

impl Next {
    const fn new(name: &'static CStr) -> Self {
        Self {
            name,
            found: AtomicPtr::new(core::ptr::null_mut()),
        }
    }

    fn get(&self) -> *mut c_void {
        let found = self.found.load(Ordering::Relaxed);
        if !found.is_null() {
            return found;
        }
        // SAFETY: a C string; looking a name up changes nothing.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        if found.is_null() {
            // Without them no program runs, so there is no way to go on, and none to come here.
            std::process::abort();
        }
        self.found.store(found, Ordering::Relaxed);
        found
    }
}

macro_rules! next {
    ($($symbol:literal fn $name:ident($($arg:ident: $of:ty),*) -> $result:ty;)*) => {$(
        /// The next one of this name.
        ///
        /// # Safety
        ///
        /// As the function of the C library with this name.
        pub(crate) unsafe extern "C" fn $name($($arg: $of),*) -> $result {
            static NEXT: Next = Next::new($symbol);
            type Function = unsafe extern "C" fn($($of),*) -> $result;
            // SAFETY: the C library's function of this name takes this, and gives that. Those that are
            // variadic there take their arguments in the same registers.
            let function = unsafe { transmute::<*mut c_void, Function>(NEXT.get()) };
            // SAFETY: as the caller promises.
            unsafe { function($($arg),*) }
        }
    )*};
}

next! {
    c"open" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int;
    c"openat" fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int;
    c"__open_2" fn __open_2(path: *const c_char, flags: c_int) -> c_int;
    c"__openat_2" fn __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int;
    c"fopen" fn fopen(path: *const c_char, mode: *const c_char) -> *mut FILE;
    c"close" fn close(fd: c_int) -> c_int;
    c"dup2" fn dup2(from: c_int, to: c_int) -> c_int;
    c"dup3" fn dup3(from: c_int, to: c_int, flags: c_int) -> c_int;
    c"close_range" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int;
    c"closefrom" fn closefrom(first: c_int) -> ();
    c"fclose" fn fclose(stream: *mut FILE) -> c_int;
    c"ioctl" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int;
    c"pthread_create" fn pthread_create(thread: *mut pthread_t, attributes: *const pthread_attr_t, start: extern "C" fn(*mut c_void) -> *mut c_void, argument: *mut c_void) -> c_int;
    c"pthread_join" fn pthread_join(thread: pthread_t, result: *mut *mut c_void) -> c_int;
    c"__cxa_thread_atexit_impl" fn __cxa_thread_atexit_impl(run: unsafe extern "C" fn(*mut c_void), object: *mut c_void, library: *mut c_void) -> c_int;
    c"mmap" fn mmap(at: *mut c_void, len: size_t, protection: c_int, flags: c_int, fd: c_int, offset: off_t) -> *mut c_void;
    c"munmap" fn munmap(at: *mut c_void, len: size_t) -> c_int;
    c"mremap" fn mremap(at: *mut c_void, len: size_t, new_len: size_t, flags: c_int, to: *mut c_void) -> *mut c_void;
    c"mprotect" fn mprotect(at: *mut c_void, len: size_t, protection: c_int) -> c_int;
}
