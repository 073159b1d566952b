//! How an engine comes to be, and on which rung.

use super::Process;
use crate::delay::Delays;
use crate::discard::Discards;
use crate::events::{self, Events};
use crate::fork::{Birth, Gate, Starting};
use crate::handler::{self, Crew};
use crate::mover::{Mover, Remapper, UffdMover};
use crate::regions::Regions;
use crate::source::FaultSource;
use crate::source::signals::SignalSource;
use crate::source::uffd::UffdSource;
use crate::staging::Staging;
use crate::stats::Counters;
use crate::sys::pagemap::PageMap;
use crate::sys::probe::{Capabilities, Rung};
use crate::sys::procmap::VmaTable;
use crate::sys::room::Room;
use crate::sys::thp::Thp;
use crate::sys::uffd::{Features, Flavour, OpenError, RegisterModes, Uffd};
use gpusvm_mm::Memories;
use gpusvm_mm::Notifiers;
use gpusvm_sync::atomic::{AtomicBool, AtomicI32};
use gpusvm_sync::{Arc, Mutex, OneShot};
use rustix::io::Errno;
use std::time::Instant;

/// How to start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The rung to stand on; the best that there is if none is named.
    pub rung: Option<Rung>,
    /// Whether pages on devices are to be marked in the program's page table: see
    /// [`Process::leaves_markers`].
    pub markers: bool,
}

/// Why there is no engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The rung that was asked for is not to be had here.
    #[error("rung {} is not to be had here: {why}", rung.number())]
    NoRung {
        /// Which one.
        rung: Rung,
        /// Why not.
        why: String,
    },
    /// Userfaultfd was refused.
    #[error(transparent)]
    Userfaultfd(#[from] OpenError),
    /// There is one engine on the last rung already: signals have one handler.
    #[error("another engine of this process stands on the rung of signals already")]
    SignalsTaken,
    /// The system refused something.
    #[error("{what}: {error}")]
    System {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        error: std::io::Error,
    },
}

/// How pages move, and where faults arrive.
type Means = (Box<dyn Mover>, Box<dyn FaultSource>);

impl Process {
    /// Starts the engine's part of this process: handlers for faults, a staging pool, no memory yet.
    ///
    /// Also in a child of fork, where engines of the parent are gone. POSIX promises such a child neither
    /// memory nor threads before it calls exec; glibc lets it have both, unless another thread of the parent
    /// held a lock of a library at the fork.
    ///
    /// # Errors
    ///
    /// `NoRung` when the rung that was asked for is not to be had, `SignalsTaken`, `System`.
    pub fn start(options: Options) -> Result<Arc<Self>, StartError> {
        let offered = Capabilities::probe();
        let rung = options.rung.unwrap_or(offered.best_rung());
        if let Err(why) = offered.carries(rung) {
            return Err(StartError::NoRung { rung, why });
        }
        // From before the first descriptor: a child has to end those of every engine.
        let starting = Starting::begin();
        // What comes home on the last rung is a mapping of staging: it must be as the program's.
        let forked = rung == Rung::Signals;
        let staging = Staging::new(Thp::read(), forked);
        let staging = staging.map_err(system("reserving the staging pool"))?;
        let room = Room::reserve().map_err(system("reserving address space"))?;
        let (mover, source) = means(rung, &staging, options.markers)?;
        #[expect(clippy::disallowed_methods, reason = "this is where the clock enters")]
        let began = Instant::now();
        let process = Arc::new(Self {
            regions: Regions::default(),
            staging,
            room,
            mover,
            source,
            notifiers: Notifiers::default(),
            memories: Memories::default(),
            events: Events::new(),
            discards: Discards::new(offered.is_at_least(6, 17)),
            delays: Delays::new(),
            no_huge_page: OneShot::default(),
            crew: Crew::new(),
            gate: Gate::new(),
            birth: Birth::now(),
            counters: Counters::new(),
            rung,
            vmas: VmaTable::open().map_err(system("opening the mappings of the process"))?,
            pages: PageMap::open().map_err(system("opening the page tables of the process"))?,
            began,
            stopping: AtomicBool::new(false),
            handlers: [const { AtomicI32::new(0) }; handler::HANDLERS],
            threads: Mutex::new(Vec::new()),
            owned: Mutex::new(Vec::new()),
        });
        if rung == Rung::Signals {
            SignalSource::serve(&process);
        }
        process.start_threads()?;
        starting.done(&process);
        Ok(process)
    }

    fn start_threads(self: &Arc<Self>) -> Result<(), StartError> {
        let failed = |error| StartError::System {
            what: "starting a thread",
            error,
        };
        for thread in handler::start(self).map_err(failed)? {
            self.thread(thread);
        }
        // Whoever asks for their ids gets all of them.
        while self.handler_threads().len() < handler::HANDLERS {
            std::thread::yield_now();
        }
        let process = Arc::clone(self);
        let events = std::thread::Builder::new().name("gpusvm-events".to_owned());
        self.thread(
            events
                .spawn(move || events::run(&process))
                .map_err(failed)?,
        );
        Ok(())
    }
}

fn means(rung: Rung, staging: &Staging, markers: bool) -> Result<Means, StartError> {
    let (flavour, moves) = match rung {
        Rung::Move => (Flavour::Full, true),
        Rung::Copy => (Flavour::Full, false),
        Rung::UserMode { moves } => (Flavour::UserModeOnly, moves),
        Rung::Signals => {
            let source = SignalSource::install()?;
            return Ok((Box::new(Remapper), Box::new(source)));
        }
    };
    let wanted = Features::WP
        | Features::POISON
        | Features::MINOR_SHMEM
        | Features::EXACT_ADDRESS
        | Features::THREAD_ID
        | Features::EVENT_REMAP
        | Features::EVENT_REMOVE
        | Features::EVENT_UNMAP;
    // Not where pages are taken in place: there a protection must leave holes as they are.
    let wanted = match markers && moves {
        true => wanted | Features::WP_UNPOPULATED,
        false => wanted,
    };
    let program = Arc::new(Uffd::open(flavour, wanted | Features::MOVE)?);
    let moves = moves && program.features().contains(Features::MOVE);
    let staging_uffd = if moves {
        Some(register_staging(flavour, staging)?)
    } else {
        None
    };
    let watcher = watcher(flavour, program.features())?;
    let mover = UffdMover::new(Arc::clone(&program), watcher.clone(), staging_uffd)
        .map_err(system("opening the page tables of the process"))?;
    let source = UffdSource::new(program, watcher).map_err(system("waiting for faults"))?;
    Ok((Box::new(mover), Box::new(source)))
}

/// Memory that is only watched is registered with a descriptor of its own, for write protection.
fn watcher(flavour: Flavour, features: Features) -> Result<Option<Arc<Uffd>>, StartError> {
    if !features.contains(Features::WP) {
        return Ok(None);
    }
    let wanted = Features::WP | Features::EVENT_REMAP | Features::EVENT_UNMAP;
    Ok(Some(Arc::new(Uffd::open(flavour, wanted)?)))
}

/// The staging area is registered with a descriptor of its own, that sends no events.
fn register_staging(flavour: Flavour, staging: &Staging) -> Result<Uffd, StartError> {
    let uffd = Uffd::open(flavour, Features::MOVE)?;
    let modes = RegisterModes {
        missing: true,
        wp: false,
        minor: false,
    };
    // SAFETY: nobody touches a missing page of the staging area: slots are touched only where pages
    // were moved in.
    unsafe { uffd.register(staging.span(), modes) }
        .map_err(system("registering the staging pool"))?;
    Ok(uffd)
}

pub(super) fn system(what: &'static str) -> impl Fn(Errno) -> StartError {
    move |errno| StartError::System {
        what,
        error: errno.into(),
    }
}
