//! A driver in miniature: a thread that serves faults as a test tells it to.

use gpusvm_device::{Access, Device, DeviceFault, Mapping, Target, Verdict, VmId};
use gpusvm_softgpu::{Grid, Lane, LaneError, LaunchError, LaunchReport, SoftGpu};
use gpusvm_types::{ByteSize, DevAddr, DmaAddr, PageCount, PageIndex, Span, VirtAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Where tests map things that are not memory of the process.
pub(crate) const BASE: VirtAddr = VirtAddr::new(0x10_0000_0000);

/// Serves faults until it is dropped.
pub(crate) struct Driver {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Driver {
    pub(crate) fn start(
        gpu: &Arc<SoftGpu>,
        mut serve: impl FnMut(&SoftGpu, &DeviceFault) -> Verdict + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, gpu) = (Arc::clone(&stop), Arc::clone(gpu));
        let thread = std::thread::Builder::new().spawn(move || {
            let queue = gpu.fault_queue().expect("a device with faults");
            let mut faults = [no_fault(); 8];
            while !stopped.load(Ordering::Relaxed) {
                let count = queue.take(&mut faults, Duration::from_millis(5));
                for fault in &faults[..count] {
                    queue.resolve(fault, serve(&gpu, fault));
                }
            }
        });
        Self {
            stop,
            thread: Some(thread.expect("a thread")),
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A fault that never was, to make arrays of.
pub(crate) fn no_fault() -> DeviceFault {
    DeviceFault {
        id: gpusvm_device::FaultId(0),
        vm: VmId(0),
        at: VirtAddr::new(0),
        access: gpusvm_device::Access::Read,
        stale: false,
    }
}

/// A device with 16 MiB and two units, and an address space on it.
pub(crate) fn small_gpu() -> (Arc<SoftGpu>, VmId) {
    let gpu = SoftGpu::builder()
        .vram(ByteSize::mib(16))
        .units(2)
        .build()
        .unwrap();
    let vm = gpu.page_tables().create_vm().unwrap();
    (gpu, vm)
}

/// `count` pages, `first` pages behind `BASE`.
pub(crate) fn pages(first: u64, count: u64) -> Span {
    let first = BASE.page() + PageCount::new(first);
    Span::of_pages(PageIndex::new(first.get()), PageCount::new(count))
}

/// The most that a mapping allows.
pub(crate) fn most(writable: bool) -> Access {
    match writable {
        true => Access::Atomic,
        false => Access::Read,
    }
}

pub(crate) fn bind_vram(gpu: &SoftGpu, vm: VmId, span: Span, at: u64, writable: bool) {
    let target = Target::Vram(DevAddr::new(at));
    gpu.page_tables()
        .bind(
            vm,
            &Mapping {
                span,
                target,
                allows: most(writable),
            },
        )
        .unwrap();
}

pub(crate) fn bind_ram(gpu: &SoftGpu, vm: VmId, span: Span, at: *mut u8, writable: bool) {
    let target = Target::System(DmaAddr::new(at.expose_provenance() as u64));
    gpu.page_tables()
        .bind(
            vm,
            &Mapping {
                span,
                target,
                allows: most(writable),
            },
        )
        .unwrap();
}

/// Runs a kernel to its end.
pub(crate) fn run<F>(
    gpu: &Arc<SoftGpu>,
    vm: VmId,
    lanes: usize,
    kernel: F,
) -> Result<LaunchReport, LaunchError>
where
    F: Fn(&mut Lane<'_>) -> Result<(), LaneError> + Send + Sync + 'static,
{
    // SAFETY: tests map VRAM, or RAM that they access by raw pointers only.
    unsafe { gpu.launch(vm, Grid::new(lanes), kernel) }
        .unwrap()
        .wait()
}

/// Pages of anonymous memory.
pub(crate) struct Pages {
    pub(crate) base: *mut u8,
    pub(crate) len: usize,
}

impl Pages {
    pub(crate) fn new(count: usize) -> Self {
        use rustix::mm::{MapFlags, ProtFlags};
        let len = count * 4096;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the place.
        let base = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, protection, MapFlags::PRIVATE)
        };
        Self {
            base: base.unwrap().cast(),
            len,
        }
    }

    pub(crate) fn span(&self) -> Span {
        Span::from_len(VirtAddr::from(self.base), ByteSize::from_usize(self.len)).unwrap()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, of which tests hold no references.
        unsafe { rustix::mm::munmap(self.base.cast(), self.len) }.unwrap();
    }
}
