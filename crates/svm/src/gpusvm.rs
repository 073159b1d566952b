//! A mirror of a process, for one device address space or several: `drm_gpusvm`.

use crate::tree::Tree;
use crate::{DeviceIndex, PageRun, Prepared, Range, pages};
use alloc::{boxed::Box, sync::Arc, vec::Vec};
use gpusvm_mm::{AddressSpace, Intent};
use gpusvm_sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use gpusvm_sync::{Mutex, RwLock, RwLockReadGuard};
use gpusvm_types::{ByteSize, Span, VirtAddr};

/// The sizes that a mirror works with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Of a notifier's window: a power of two, at least as large as the largest chunk.
    pub notifier_size: ByteSize,
    /// Of ranges: powers of two, descending, none above 2 MiB, the last one a page.
    pub chunk_sizes: Vec<ByteSize>,
}

impl Default for Config {
    fn default() -> Self {
        let chunk_sizes = [ByteSize::mib(2), ByteSize::kib(64), ByteSize::kib(4)].into();
        Self {
            notifier_size: ByteSize::mib(512),
            chunk_sizes,
        }
    }
}

/// What the driver does for one device of a mirror (`drm_gpusvm_ops`).
pub trait SvmOps: Send + Sync + core::fmt::Debug {
    /// Takes the translations of `span` away. Called under the notifier lock, possibly by a fault
    /// handler with a block locked: it must not allocate, not wait and not call back.
    fn zap(&self, span: Span);

    /// Returns when nothing of `span` that began before the zap is in flight. Called once for each
    /// invalidation, as `zap` is.
    fn flush(&self, span: Span);

    /// There is garbage to collect, soon. Called under the notifier lock: it must not wait.
    fn garbage(&self);
}

/// A mirror of a process for one device address space, or for several that share its ranges.
#[derive(Debug)]
pub struct GpuSvm<M: AddressSpace> {
    pub(crate) mm: Arc<M>,
    pub(crate) core: Arc<Core<M>>,
    pub(crate) config: Config,
}

/// What invalidations work on: apart from the address space, which holds it.
#[derive(Debug)]
pub(crate) struct Core<M: AddressSpace> {
    /// Writers invalidate, readers commit mappings.
    pub(crate) notifier_lock: RwLock<()>,
    pub(crate) tree: Mutex<Tree<M>>,
    /// One for each device.
    pub(crate) ops: Box<[Arc<dyn SvmOps>]>,
    /// How many ranges are flagged as unmapped.
    pub(crate) garbage: AtomicUsize,
    /// For each device, whether it has left. Set with the notifier lock held to write.
    pub(crate) left: Box<[AtomicBool]>,
}

impl<M: AddressSpace> Core<M> {
    /// Takes the mapping of one range away from one device. With the notifier lock held to write; to
    /// read, by who serves the range.
    pub(crate) fn unmap(&self, range: &Range<M>, device: DeviceIndex) {
        self.ops[device.0].zap(range.span());
        self.ops[device.0].flush(range.span());
        range.pages(device).set_unmapped();
    }
}

/// Evidence that no invalidation can run.
#[derive(Debug)]
pub struct Quiesced<'svm>(
    #[expect(dead_code, reason = "held, not read")] RwLockReadGuard<'svm, ()>,
);

impl<M: AddressSpace> GpuSvm<M> {
    /// A mirror of `mm` for the devices that `devices` drive: they share its ranges and its notifiers,
    /// and each has pages of its own in every range.
    ///
    /// # Panics
    ///
    /// When the sizes of `config` are not what its fields say, or there is no device.
    pub fn new(mm: Arc<M>, config: Config, devices: impl Into<Box<[Arc<dyn SvmOps>]>>) -> Self {
        let ops = devices.into();
        assert!(!ops.is_empty(), "a mirror is for a device");
        crate::chunk::assert_sizes(&config.chunk_sizes);
        assert!(
            config.notifier_size.get().is_power_of_two(),
            "a window is a power of two"
        );
        assert!(
            config.notifier_size >= config.chunk_sizes[0],
            "a window holds a chunk"
        );
        let ops_left = ops.iter().map(|_| AtomicBool::new(false)).collect();
        let core = Core {
            notifier_lock: RwLock::new(()),
            tree: Mutex::new(Tree::new()),
            ops,
            garbage: AtomicUsize::new(0),
            left: ops_left,
        };
        Self {
            mm,
            core: Arc::new(core),
            config,
        }
    }

    /// The process that is mirrored.
    pub fn mm(&self) -> &Arc<M> {
        &self.mm
    }

    /// The range that holds `at` (`drm_gpusvm_range_find`).
    pub fn range_find(&self, at: VirtAddr) -> Option<Arc<Range<M>>> {
        let tree = self.core.tree.lock();
        let (_, range) = tree.ranges.range(..=at).next_back()?;
        range.span().contains(at).then(|| Arc::clone(range))
    }

    /// How many ranges there are.
    pub fn range_count(&self) -> usize {
        self.core.tree.lock().ranges.len()
    }

    /// The ranges that overlap `span`.
    pub fn ranges_in(&self, span: Span) -> Vec<Arc<Range<M>>> {
        self.core.tree.lock().overlapping(span).cloned().collect()
    }

    /// Whether anything in `span` is mapped on the device (`drm_gpusvm_has_mapping`).
    pub fn has_mapping(&self, span: Span) -> bool {
        self.core
            .tree
            .lock()
            .overlapping(span)
            .any(|range| range.is_mapped())
    }

    /// Keeps invalidations out for as long as the result lives.
    pub fn quiesce(&self) -> Quiesced<'_> {
        Quiesced(self.core.notifier_lock.read())
    }

    /// Makes what was prepared visible to the device by `bind`, if it is still current; else nothing
    /// happens and the pass is stale. So it is for a device that has left. Called by who serves the range.
    ///
    /// # Errors
    ///
    /// The error of `bind`: then nothing of the range is mapped.
    pub fn commit<E>(
        &self,
        range: &Range<M>,
        prepared: Prepared<M>,
        bind: impl FnOnce(&Quiesced<'_>, &[PageRun]) -> Result<(), E>,
    ) -> Result<bool, E> {
        gpusvm_sync::walk!("commit");
        let device = prepared.device;
        let proof = self.quiesce();
        let has_left = self.core.left[device.0].load(Ordering::Acquire);
        if has_left || !range.notifier().is_current(prepared.sequence) || range.is_gone() {
            return Ok(false);
        }
        match bind(&proof, prepared.runs()) {
            Ok(()) => {
                let before = range
                    .pages(device)
                    .set_mapped(prepared, self.mm.now(), &proof);
                // What was mapped before is given back without the lock.
                drop(proof);
                drop(before);
                Ok(true)
            }
            Err(error) => {
                // What was bound goes before an invalidation could miss it: the range is not mapped.
                self.core.unmap(range, device);
                Err(error)
            }
        }
    }

    /// Brings every page of the range home (`drm_gpusvm_range_evict`).
    ///
    /// # Errors
    ///
    /// As [`AddressSpace::range_fault`].
    pub fn range_evict(&self, range: &Range<M>) -> Result<(), gpusvm_mm::MmError> {
        gpusvm_sync::walk!("range_evict");
        let mut homes = pages::homes_for(range.span());
        self.mm
            .range_fault(range.span(), None, Intent::Read, &mut homes)
    }

    /// Lets the memory of a range be no longer watched for it.
    pub(crate) fn disarm(&self, range: &Range<M>) {
        if let Some(token) = range.take_armed() {
            self.mm.disarm(range.span(), token);
        }
    }
}
