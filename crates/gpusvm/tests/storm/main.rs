//! The storm: everybody touches everything, by CPU and in several address spaces of two devices, while one
//! thread unmaps, maps, moves, drops, protects, advises, prefetches and forks as it likes. Not one wrong
//! byte, no hang, nothing left behind. `storm_sim` is the same where one seed is one history.
//!
//! `GPUSVM_STORM_SECONDS` says how long, `GPUSVM_SEED` repeats the decisions (not the schedule), and
//! `GPUSVM_RUNG` names one rung of the ladder instead of all. `GPUSVM_STORM_WITHOUT` names actions that are
//! left out, with commas between; `copies` leaves out pages that are read in copies.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, also outside of its test function, and has threads and clocks"
)]

mod actions; // what the mutator does
mod end; // what must be as before
mod mutator; // the thread that changes mappings
mod random; // decisions that a seed repeats
mod table; // what every cell is to hold
mod touch; // who touches

use actions::ACTIONS;
use end::Before;
use gpusvm::{Access, FaultInfo, MigrateOnTouch, Plan, Policy};
use gpusvm::{ByteSize, Error, Rung, SoftGpu, Stats, Svm};
use gpusvm_testkit::{Watchdog, die};
use mutator::Mutator;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use table::{Held, Table, Words};
use touch::Reach;

/// Pages of the program's own.
const PAGES: usize = 5_000;
/// Memory of the library's.
const SLICES: usize = 8;
const SLICE_PAGES: usize = 150;
const CPU_THREADS: u64 = 8;
const QUEUES: u64 = 4;
/// Much less than the pages: devices evict all the time.
const VRAM: ByteSize = ByteSize::mib(6);
/// How many of the last decisions are remembered.
const LOG: usize = 20_000;

/// What everybody knows.
#[derive(Debug)]
struct Storm {
    svm: Svm,
    devices: usize,
    seed: u64,
    table: Table,
    counts: Counts,
    over: AtomicBool,
    log: Mutex<VecDeque<Decision>>,
}

/// What the mutator did, to which pages.
#[derive(Clone, Debug)]
struct Decision {
    name: &'static str,
    pages: Range<usize>,
    /// Where they were, and where they are.
    from: u64,
    to: Option<u64>,
}

impl Decision {
    fn concerns(&self, place: u64, page: usize) -> bool {
        let len = (self.pages.len() * table::PAGE) as u64;
        let holds = |at: u64| at <= place && place < at + len;
        self.pages.contains(&page) || holds(self.from) || self.to.is_some_and(holds)
    }
}

#[derive(Debug, Default)]
struct Counts {
    writes: AtomicU64,
    reads: AtomicU64,
    peeks: AtomicU64,
    peeks_for_nothing: AtomicU64,
    launches: AtomicU64,
    actions: [AtomicU64; ACTIONS.len()],
}

impl Storm {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn adopts(&self) -> bool {
        self.svm.rung().number() < 4
    }

    fn log(&self, decision: Decision) {
        let mut log = self.log.lock().unwrap();
        if log.len() == LOG {
            log.pop_front();
        }
        log.push_back(decision);
    }

    /// What was done with a page, and at its place.
    fn history(&self, page: usize) -> String {
        let place = self.table.place(page);
        let Ok(log) = self.log.try_lock() else {
            return "the mutator is at it".to_owned();
        };
        let known = log
            .iter()
            .enumerate()
            .filter(|(_, d)| d.concerns(place, page));
        let lines = known.map(|(i, d)| {
            let Decision {
                name,
                pages,
                from,
                to,
            } = d;
            format!("  {i}: {name} {pages:?} {from:#x} -> {to:x?}\n")
        });
        let lines: String = lines.collect();
        format!(
            "page {page} at {place:#x}, of {} decisions:\n{lines}",
            log.len()
        )
    }

    /// What was found is what the cell holds, and it could be read.
    fn judge<R: Reach>(&self, cell: usize, held: Held, found: &Words, done: &Result<(), String>) {
        let at = self.table.address(cell);
        if let Err(error) = done {
            let side = R::NAME;
            let history = self.history(cell / table::CELLS_PER_PAGE);
            self.wrong(&format!(
                "{side} reads cell {cell} at {at:#x}, {held}: {error}\n{history}"
            ));
        }
        if let Some(i) = held.wrong(cell, found) {
            let wrong = (0..found.len()).filter(|i| found[*i] != held.words(cell)[*i]);
            let history = self.history(cell / table::CELLS_PER_PAGE);
            self.wrong(&format!(
                "{} read cell {cell} at {at:#x}, {held}: {} words wrong, the first is {i}: {:#x}\n{history}",
                R::NAME,
                wrong.count(),
                found[i],
            ));
        }
    }

    fn judge_write<R: Reach>(&self, cell: usize, held: Held, done: &Result<(), String>) {
        if let Err(error) = done {
            let (side, at) = (R::NAME, self.table.address(cell));
            self.wrong(&format!(
                "{side} writes cell {cell} at {at:#x}, {held}: {error}"
            ));
        }
    }

    /// Says what is known, and ends the process: nothing is to happen to the evidence.
    fn wrong(&self, what: &str) -> ! {
        let (seed, rung) = (self.seed, self.svm.rung());
        let (report, stats) = (self.report(), self.svm.stats());
        die(&format!(
            "WRONG: {what}\nGPUSVM_SEED={seed} on {rung}\n{report}\n{stats:?}"
        ))
    }

    fn report(&self) -> String {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let counts = &self.counts;
        let mut report = format!(
            "{} writes, {} reads, {} peeks and {} for nothing, {} launches;",
            of(&counts.writes),
            of(&counts.reads),
            of(&counts.peeks),
            of(&counts.peeks_for_nothing),
            of(&counts.launches),
        );
        for (action, count) in ACTIONS.iter().zip(&counts.actions) {
            report += &format!(" {} {},", action.name, of(count));
        }
        report
    }
}

/// In every third chunk of memory, who reads gets copies.
#[derive(Debug)]
struct Copies(MigrateOnTouch);

impl Policy for Copies {
    fn on_device_fault(&self, fault: &FaultInfo) -> Plan {
        let plan = self.0.on_device_fault(fault);
        let copies = (fault.at.get() >> 16).is_multiple_of(3) && fault.access == Access::Read;
        Plan {
            duplicate: plan.duplicate || copies,
            ..plan
        }
    }
}

/// An engine on a rung, or `None` if the rung is not to be had here. The seed says whose memory the CPU
/// uses in place, and whether pages are marked that are on devices.
fn engine(rung: Rung, seed: u64) -> Option<Svm> {
    let gpu = |bit: u64| {
        let coherent = seed & bit != 0 && !is_left_out("coherent");
        let gpu = SoftGpu::builder().vram(VRAM).units(2);
        gpu.coherent_memory(coherent).build().unwrap()
    };
    let builder = Svm::builder().device(gpu(1)).device(gpu(2));
    let policy = MigrateOnTouch::default();
    let builder = match is_left_out("copies") {
        true => builder.policy(Arc::new(policy)),
        false => builder.policy(Arc::new(Copies(policy))),
    };
    let builder = builder.show_in_pagemap(seed % 2 == 1);
    match builder.rung(Some(rung)).build() {
        Ok(svm) => Some(svm),
        Err(Error::Start(error)) => {
            gpusvm_testkit::unavailable(&error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// A storm of so long. What happened, if there is such a rung.
fn rage(rung: Rung, time: Duration, seed: u64) -> Option<(String, Stats)> {
    let svm = engine(rung, seed)?;
    let storm = Arc::new(Storm {
        svm,
        devices: 2,
        seed,
        table: Table::new(PAGES + SLICES * SLICE_PAGES),
        counts: Counts::default(),
        over: AtomicBool::new(false),
        log: Mutex::default(),
    });
    let known = Arc::downgrade(&storm);
    let state = move || {
        let storm = known.upgrade()?;
        let log = storm.log.try_lock();
        let last = log.iter().flat_map(|log| log.iter().rev().take(20));
        let last: String = last.map(|decision| format!("  {decision:?}\n")).collect();
        let (report, stats) = (storm.report(), storm.svm.stats());
        Some(format!("GPUSVM_SEED={seed}: {report}\n{last}{stats:?}"))
    };
    let state = move || state().unwrap_or_default();
    let _watchdog = Watchdog::start(time + Duration::from_secs(120), state);
    let mut mutator = Mutator::new(&storm);
    std::thread::scope(|scope| {
        let storm = &storm;
        for i in 0..CPU_THREADS {
            scope.spawn(move || touch::on_cpu(storm, i));
        }
        for i in 0..QUEUES {
            scope.spawn(move || touch::on_device(storm, i));
        }
        scope.spawn(|| mutator.run());
        std::thread::sleep(time);
        storm.over.store(true, Ordering::Relaxed);
    });
    mutator.end();
    let report = storm.report();
    let storm = Arc::try_unwrap(storm);
    let svm = storm.unwrap_or_else(|_| panic!("everybody is gone")).svm;
    Some((report, svm.shutdown().unwrap()))
}

/// As `rage`; afterwards all is as before.
fn storm(rung: Rung, time: Duration, seed: u64) {
    // What is there once, and stays, is there before.
    if rage(rung, Duration::from_millis(100), seed).is_none() {
        return;
    }
    let before = Before::look();
    let (report, stats) = rage(rung, time, seed).unwrap();
    println!(
        "rung {}, {time:?}, GPUSVM_SEED={seed}: {report}",
        rung.number()
    );
    println!("    {stats:?}");
    let left = (
        stats.vram_used_bytes,
        stats.vram_lost_bytes,
        stats.pages_on_devices,
    );
    assert_eq!((left, stats.ranges_live), ((0, 0, 0), 0), "seed {seed}");
    before.compare();
}

/// Whether it is not to happen, to find out what else does it.
fn is_left_out(name: &str) -> bool {
    let names = std::env::var("GPUSVM_STORM_WITHOUT").unwrap_or_default();
    names.split(',').any(|it| it == name)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn everything_at_once() {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let seed = number("GPUSVM_SEED").unwrap_or(u64::from(now.subsec_nanos()));
    eprintln!("GPUSVM_SEED={seed}");
    let time = Duration::from_secs(number("GPUSVM_STORM_SECONDS").unwrap_or(4));
    let only = number("GPUSVM_RUNG");
    let rungs = [
        Rung::Move,
        Rung::Copy,
        Rung::UserMode { moves: true },
        Rung::UserMode { moves: false },
        Rung::Signals,
    ];
    for (i, rung) in rungs.into_iter().enumerate() {
        match only {
            Some(only) if only != u64::from(rung.number()) => {}
            // The best gets most of the time.
            None if i > 0 => storm(rung, time / 4, seed),
            _ => storm(rung, time, seed),
        }
    }
}
