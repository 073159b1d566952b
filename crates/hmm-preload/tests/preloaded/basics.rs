//! What the commands of a device are, and what is refused.

use crate::kit::{
    Area, Cmd, DEVICES, Descriptor, Device, Do, PAGE, Span, is_preloaded, request, seen,
};

const NONE: u8 = seen::NONE;
const RAM: u8 = seen::WRITE;
const PRIVATE: u8 = seen::PRIVATE_LOCAL | seen::WRITE;
const COHERENT: u8 = seen::COHERENT_LOCAL | seen::WRITE;
const REMOTE: u8 = seen::COHERENT_REMOTE | seen::WRITE;

/// The way of a page: read where it is, to the device, seen there, home by a touch, exclusive, released.
#[test]
fn commands_mean_what_the_kernels_device_means() {
    if !is_preloaded("basics::commands_mean_what_the_kernels_device_means") {
        return;
    }
    let (device, other) = (Device::open(), Device::number(1));
    let area = Area::new(8);
    (0..8u8).for_each(|n| area.set(usize::from(n), n));
    let mut data = vec![0u8; 8 * PAGE];
    let all = area.all();
    // One fault for all of it, then none.
    let done = device.run(Do::Read, all, &mut data).unwrap();
    assert_eq!((done.cpages, done.faults), (8, 1));
    assert_eq!(data[5 * PAGE], 5);
    assert_eq!(device.run(Do::Read, all, &mut data).unwrap().faults, 0);
    let done = device.run(Do::MigrateToDev, area.part(0, 4), &mut data);
    assert_eq!(done.unwrap().cpages, 4);
    let done = other.run(Do::MigrateToDev, area.part(4, 2), &mut data);
    assert_eq!(done.unwrap().cpages, 2);
    // What is on another device stays there.
    let refused = device.run(Do::MigrateToDev, area.part(4, 1), &mut data);
    assert_eq!(refused.unwrap_err(), libc::ENOENT);
    let rest = [NONE, NONE, RAM, RAM];
    assert_eq!(device.look(all), [[PRIVATE; 4], rest].concat());
    let done = device.run(Do::MigrateToSys, all, &mut data);
    assert_eq!(done.unwrap().cpages, 4);
    assert_eq!(device.look(all), [[RAM; 4], rest].concat());
    assert_eq!(area.get(5), 5);
    // Exclusive until the CPU touches it.
    device.run(Do::Exclusive, all, &mut data).unwrap();
    let held = device.run(Do::CheckExclusive, all, &mut data);
    assert_eq!(held.unwrap_err(), libc::EPERM);
    (0..8).for_each(|n| area.set(n, area.get(n) + 1));
    device.run(Do::CheckExclusive, all, &mut data).unwrap();
    data.fill(7);
    assert_eq!(device.run(Do::Write, all, &mut data).unwrap().cpages, 8);
    assert_eq!(area.get(3), 7);
    device.run(Do::MigrateToDev, all, &mut data).unwrap();
    device.run(Do::Release, area.part(0, 1), &mut data).unwrap();
    assert_eq!(device.look(all), [RAM; 8]);
    device.close();
    other.close();
}

/// Devices 2 and 3: the CPU uses their pages in place, and only commands move them.
#[test]
fn coherent_devices_share_their_pages_with_the_cpu() {
    if !is_preloaded("basics::coherent_devices_share_their_pages_with_the_cpu") {
        return;
    }
    let (device, other) = (Device::number(2), Device::number(3));
    let area = Area::new(8);
    (0..6u8).for_each(|n| area.set(usize::from(n), n));
    let mut data = vec![0u8; 8 * PAGE];
    let all = area.all();
    for (device, first, count) in [(&device, 0, 3), (&other, 3, 2), (&device, 6, 2)] {
        let done = device.run(Do::MigrateToDev, area.part(first, count), &mut data);
        assert_eq!(done.unwrap().cpages, count as u64);
    }
    let seen = [
        COHERENT, COHERENT, COHERENT, REMOTE, REMOTE, RAM, COHERENT, COHERENT,
    ];
    assert_eq!(device.look(all), seen);
    // What is on another device stays there, and is read there; and what the CPU writes is seen.
    let refused = device.run(Do::MigrateToDev, area.part(3, 1), &mut data);
    assert_eq!(refused.unwrap_err(), libc::ENOENT);
    (0..8).for_each(|n| area.set(n, area.get(n) + 1));
    let done = device.run(Do::Read, all, &mut data).unwrap();
    assert_eq!((done.cpages, done.faults), (8, 1));
    let read: Vec<u8> = data.iter().step_by(PAGE).copied().collect();
    assert_eq!(read, [1, 2, 3, 4, 5, 6, 1, 1]);
    data.fill(9);
    device.run(Do::Write, all, &mut data).unwrap();
    assert_eq!(area.get(3), 9);
    assert_eq!(device.look(all), seen);
    let done = device.run(Do::MigrateToSys, all, &mut data);
    assert_eq!(done.unwrap().cpages, 5);
    assert_eq!(
        device.look(all),
        [RAM, RAM, RAM, REMOTE, REMOTE, RAM, RAM, RAM]
    );
    // Exclusive access takes pages from the CPU here too.
    other
        .run(Do::Exclusive, area.part(2, 3), &mut data)
        .unwrap();
    let held = other.run(Do::CheckExclusive, all, &mut data);
    assert_eq!(held.unwrap_err(), libc::EPERM);
    (2..5).for_each(|n| area.set(n, area.get(n) + 1));
    other.run(Do::CheckExclusive, all, &mut data).unwrap();
    assert_eq!(area.get(4), 10);
    other.run(Do::MigrateToDev, all, &mut data).unwrap();
    assert_eq!(device.look(all), [REMOTE; 8]);
    other.run(Do::Release, area.part(0, 1), &mut data).unwrap();
    assert_eq!(device.look(all), [RAM; 8]);
    device.close();
    other.close();
}

/// What is wrong is refused with the kernel's numbers, and leaves the command as it was.
#[test]
fn what_is_wrong_is_refused() {
    if !is_preloaded("basics::what_is_wrong_is_refused") {
        return;
    }
    let device = Device::open();
    let (area, shared) = (Area::new(4), Area::shared(1));
    let at = area.at;
    let mut data = vec![1u8; 4 * PAGE];
    let einval = Err(libc::EINVAL);
    let mut send = |request, at, pages| {
        let mut cmd = Cmd::new(Span { at, pages }, &mut data);
        device.send(request, &mut cmd).map(|()| cmd.cpages)
    };
    assert_eq!(send(request(77), at, 1), einval);
    let mut run = |what: Do, at, pages| send(what.request(), at, pages);
    assert_eq!(run(Do::Read, at.wrapping_add(1), 1), einval);
    assert_eq!(run(Do::Read, at, 0), einval);
    assert_eq!(run(Do::Read, at, usize::MAX / PAGE), einval);
    assert_eq!(run(Do::MigrateToDev, shared.at, 1), Err(libc::ENOENT));
    assert_eq!(run(Do::Write, shared.at, 1), Ok(1));
    // SAFETY: pages of our own.
    let done = unsafe { libc::mprotect(at.cast(), PAGE, libc::PROT_READ) };
    assert_eq!(done, 0);
    assert_eq!(run(Do::Read, at, 1), Ok(1));
    assert_eq!(run(Do::Write, at, 1), Err(libc::EPERM));
    // SAFETY: as above.
    let done = unsafe { libc::mprotect(at.cast(), PAGE, libc::PROT_NONE) };
    assert_eq!(done, 0);
    assert_eq!(run(Do::Read, at, 1), Err(libc::EFAULT));
    assert_eq!(run(Do::Write, at, 1), Err(libc::EFAULT));
    assert_eq!(run(Do::MigrateToDev, at, 1), einval);
    // SAFETY: as above.
    let done = unsafe { libc::munmap(area.page(1).cast(), PAGE) };
    assert_eq!(done, 0);
    assert_eq!(run(Do::Read, area.page(1), 2), Err(libc::EFAULT));
    let mut nowhere = Cmd {
        ptr: 8,
        ..Cmd::new(shared.all(), &mut [])
    };
    let refused = device.send(Do::Read.request(), &mut nowhere);
    assert_eq!(refused, Err(libc::EFAULT));
    for path in [c"/dev/hmm_dmirror4", c"/dev/hmm_dmirror9"] {
        assert_eq!(Descriptor::open(path, 0), Err(libc::ENOENT), "{path:?}");
    }
}

/// A program may have the request in an `int`: what is above its 32 bits is not looked at.
#[test]
fn a_request_has_32_bits() {
    if !is_preloaded("basics::a_request_has_32_bits") {
        return;
    }
    let (device, area) = (Device::open(), Area::new(1));
    let mut data = [0u8; PAGE];
    let mut cmd = Cmd::new(area.all(), &mut data);
    let request = Do::Read.request() | 0xffff_ffff << 32;
    assert_eq!(device.send(request, &mut cmd), Ok(()));
    assert_eq!(cmd.cpages, 1);
    device.close();
}

/// A descriptor is one like any other: `dup` keeps the device, `close` of the last ends it, and memory is home.
#[test]
fn the_last_descriptor_ends_the_device() {
    if !is_preloaded("basics::the_last_descriptor_ends_the_device") {
        return;
    }
    for _ in 0..3 {
        let fd = Descriptor::open(DEVICES[1], 0).unwrap();
        let twin = fd.dup();
        let area = Area::new(2);
        area.set(0, 9);
        fd.take(area.all());
        fd.close().unwrap();
        assert_eq!(twin.look(area.all()), [PRIVATE; 2]);
        assert!(threads() > 2, "the engine runs");
        twin.close().unwrap();
        assert_eq!(area.get(0), 9);
        let refused = twin.run(Do::Snapshot, area.all(), &mut [0; 2]);
        assert_eq!(refused.unwrap_err(), libc::EBADF);
        assert!(threads() <= 2, "the engine has ended");
    }
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}
