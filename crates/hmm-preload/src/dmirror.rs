//! What each command means: the kernel's `dmirror`, on the interface of `gpusvm`.
//!
//! ```text
//!   READ, WRITE       copy what is mapped; at the first page that is not: map all of the rest, on
//!   MIGRATE_TO_DEV    share, migrate, then read back what the device has mapped
//!   MIGRATE_TO_SYS    the pages of this device go home
//!   SNAPSHOT          one byte for each page; nothing faults
//!   EXCLUSIVE         pages come to the device, for itself; a touch of the CPU takes them away, and a WRITE
//!   CHECK_EXCLUSIVE   whether any still is
//!   RELEASE           everything that is on the device goes home
//!   FLAGS             what the next commands meet
//!   READ_UNLOCKED     as READ, and waits for a userfaultfd of the program, which READ does not
//! ```

use crate::command::{self, Command, Kind, PAGE};
use crate::files::File;
use crate::{flags, snapshot};
use core::ffi::{c_ulong, c_void};
use gpusvm::{
    Access, ByteSize, DeviceVm, Error, FaultError, LaneError, LaunchError, PagePlace, PageState,
    Protection,
};
use libc::{EBUSY, EFAULT, EINVAL, ENOENT, EPERM};

/// So many fault rounds that are for nothing are a livelock: the kernel gives up after a second.
const MOST_ROUNDS: u64 = 1000;
/// What the device copies at a time.
const PIECE: usize = 16 << 20;
/// What it reads back at a time.
const WINDOW: usize = 4 << 20;

/// Runs the command at `argument`. An error leaves it as it was.
pub(crate) fn run(file: &File, request: c_ulong, argument: *mut c_void) -> Result<(), i32> {
    let kind = Kind::of(request)?;
    let mut command = Command::read(kind, argument)?;
    flags::met(file, kind, || obey(file, kind, &mut command))?;
    command.write(argument)
}

fn obey(file: &File, kind: Kind, command: &mut Command) -> Result<(), i32> {
    match kind {
        Kind::Read => read(file, command, DeviceVm::populate)?,
        Kind::ReadUnlocked => read(file, command, DeviceVm::populate_unlocked)?,
        Kind::Write => write(file, command)?,
        Kind::MigrateToDev => migrate_to_dev(file, command)?,
        Kind::MigrateToSys => migrate_to_sys(file, command)?,
        Kind::Snapshot => {
            let states = states(file, command)?;
            let bytes: Vec<u8> = states
                .iter()
                .map(|state| snapshot::byte(state, file.device))
                .collect();
            command::give(command.data(), &bytes)?;
            command.cpages = command.npages;
        }
        Kind::Exclusive => exclusive(file, command)?,
        Kind::CheckExclusive => {
            let mut states = states(file, command)?.into_iter();
            if states.any(|state| state.exclusive) {
                return Err(EPERM);
            }
        }
        Kind::Release => file.engine.svm.evict(file.device).map_err(errno)?,
        Kind::Flags => file.flags.set(command.npages),
    }
    Ok(())
}

/// How the device faults: which of the facade's ways.
type Fault = fn(&DeviceVm, *const u8, ByteSize, Access) -> Result<(), Error>;

fn read(file: &File, command: &mut Command, fault: Fault) -> Result<(), i32> {
    let mut data = Command::empty_room(command.len().get())?;
    each_mapped(file, command, (Access::Read, fault), |at, from, to| {
        load(file, at, to - from, &mut data)
    })?;
    command::give(command.data(), &data)?;
    command.cpages = command.npages;
    Ok(())
}

fn write(file: &File, command: &mut Command) -> Result<(), i32> {
    let mut data = Command::room(command.len().get())?;
    command::take(&mut data, command.data())?;
    // What the device has for itself it has for atomics. To write, it faults for it as others do.
    for (first, count) in pieces(&states(file, command)?, |state| state.exclusive) {
        let (at, len) = piece(command, first, count);
        file.vm.migrate_back(at, len).map_err(errno)?;
    }
    let way = (Access::Write, DeviceVm::populate as Fault);
    each_mapped(file, command, way, |at, from, to| {
        store(file, at, &data[from..to])
    })?;
    command.cpages = command.npages;
    Ok(())
}

/// Copies piece by piece what the device has mapped, from where, to where. Whenever it comes to a page that is
/// not, the device faults once, for all of the rest.
fn each_mapped(
    file: &File,
    command: &mut Command,
    (access, fault): (Access, Fault),
    mut copy: impl FnMut(*mut u8, usize, usize) -> Result<(), i32>,
) -> Result<(), i32> {
    let total = command.len();
    let mut done = ByteSize::ZERO;
    while done < total {
        let at = command.at().wrapping_add(done.as_usize());
        let rest = ByteSize::new(total.get() - done.get());
        let states = file.vm.snapshot(at, rest).map_err(errno)?;
        let mapped = states
            .iter()
            .take_while(|state| state.mapped >= Some(access));
        let mapped = mapped.count() as u64 * PAGE;
        if mapped == 0 {
            command.faults += 1;
            if command.faults > MOST_ROUNDS {
                return Err(EBUSY);
            }
            fault(&file.vm, at, rest, access).map_err(errno)?;
            continue;
        }
        // What is taken away meanwhile, the device faults for by itself.
        let before = file.vm.stats().faults;
        let from = done.as_usize();
        copy(at, from, from + ByteSize::new(mapped).as_usize())?;
        command.faults += file.vm.stats().faults - before;
        done = ByteSize::new(done.get() + mapped);
    }
    Ok(())
}

/// What is there comes behind what is in `data`.
fn load(file: &File, at: *mut u8, len: usize, data: &mut Vec<u8>) -> Result<(), i32> {
    for done in (0..len).step_by(PIECE) {
        let piece = ByteSize::from_usize(PIECE.min(len - done));
        // SAFETY: the program has the device read that memory, and vouches for it.
        unsafe { file.vm.read_behind(at.wrapping_add(done), piece, data) }.map_err(errno)?;
    }
    Ok(())
}

fn store(file: &File, at: *mut u8, bytes: &[u8]) -> Result<(), i32> {
    for (n, piece) in bytes.chunks(PIECE).enumerate() {
        // SAFETY: the program has the device write that memory, and vouches for it.
        unsafe { file.vm.write(at.wrapping_add(n * PIECE), piece) }.map_err(errno)?;
    }
    Ok(())
}

fn migrate_to_dev(file: &File, command: &mut Command) -> Result<(), i32> {
    let shared = file.engine.share(command.at(), command.len());
    shared.map_err(errno)?;
    let before = states(file, command)?;
    let readable = readable(&before);
    for (first, count) in pieces(&before[..readable], |state| may_come(state, file.device)) {
        let (at, len) = piece(command, first, count);
        // What cannot come is silently not migrated: the device finds out when it reads.
        let _ = file.vm.migrate(at, len);
    }
    if readable < before.len() {
        return Err(EINVAL);
    }
    let after = states(file, command)?;
    let here = |(before, after): (&PageState, &PageState)| {
        lives_on(after) == Some(file.device) || before.mapped.is_some()
    };
    if !before.iter().zip(&after).all(here) {
        return Err(ENOENT);
    }
    read_back(file, command)
}

fn exclusive(file: &File, command: &mut Command) -> Result<(), i32> {
    let shared = file.engine.share(command.at(), command.len());
    shared.map_err(errno)?;
    let writable = |state: &PageState| state.protection == Some(Protection::ReadWrite);
    if !states(file, command)?.iter().all(writable) {
        return Err(EFAULT);
    }
    let made = file.vm.make_exclusive(command.at(), command.len());
    made.map_err(errno)?;
    read_back(file, command)
}

/// Maps all of it, and gives the program what the device reads there, window by window: while it is in the cache.
fn read_back(file: &File, command: &mut Command) -> Result<(), i32> {
    let populated = file.vm.populate(command.at(), command.len(), Access::Read);
    populated.map_err(errno)?;
    let total = command.len().as_usize();
    let mut data = Command::empty_room(ByteSize::from_usize(total.min(WINDOW)).get())?;
    for done in (0..total).step_by(WINDOW) {
        data.clear();
        let at = command.at().wrapping_add(done);
        load(file, at, WINDOW.min(total - done), &mut data)?;
        command::give(command.data().wrapping_add(done), &data)?;
    }
    command.cpages = command.npages;
    Ok(())
}

fn migrate_to_sys(file: &File, command: &mut Command) -> Result<(), i32> {
    let states = states(file, command)?;
    let readable = readable(&states);
    if readable > 0 {
        let (at, len) = piece(command, 0, readable);
        command.cpages = file.vm.migrate_back(at, len).map_err(errno)?;
    }
    if readable < states.len() {
        return Err(EINVAL);
    }
    Ok(())
}

fn states(file: &File, command: &Command) -> Result<Vec<PageState>, i32> {
    file.vm.snapshot(command.at(), command.len()).map_err(errno)
}

/// How many pages there are before the first that is not mapped, or that may not be read.
fn readable(states: &[PageState]) -> usize {
    let unreadable = |state: &PageState| matches!(state.protection, None | Some(Protection::None));
    states.iter().position(unreadable).unwrap_or(states.len())
}

/// Pages of another device stay there.
fn may_come(state: &PageState, device: usize) -> bool {
    lives_on(state).is_none_or(|at| at == device)
}

/// Which device it lives on.
fn lives_on(state: &PageState) -> Option<usize> {
    match state.place {
        PagePlace::Device(at) | PagePlace::Coherent(at) => Some(at),
        _ => None,
    }
}

/// The longest runs of pages of which something is so: the first, and how many.
fn pieces(states: &[PageState], is_so: impl Fn(&PageState) -> bool) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (n, _) in states.iter().enumerate().filter(|(_, state)| is_so(state)) {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == n => *count += 1,
            _ => runs.push((n, 1)),
        }
    }
    runs
}

fn piece(command: &Command, first: usize, count: usize) -> (*mut u8, ByteSize) {
    let page = ByteSize::new(PAGE).as_usize();
    let at = command.at().wrapping_add(first * page);
    (at, ByteSize::from_usize(count * page))
}

/// What the kernel would say. A device that stops in the middle of a copy says it as one that faults.
fn errno(error: Error) -> i32 {
    let Error::Launch(LaunchError::Lanes { first, .. }) = &error else {
        return error.errno();
    };
    match first {
        LaneError::Fault(FaultError::NotPermitted { access, .. }) if access.is_write() => EPERM,
        LaneError::Fault(FaultError::Gave { .. }) => EBUSY,
        _ => EFAULT,
    }
}
