//! What can be advised of memory.

use gpusvm_types::{BLOCK_SIZE, ByteSize, PAGE_SIZE, Span};

/// A piece of advice, on the pages of a span.
///
/// Devices are numbered from zero, in the order in which they joined the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Where pages shall live.
    PreferredLocation(Preferred),
    /// Whether a device maps pages where they are, without moving them. One that does not reach them
    /// there moves them all the same. A preferred location counts for more.
    AccessedBy {
        /// Which device.
        device: usize,
        /// Whether it does.
        on: bool,
    },
    /// Whether pages are mostly read: then a device that reads them gets a copy, where that can be done.
    ReadMostly(bool),
    /// The largest piece that pages are mapped and moved in, and so what one fault of the CPU brings
    /// home at most: a power of two from a page to 2 MiB. `None`: as large as fits.
    Granularity(Option<ByteSize>),
    /// Who is evicted first when a device's memory is full.
    EvictionPriority(Priority),
    /// Where atomic operations of devices work.
    Atomics(Atomics),
    /// As if nothing had been advised.
    Nothing,
}

/// Where pages shall live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preferred {
    /// Wherever the policy wants them.
    #[default]
    Anywhere,
    /// In RAM. A device that does not reach RAM takes them all the same.
    Ram,
    /// On this device. Others map them there, if they reach them; else they take them.
    Device(usize),
}

/// Who is evicted first. In this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Before all others.
    Low,
    /// As ever.
    #[default]
    Normal,
    /// After those.
    High,
    /// Never for the sake of others. The program's own touches bring pages home, and unbinding does.
    Pinned,
}

/// Where atomic operations of devices work: the kernel's `DRM_XE_ATOMIC`.
///
/// Mappings say whether they allow atomic operations: one that finds pages where it must not work faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Atomics {
    /// Wherever the hardware can.
    #[default]
    Undefined,
    /// In the device's memory only: the first one moves the pages there.
    Device,
    /// Of devices and the CPU: in RAM where the device's atomics work there, else in its memory.
    Global,
    /// Of the CPU only: those of devices are refused.
    Cpu,
}

impl Atomics {
    /// Whether they may work on RAM, where the hardware can.
    pub(crate) const fn on_ram(self) -> bool {
        matches!(self, Self::Undefined | Self::Global)
    }

    /// Whether they may work on device memory.
    pub(crate) const fn on_devmem(self) -> bool {
        !matches!(self, Self::Cpu)
    }
}

/// A set of devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceSet(u64);

impl DeviceSet {
    /// None.
    pub const NONE: Self = Self(0);
    /// How many devices there can be.
    pub const CAPACITY: usize = 64;

    /// Whether it holds a device.
    pub const fn contains(self, device: usize) -> bool {
        device < Self::CAPACITY && self.0 >> device & 1 != 0
    }

    /// The set with a device, or without.
    ///
    /// # Panics
    ///
    /// When there is no such device in any address space.
    #[must_use]
    pub const fn with(self, device: usize, on: bool) -> Self {
        assert!(device < Self::CAPACITY, "more devices than there can be");
        let bit = 1 << device;
        Self(if on { self.0 | bit } else { self.0 & !bit })
    }
}

/// All that is advised of a page. The default: nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Where it shall live.
    pub preferred: Preferred,
    /// Who maps it where it is.
    pub accessed_by: DeviceSet,
    /// Whether it is mostly read.
    pub read_mostly: bool,
    /// The largest piece it is mapped and moved in.
    pub granularity: Option<ByteSize>,
    /// Who is evicted first.
    pub priority: Priority,
    /// Where atomics of devices work.
    pub atomics: Atomics,
}

impl Attributes {
    /// Nothing is advised.
    pub const NONE: Self = Self {
        preferred: Preferred::Anywhere,
        accessed_by: DeviceSet::NONE,
        read_mostly: false,
        granularity: None,
        priority: Priority::Normal,
        atomics: Atomics::Undefined,
    };

    /// These, but for what `advice` says.
    #[must_use]
    pub const fn with(self, advice: Advice) -> Self {
        let mut with = self;
        match advice {
            Advice::PreferredLocation(preferred) => with.preferred = preferred,
            Advice::AccessedBy { device, on } => {
                with.accessed_by = self.accessed_by.with(device, on);
            }
            Advice::ReadMostly(on) => with.read_mostly = on,
            Advice::Granularity(size) => with.granularity = size,
            Advice::EvictionPriority(priority) => with.priority = priority,
            Advice::Atomics(atomics) => with.atomics = atomics,
            Advice::Nothing => return Self::NONE,
        }
        with
    }

    /// Whether what a device maps could be otherwise under `other`.
    pub(crate) fn is_otherwise(self, other: Self, device: usize) -> bool {
        let by = |it: Self| it.accessed_by.contains(device);
        let rest = |it: Self| Self {
            accessed_by: DeviceSet(0),
            priority: Priority::Normal,
            ..it
        };
        by(self) != by(other) || rest(self) != rest(other)
    }

    /// Whether a range as large as `span` is not too large.
    pub(crate) fn allows(self, span: Span) -> bool {
        self.granularity.is_none_or(|largest| span.len() <= largest)
    }
}

/// Whether pages can be mapped and moved in pieces of this size.
pub(crate) const fn is_chunk(size: ByteSize) -> bool {
    let bytes = size.get();
    bytes.is_power_of_two() && PAGE_SIZE.get() <= bytes && bytes <= BLOCK_SIZE.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_advice_changes_its_own_attribute_and_nothing_takes_all_back() {
        let all = [
            Advice::PreferredLocation(Preferred::Device(3)),
            Advice::AccessedBy {
                device: 63,
                on: true,
            },
            Advice::ReadMostly(true),
            Advice::Granularity(Some(ByteSize::kib(64))),
            Advice::EvictionPriority(Priority::Pinned),
            Advice::Atomics(Atomics::Cpu),
        ];
        let mut sum = Attributes::default();
        for advice in all {
            let alone = Attributes::default().with(advice);
            assert_ne!(alone, Attributes::default(), "{advice:?}");
            assert_eq!(alone.with(advice), alone);
            sum = sum.with(advice);
        }
        assert!(sum.accessed_by.contains(63) && !sum.accessed_by.contains(3));
        assert_eq!(sum.with(Advice::Nothing), Attributes::default());
        let off = Advice::AccessedBy {
            device: 63,
            on: false,
        };
        assert_eq!(sum.with(off).accessed_by, DeviceSet::default());
    }

    #[test]
    fn a_device_is_not_disturbed_by_what_concerns_others() {
        let nothing = Attributes::default();
        let by = nothing.with(Advice::AccessedBy {
            device: 1,
            on: true,
        });
        assert!(by.is_otherwise(nothing, 1) && !by.is_otherwise(nothing, 0));
        let pinned = nothing.with(Advice::EvictionPriority(Priority::Pinned));
        assert!(!pinned.is_otherwise(nothing, 0));
        assert!(
            nothing
                .with(Advice::ReadMostly(true))
                .is_otherwise(nothing, 0)
        );
    }

    #[test]
    fn chunks_are_powers_of_two_of_a_page_to_a_block() {
        let kib = ByteSize::kib;
        for (size, is) in [
            (kib(4), true),
            (kib(64), true),
            (kib(2048), true),
            (kib(2), false),
            (kib(4096), false),
            (kib(12), false),
            (ByteSize::ZERO, false),
        ] {
            assert_eq!(is_chunk(size), is, "{size}");
        }
    }
}
