//! A device's page table, and a log of all that was done.

use gpusvm_pagemap::{PagemapAddr, Peer};
use gpusvm_svm::{PageRun, Permission, SvmOps};
use gpusvm_types::{PAGE_SIZE, PageIndex, Span};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Done {
    Zap(Span),
    Flush(Span),
    Garbage,
    Bind(Span),
    Map(PagemapAddr, Peer),
    Unmap(PagemapAddr, Peer),
}

impl Done {
    /// Whether it was asked of the device's page table.
    pub(crate) fn is_of_table(&self) -> bool {
        !matches!(self, Self::Map(..) | Self::Unmap(..))
    }
}

/// In order, by everybody.
#[derive(Debug, Default)]
pub(crate) struct Log(Mutex<Vec<Done>>);

impl Log {
    pub(crate) fn push(&self, done: Done) {
        self.0.lock().unwrap().push(done);
    }

    /// What was done since this was asked last.
    pub(crate) fn take(&self) -> Vec<Done> {
        core::mem::take(&mut self.0.lock().unwrap())
    }

    /// What was done since to the device's page table.
    pub(crate) fn take_of_table(&self) -> Vec<Done> {
        let mut log = self.take();
        log.retain(Done::is_of_table);
        log
    }

    /// All of it, to be asked for again.
    pub(crate) fn peek(&self) -> Vec<Done> {
        self.0.lock().unwrap().clone()
    }
}

/// The device's side of a mirror.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub(crate) log: Arc<Log>,
    table: Mutex<BTreeMap<PageIndex, (PagemapAddr, Permission)>>,
}

/// What a page table says when it has no memory left for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoRoom;

impl Gpu {
    pub(crate) fn new(log: &Arc<Log>) -> Arc<Self> {
        Arc::new(Self {
            log: Arc::clone(log),
            table: Mutex::default(),
        })
    }

    /// Enters what was prepared.
    pub(crate) fn bind(&self, runs: &[PageRun]) {
        let mut table = self.table.lock().unwrap();
        for run in runs {
            self.log.push(Done::Bind(run.span));
            let mut address = run.address;
            for page in run.span.pages() {
                table.insert(page, (address, run.permission));
                address = behind(address);
            }
        }
    }

    /// Enters the first run only, and then fails.
    pub(crate) fn bind_and_fail(&self, runs: &[PageRun]) -> Result<(), NoRoom> {
        self.bind(&runs[..1]);
        Err(NoRoom)
    }

    /// What the device would find.
    pub(crate) fn lookup(&self, page: PageIndex) -> Option<(PagemapAddr, Permission)> {
        self.table.lock().unwrap().get(&page).copied()
    }

    /// All that it would find.
    pub(crate) fn entries(&self) -> Vec<(PageIndex, PagemapAddr)> {
        let table = self.table.lock().unwrap();
        let entry =
            |(page, (address, _)): (&PageIndex, &(PagemapAddr, Permission))| (*page, *address);
        table.iter().map(entry).collect()
    }
}

impl SvmOps for Gpu {
    fn zap(&self, span: Span) {
        self.log.push(Done::Zap(span));
        let mut table = self.table.lock().unwrap();
        table.retain(|page, _| !span.contains(page.start()));
    }

    fn flush(&self, span: Span) {
        self.log.push(Done::Flush(span));
        // It takes its time, and others go on meanwhile.
        (0..4).for_each(|_| gpusvm_sync::yield_now());
    }

    fn garbage(&self) {
        self.log.push(Done::Garbage);
    }
}

/// The address of the next page.
pub(crate) fn behind(address: PagemapAddr) -> PagemapAddr {
    match address {
        PagemapAddr::System(at) => PagemapAddr::System(at + PAGE_SIZE),
        PagemapAddr::Vram(at) => PagemapAddr::Vram(at + PAGE_SIZE),
        PagemapAddr::Peer(at) => PagemapAddr::Peer(at + PAGE_SIZE),
    }
}
