//! The bytes of a device, and who reaches whose.
//!
//! ```text
//!   bus addresses:   RAM ....... | APERTURES: device 0 | device 1 | ...
//! ```

use crate::world::{Bus, NoAnswer};
use gpusvm_device::Fabric;
use gpusvm_sync::{Arc, Mutex, RwLock, Weak};
use gpusvm_types::{ByteSize, DevAddr, DmaAddr, PAGE_SIZE};
use std::collections::BTreeMap;

/// The memory of one device: pages that were written. The others are garbage.
pub(super) struct Memory {
    len: ByteSize,
    pages: Mutex<BTreeMap<u64, Box<Page>>>,
}

type Page = [u8; PAGE_SIZE.as_usize()];

/// What memory holds before anybody wrote it: never zeroes.
const GARBAGE: u8 = 0xa5;

impl Memory {
    pub(super) fn new(len: ByteSize) -> Arc<Self> {
        let pages = Mutex::new(BTreeMap::new());
        Arc::new(Self { len, pages })
    }

    pub(super) fn len(&self) -> ByteSize {
        self.len
    }

    pub(super) fn read(&self, at: DevAddr, into: &mut [u8]) -> Result<(), NoAnswer> {
        let mut pages = self.pages.lock();
        self.each_page(&mut pages, at, into.len(), |bytes, done| {
            into[done..done + bytes.len()].copy_from_slice(bytes);
        })
    }

    pub(super) fn write(&self, at: DevAddr, from: &[u8]) -> Result<(), NoAnswer> {
        let mut pages = self.pages.lock();
        self.each_page(&mut pages, at, from.len(), |bytes, done| {
            bytes.copy_from_slice(&from[done..done + bytes.len()]);
        })
    }

    pub(super) fn clear(&self, at: DevAddr, len: ByteSize) -> Result<(), NoAnswer> {
        let mut pages = self.pages.lock();
        self.each_page(&mut pages, at, len.as_usize(), |bytes, _| bytes.fill(0))
    }

    pub(super) fn fetch_add(&self, at: DevAddr, by: u64) -> Result<u64, NoAnswer> {
        let mut before = 0;
        let mut pages = self.pages.lock();
        // An aligned word is in one page.
        self.each_page(&mut pages, at, 8, |bytes, _| {
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            before = u64::from_ne_bytes(word);
            bytes.copy_from_slice(&before.wrapping_add(by).to_ne_bytes());
        })?;
        Ok(before)
    }

    /// Acts on `len` bytes page by page, and says how many came before each.
    fn each_page(
        &self,
        pages: &mut BTreeMap<u64, Box<Page>>,
        at: DevAddr,
        len: usize,
        mut act: impl FnMut(&mut [u8], usize),
    ) -> Result<(), NoAnswer> {
        let end = at.checked_add(ByteSize::from_usize(len)).ok_or(NoAnswer)?;
        if end.get() > self.len.get() {
            return Err(NoAnswer);
        }
        let mut done = 0;
        while done < len {
            let here = (at + ByteSize::from_usize(done)).get();
            let offset = ByteSize::new(here % PAGE_SIZE.get()).as_usize();
            let piece = (len - done).min(PAGE_SIZE.as_usize() - offset);
            let page = pages
                .entry(here / PAGE_SIZE.get())
                .or_insert_with(|| Box::new([GARBAGE; PAGE_SIZE.as_usize()]));
            act(&mut page[offset..offset + piece], done);
            done += piece;
        }
        Ok(())
    }
}

impl core::fmt::Debug for Memory {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Memory({})", self.len)
    }
}

/// RAM, and the memories of devices that share theirs.
#[derive(Debug)]
pub struct Interconnect {
    ram: Arc<dyn Bus>,
    ports: RwLock<Vec<Port>>,
}

/// One device on the interconnect.
#[derive(Debug)]
struct Port {
    memory: Weak<Memory>,
    fabric: Fabric,
}

/// Where apertures begin: no world has RAM up there.
const APERTURES: u64 = 1 << 60;
/// The room for each.
const APERTURE: u64 = 1 << 40;

/// What lies at a bus address.
pub(super) enum Reached<'a> {
    Ram(&'a dyn Bus),
    Peer(Arc<Memory>, DevAddr),
    /// Memory of another fabric.
    Foreign,
    /// Memory of a device that is gone.
    Gone,
}

impl Interconnect {
    /// RAM and no device.
    pub fn new(ram: Arc<dyn Bus>) -> Arc<Self> {
        let ports = RwLock::new(Vec::new());
        Arc::new(Self { ram, ports })
    }

    /// RAM.
    pub(super) fn ram(&self) -> &dyn Bus {
        &*self.ram
    }

    /// Makes a memory known to others. Where it begins.
    pub(super) fn attach(&self, memory: &Arc<Memory>, fabric: Fabric) -> DmaAddr {
        let mut ports = self.ports.write();
        let number = ports.len() as u64;
        ports.push(Port {
            memory: Arc::downgrade(memory),
            fabric,
        });
        DmaAddr::new(APERTURES + number * APERTURE)
    }

    /// What a device of `fabric` finds at `at`.
    pub(super) fn find(&self, at: DmaAddr, fabric: Option<Fabric>) -> Reached<'_> {
        let Some(offset) = at.get().checked_sub(APERTURES) else {
            return Reached::Ram(&*self.ram);
        };
        let ports = self.ports.read();
        let number = usize::try_from(offset / APERTURE).ok();
        match number.and_then(|number| ports.get(number)) {
            None => Reached::Gone,
            Some(port) if Some(port.fabric) != fabric => Reached::Foreign,
            Some(port) => port.memory.upgrade().map_or(Reached::Gone, |memory| {
                Reached::Peer(memory, DevAddr::new(offset % APERTURE))
            }),
        }
    }
}
