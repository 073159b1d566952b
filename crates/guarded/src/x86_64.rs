//! The accessors' text on x86_64, and what a signal frame says there.
//!
//! ```text
//!   gpusvm_guarded_begin  load8 .. fetch_add64, copy, clear_sse, stream_sse   fault -> landing
//!   gpusvm_guarded_wide   copy_avx, stream_avx, copy_avx512, stream_avx512    fault -> landing_wide
//!   gpusvm_guarded_end
//! ```
//!
//! Every function is a leaf that never moves the stack pointer: from any instruction of it, `ret`
//! returns to the caller. Arguments arrive in RDI, RSI, RDX; the outcome leaves in RAX (value) and
//! RDX (0, or 1 for refused). Vector registers are the caller's to save under the C ABI.

use crate::access::Outcome;
use core::arch::global_asm;
use core::ffi::c_void;

/// A function of the text: its name and its instructions.
macro_rules! text {
    ($name:literal, $($line:expr),+ $(,)?) => {
        concat!(
            ".balign 32\n.globl ", $name, "\n.hidden ", $name, "\n.type ", $name, ",@function\n",
            $name, ":\n.cfi_startproc\n", $($line, "\n",)+
            "ret\n.cfi_endproc\n.size ", $name, ", . - ", $name, "\n",
        )
    };
}

/// A label that Rust can see.
macro_rules! mark {
    ($name:literal) => {
        concat!(".globl ", $name, "\n.hidden ", $name, "\n", $name, ":\n")
    };
}

/// A loop over RDX bytes, not zero, a multiple of four times `$size`: the size of a register.
macro_rules! copy_loop {
    ($load:literal, $store:literal, $reg:literal, $size:literal) => {
        concat!(
            "mov rcx, rdx\n2:\n",
            $load,
            " ",
            $reg,
            "0, [rsi]\n",
            $load,
            " ",
            $reg,
            "1, [rsi + ",
            $size,
            "]\n",
            $load,
            " ",
            $reg,
            "2, [rsi + 2*",
            $size,
            "]\n",
            $load,
            " ",
            $reg,
            "3, [rsi + 3*",
            $size,
            "]\n",
            $store,
            " [rdi], ",
            $reg,
            "0\n",
            $store,
            " [rdi + ",
            $size,
            "], ",
            $reg,
            "1\n",
            $store,
            " [rdi + 2*",
            $size,
            "], ",
            $reg,
            "2\n",
            $store,
            " [rdi + 3*",
            $size,
            "], ",
            $reg,
            "3\n",
            "add rsi, 4*",
            $size,
            "\nadd rdi, 4*",
            $size,
            "\nsub rcx, 4*",
            $size,
            "\njnz 2b\n",
            "xor edx, edx",
        )
    };
}

global_asm!(
    ".pushsection .text.gpusvm_guarded, \"ax\", @progbits",
    ".balign 64",
    mark!("gpusvm_guarded_begin"),
    text!(
        "gpusvm_guarded_load8",
        "movzx eax, byte ptr [rdi]",
        "xor edx, edx"
    ),
    text!(
        "gpusvm_guarded_load16",
        "movzx eax, word ptr [rdi]",
        "xor edx, edx"
    ),
    text!("gpusvm_guarded_load32", "mov eax, [rdi]", "xor edx, edx"),
    text!("gpusvm_guarded_load64", "mov rax, [rdi]", "xor edx, edx"),
    text!("gpusvm_guarded_store8", "mov [rdi], sil", "xor edx, edx"),
    text!("gpusvm_guarded_store16", "mov [rdi], si", "xor edx, edx"),
    text!("gpusvm_guarded_store32", "mov [rdi], esi", "xor edx, edx"),
    text!("gpusvm_guarded_store64", "mov [rdi], rsi", "xor edx, edx"),
    text!(
        "gpusvm_guarded_cas8",
        "mov rax, rsi",
        "lock cmpxchg [rdi], dl",
        "xor edx, edx"
    ),
    text!(
        "gpusvm_guarded_cas16",
        "mov rax, rsi",
        "lock cmpxchg [rdi], dx",
        "xor edx, edx"
    ),
    text!(
        "gpusvm_guarded_cas32",
        "mov rax, rsi",
        "lock cmpxchg [rdi], edx",
        "xor edx, edx"
    ),
    text!(
        "gpusvm_guarded_cas64",
        "mov rax, rsi",
        "lock cmpxchg [rdi], rdx",
        "xor edx, edx"
    ),
    text!(
        "gpusvm_guarded_add32",
        "mov eax, esi",
        "lock xadd [rdi], eax",
        "xor edx, edx"
    ),
    text!(
        "gpusvm_guarded_add64",
        "mov rax, rsi",
        "lock xadd [rdi], rax",
        "xor edx, edx"
    ),
    // Any length and alignment. Words where there are words, so that an aligned one never tears.
    text!(
        "gpusvm_guarded_copy",
        "mov rcx, rdx",
        "cmp rcx, 64",
        "jb 3f",
        "2: movups xmm0, [rsi]",
        "movups xmm1, [rsi + 16]",
        "movups xmm2, [rsi + 32]",
        "movups xmm3, [rsi + 48]",
        "movups [rdi], xmm0",
        "movups [rdi + 16], xmm1",
        "movups [rdi + 32], xmm2",
        "movups [rdi + 48], xmm3",
        "add rsi, 64",
        "add rdi, 64",
        "sub rcx, 64",
        "cmp rcx, 64",
        "jae 2b",
        "3: cmp rcx, 8",
        "jb 5f",
        "4: mov rax, [rsi]",
        "mov [rdi], rax",
        "add rsi, 8",
        "add rdi, 8",
        "sub rcx, 8",
        "cmp rcx, 8",
        "jae 4b",
        "5: test rcx, rcx",
        "jz 7f",
        "6: mov al, [rsi]",
        "mov [rdi], al",
        "inc rsi",
        "inc rdi",
        "dec rcx",
        "jnz 6b",
        "7: xor edx, edx",
    ),
    // RDI is a multiple of 64, RSI bytes a multiple of 64, not zero.
    text!(
        "gpusvm_guarded_clear",
        "xorps xmm0, xmm0",
        "2: movntps [rdi], xmm0",
        "movntps [rdi + 16], xmm0",
        "movntps [rdi + 32], xmm0",
        "movntps [rdi + 48], xmm0",
        "add rdi, 64",
        "sub rsi, 64",
        "jnz 2b",
        "xor edx, edx",
    ),
    text!(
        "gpusvm_guarded_stream_sse",
        copy_loop!("movups", "movntps", "xmm", "16")
    ),
    mark!("gpusvm_guarded_wide"),
    text!(
        "gpusvm_guarded_copy_avx",
        copy_loop!("vmovups", "vmovups", "ymm", "32"),
        "vzeroupper"
    ),
    text!(
        "gpusvm_guarded_stream_avx",
        copy_loop!("vmovups", "vmovntps", "ymm", "32"),
        "vzeroupper"
    ),
    text!(
        "gpusvm_guarded_copy_avx512",
        copy_loop!("vmovups", "vmovups", "zmm", "64"),
        "vzeroupper"
    ),
    text!(
        "gpusvm_guarded_stream_avx512",
        copy_loop!("vmovups", "vmovntps", "zmm", "64"),
        "vzeroupper",
    ),
    mark!("gpusvm_guarded_end"),
    mark!("gpusvm_guarded_landing_wide"),
    "vzeroupper",
    mark!("gpusvm_guarded_landing"),
    "ret",
    ".popsection",
);

unsafe extern "C" {
    #[link_name = "gpusvm_guarded_load8"]
    pub(crate) fn load8(addr: *const u8) -> Outcome;
    #[link_name = "gpusvm_guarded_load16"]
    pub(crate) fn load16(addr: *const u16) -> Outcome;
    #[link_name = "gpusvm_guarded_load32"]
    pub(crate) fn load32(addr: *const u32) -> Outcome;
    #[link_name = "gpusvm_guarded_load64"]
    pub(crate) fn load64(addr: *const u64) -> Outcome;
    #[link_name = "gpusvm_guarded_store8"]
    pub(crate) fn store8(addr: *mut u8, value: u64) -> Outcome;
    #[link_name = "gpusvm_guarded_store16"]
    pub(crate) fn store16(addr: *mut u16, value: u64) -> Outcome;
    #[link_name = "gpusvm_guarded_store32"]
    pub(crate) fn store32(addr: *mut u32, value: u64) -> Outcome;
    #[link_name = "gpusvm_guarded_store64"]
    pub(crate) fn store64(addr: *mut u64, value: u64) -> Outcome;
    #[link_name = "gpusvm_guarded_cas8"]
    pub(crate) fn compare_exchange8(addr: *mut u8, expected: u64, new: u64) -> Outcome;
    #[link_name = "gpusvm_guarded_cas16"]
    pub(crate) fn compare_exchange16(addr: *mut u16, expected: u64, new: u64) -> Outcome;
    #[link_name = "gpusvm_guarded_cas32"]
    pub(crate) fn compare_exchange32(addr: *mut u32, expected: u64, new: u64) -> Outcome;
    #[link_name = "gpusvm_guarded_cas64"]
    pub(crate) fn compare_exchange64(addr: *mut u64, expected: u64, new: u64) -> Outcome;
    #[link_name = "gpusvm_guarded_add32"]
    pub(crate) fn fetch_add32(addr: *mut u32, value: u64) -> Outcome;
    #[link_name = "gpusvm_guarded_add64"]
    pub(crate) fn fetch_add64(addr: *mut u64, value: u64) -> Outcome;

    fn gpusvm_guarded_copy(to: *mut u8, from: *const u8, len: usize) -> Outcome;
    fn gpusvm_guarded_clear(to: *mut u8, len: usize) -> Outcome;
    fn gpusvm_guarded_stream_sse(to: *mut u8, from: *const u8, len: usize) -> Outcome;
    fn gpusvm_guarded_copy_avx(to: *mut u8, from: *const u8, len: usize) -> Outcome;
    fn gpusvm_guarded_stream_avx(to: *mut u8, from: *const u8, len: usize) -> Outcome;
    fn gpusvm_guarded_copy_avx512(to: *mut u8, from: *const u8, len: usize) -> Outcome;
    fn gpusvm_guarded_stream_avx512(to: *mut u8, from: *const u8, len: usize) -> Outcome;

    static gpusvm_guarded_begin: u8;
    static gpusvm_guarded_wide: u8;
    static gpusvm_guarded_end: u8;
    static gpusvm_guarded_landing: u8;
    static gpusvm_guarded_landing_wide: u8;
}

/// What the wide loops want `len` to be a multiple of.
pub(crate) const WIDE: usize = 256;
/// What streaming stores want their target to be aligned to: a cache line.
pub(crate) const LINE: usize = 64;

/// Copies any number of bytes through the cache.
///
/// # Safety
///
/// A fault is diverted; what can be written may be written by the caller.
pub(crate) unsafe fn copy(to: *mut u8, from: *const u8, len: usize) -> Outcome {
    // SAFETY: the caller's.
    unsafe { gpusvm_guarded_copy(to, from, len) }
}

/// Copies through the cache with the widest registers. `len` is a multiple of [`WIDE`], not zero.
///
/// # Safety
///
/// As [`copy`].
pub(crate) unsafe fn copy_wide(to: *mut u8, from: *const u8, len: usize) -> Outcome {
    if std::is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor can do it; the rest is the caller's.
        unsafe { gpusvm_guarded_copy_avx512(to, from, len) }
    } else if std::is_x86_feature_detected!("avx") {
        // SAFETY: the processor can do it; the rest is the caller's.
        unsafe { gpusvm_guarded_copy_avx(to, from, len) }
    } else {
        // SAFETY: the caller's.
        unsafe { gpusvm_guarded_copy(to, from, len) }
    }
}

/// Copies past the cache. `len` is a multiple of [`WIDE`], not zero, and `to` of [`LINE`].
///
/// # Safety
///
/// As [`copy`]. Other threads see the bytes in order only behind a [`store_fence`].
pub(crate) unsafe fn stream(to: *mut u8, from: *const u8, len: usize) -> Outcome {
    if std::is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor can do it; the rest is the caller's.
        unsafe { gpusvm_guarded_stream_avx512(to, from, len) }
    } else if std::is_x86_feature_detected!("avx") {
        // SAFETY: the processor can do it; the rest is the caller's.
        unsafe { gpusvm_guarded_stream_avx(to, from, len) }
    } else {
        // SAFETY: the caller's.
        unsafe { gpusvm_guarded_stream_sse(to, from, len) }
    }
}

/// Clears past the cache. `len`, not zero, and `to` are multiples of [`LINE`].
///
/// # Safety
///
/// As [`stream`].
pub(crate) unsafe fn clear(to: *mut u8, len: usize) -> Outcome {
    // SAFETY: the caller's.
    unsafe { gpusvm_guarded_clear(to, len) }
}

/// Orders streaming stores before every later store.
pub(crate) fn store_fence() {
    // SAFETY: SSE is part of x86_64.
    unsafe { core::arch::x86_64::_mm_sfence() }
}

/// What a signal frame tells of a fault.
#[derive(Debug)]
pub(crate) struct Frame<'a> {
    registers: &'a mut [libc::greg_t; 23],
}

impl Frame<'_> {
    /// The frame behind the third argument of a signal handler.
    ///
    /// # Safety
    ///
    /// `context` is that argument, and the handler has not returned yet.
    pub(crate) unsafe fn new(context: *mut c_void) -> Self {
        let context = context.cast::<libc::ucontext_t>();
        // SAFETY: the kernel put a `ucontext_t` there, and nobody else looks at it meanwhile.
        let registers = unsafe { &mut (*context).uc_mcontext.gregs };
        Self { registers }
    }

    /// The instruction that faulted.
    pub(crate) fn instruction(&self) -> usize {
        self.get(libc::REG_RIP)
    }

    /// Whether it was a page fault (trap 14) of a write (bit 1 of its error code).
    pub(crate) fn is_write(&self) -> bool {
        self.get(libc::REG_TRAPNO) == 14 && self.get(libc::REG_ERR) & 2 != 0
    }

    /// Whether the instruction is an accessor's.
    pub(crate) fn in_accessor(&self) -> bool {
        let begin = (&raw const gpusvm_guarded_begin).addr();
        (begin..(&raw const gpusvm_guarded_end).addr()).contains(&self.instruction())
    }

    /// Whether the accessor is at an access to the page of `addr` that has not happened yet.
    pub(crate) fn is_about_to_touch(&self, addr: usize) -> bool {
        /// `xor edx, edx` and `ret`: what comes behind the last access of every accessor.
        const ENDS: [&[u8]; 2] = [&[0x31, 0xd2], &[0xc3]];
        if !self.in_accessor() {
            return false;
        }
        let instruction = core::ptr::with_exposed_provenance::<u8>(self.instruction());
        // SAFETY: in an accessor, whose text is longer: behind its last instruction there is padding,
        // or the landing.
        let bytes = unsafe { core::slice::from_raw_parts(instruction, 2) };
        if ENDS.iter().any(|end| bytes.starts_with(end)) {
            return false;
        }
        let page = |addr: usize| addr >> 12;
        [libc::REG_RDI, libc::REG_RSI].into_iter().any(|register| {
            let first = self.get(register);
            let last = first.wrapping_add(WIDE - 1);
            (page(first)..=page(last)).contains(&page(addr))
        })
    }

    /// Makes the accessor return that `addr` was refused.
    pub(crate) fn refuse(&mut self, addr: usize) {
        let wide = self.instruction() >= (&raw const gpusvm_guarded_wide).addr();
        let narrow_landing = (&raw const gpusvm_guarded_landing).addr();
        let wide_landing = (&raw const gpusvm_guarded_landing_wide).addr();
        self.set(libc::REG_RAX, addr);
        self.set(libc::REG_RDX, 1);
        self.set(
            libc::REG_RIP,
            if wide { wide_landing } else { narrow_landing },
        );
    }

    fn get(&self, register: libc::c_int) -> usize {
        let value = usize::try_from(register)
            .ok()
            .and_then(|at| self.registers.get(at).copied());
        value.map_or(0, i64::cast_unsigned).try_into().unwrap_or(0)
    }

    fn set(&mut self, register: libc::c_int, value: usize) {
        let slot = usize::try_from(register)
            .ok()
            .and_then(|at| self.registers.get_mut(at));
        if let (Some(slot), Ok(value)) = (slot, u64::try_from(value)) {
            *slot = value.cast_signed();
        }
    }
}
