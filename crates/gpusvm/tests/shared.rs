//! One pointer: the same memory, structures and addresses on both sides.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{Map, can_adopt, engine};
use gpusvm::{ByteSize, Grid, Plain, SvmPtr};

/// A node of a list or a tree, as a program would write it: with plain pointers.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Node {
    value: u64,
    left: *mut Node,
    right: *mut Node,
}

// SAFETY: any bits are a number and two pointers.
unsafe impl Plain for Node {}

fn field<T, F>(node: SvmPtr<T>, offset: usize) -> SvmPtr<F> {
    node.cast::<u8>().add(offset).cast()
}

fn value(node: SvmPtr<Node>) -> SvmPtr<u64> {
    field(node, std::mem::offset_of!(Node, value))
}

fn right(node: SvmPtr<Node>) -> SvmPtr<*mut Node> {
    field(node, std::mem::offset_of!(Node, right))
}

#[test]
fn a_linked_list_is_walked_on_both_sides() {
    const NODES: usize = 100_000;
    let svm = engine(ByteSize::mib(2));
    let mut nodes = svm.alloc_slice::<Node>(NODES).unwrap();
    // In an order that jumps about: each node's successor is far away.
    let base = nodes.as_mut_ptr();
    let at = |i: usize| base.wrapping_add(i * 7_919 % NODES);
    for i in 0..NODES {
        let next = if i + 1 < NODES {
            at(i + 1)
        } else {
            std::ptr::null_mut()
        };
        // SAFETY: inside the slice.
        unsafe {
            *at(i) = Node {
                value: i as u64,
                left: std::ptr::null_mut(),
                right: next,
            }
        };
    }
    let head = SvmPtr::from(at(0));
    let mut seen = svm.alloc_slice::<u64>(1).unwrap();
    let count = seen.device_ptr();
    // SAFETY: the list and the count are the launch's until it ends.
    let launch = unsafe {
        svm.launch(Grid::new(1), move |lane| {
            let (mut node, mut length) = (head, 0u64);
            while !node.as_ptr().is_null() {
                let old = lane.load(value(node))?;
                lane.store(value(node), old * 2 + 1)?;
                node = SvmPtr::from(lane.load(right(node))?);
                length += 1;
            }
            lane.store(count, length)
        })
    };
    launch.unwrap().wait().unwrap();
    assert_eq!(seen[0], NODES as u64);
    let (mut node, mut i) = (at(0), 0u64);
    while !node.is_null() {
        // SAFETY: a node of the list, which only this thread has now.
        let here = unsafe { *node };
        assert_eq!(here.value, i * 2 + 1);
        (node, i) = (here.right, i + 1);
    }
    assert_eq!(i, NODES as u64);
    seen[0] = 0;
    drop((nodes, seen));
    assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
}

/// Rows of a CSR by pointer: an array of pointers into another array.
#[test]
fn rows_by_pointer() {
    const ROWS: usize = 1_000;
    const LONG: usize = 600;
    let svm = engine(ByteSize::mib(2));
    let mut cells = svm.alloc_slice::<u32>(ROWS * LONG).unwrap();
    for (i, cell) in cells.iter_mut().enumerate() {
        *cell = u32::try_from(i % 1_000).unwrap();
    }
    let mut rows = svm.alloc_slice::<*const u32>(ROWS).unwrap();
    for (row, pointer) in rows.iter_mut().enumerate() {
        *pointer = cells.as_ptr().wrapping_add((ROWS - 1 - row) * LONG);
    }
    let sums = svm.alloc_slice::<u64>(ROWS).unwrap();
    let (by_row, out) = (rows.device_ptr(), sums.device_ptr());
    // SAFETY: nothing of it is touched here until the launch has ended.
    let launch = unsafe {
        svm.launch(Grid::new(ROWS), move |lane| {
            let row = SvmPtr::from(lane.load(by_row.add(lane.id()))?);
            let mut tile = [0u32; LONG];
            lane.load_tile(row, &mut tile)?;
            lane.store(
                out.add(lane.id()),
                tile.iter().map(|cell| u64::from(*cell)).sum(),
            )
        })
    };
    launch.unwrap().wait().unwrap();
    for (row, sum) in sums.iter().enumerate() {
        let cells = &cells[(ROWS - 1 - row) * LONG..][..LONG];
        assert_eq!(
            *sum,
            cells.iter().map(|cell| u64::from(*cell)).sum::<u64>(),
            "row {row}"
        );
    }
}

#[test]
fn a_large_vec_is_adopted_and_freed_as_ever() {
    let svm = engine(ByteSize::mib(2));
    if !can_adopt(&svm) {
        return;
    }
    let mut numbers: Vec<u64> = (0..1 << 20).collect();
    let bytes = ByteSize::from_usize(size_of_val(numbers.as_slice()));
    let adopted = svm.adopt(numbers.as_ptr(), bytes).unwrap();
    let (p, n) = (SvmPtr::from(numbers.as_mut_ptr()), numbers.len());
    // SAFETY: the vector is not touched until the launch has ended.
    let launch = unsafe {
        svm.launch(Grid::new(n), move |lane| {
            let at = p.add(lane.id());
            let x = lane.load(at)?;
            lane.store(at, x * 3)
        })
    };
    launch.unwrap().wait().unwrap();
    assert!(svm.stats().to_device.bytes > 0, "{:?}", svm.stats());
    assert!(numbers.iter().enumerate().all(|(i, x)| *x == 3 * i as u64));
    drop(adopted);
    drop(numbers);
    assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
}

/// Freed while it is shared, with pages on the device: they are given back, and the address is new.
#[test]
fn an_adopted_mapping_may_be_unmapped_at_any_time() {
    let svm = engine(ByteSize::mib(8));
    if !can_adopt(&svm) {
        return;
    }
    for round in 0..20u8 {
        let map = Map::new(4 << 20, round % 2 == 0);
        let adopted = svm.adopt(map.at, ByteSize::from_usize(map.len)).unwrap();
        let (p, n) = (SvmPtr::from(map.at), map.len);
        // SAFETY: the mapping is not touched until the launch has ended.
        let launch = unsafe {
            svm.launch(Grid::new(n / 4096), move |lane| {
                lane.store(p.add(lane.id() * 4096), round)
            })
        };
        launch.unwrap().wait().unwrap();
        assert!(svm.stats().vram_used_bytes > 0);
        // SAFETY: in our own mapping.
        let found = unsafe { map.at.wrapping_add(4096).read_volatile() };
        assert_eq!(found, round);
        drop(map);
        drop(adopted);
    }
    let stats = svm.shutdown().unwrap();
    assert_eq!(
        (
            stats.vram_used_bytes,
            stats.ranges_live,
            stats.pages_on_devices
        ),
        (0, 0, 0)
    );
}

#[test]
fn the_stack_and_small_boxes_are_read_and_written_in_place() {
    let svm = engine(ByteSize::mib(2));
    let on_stack = [3u32, 5, 7];
    let boxed = Box::new(11u64);
    let mut result = 0u64;
    let (a, b) = (
        SvmPtr::from(on_stack.as_ptr()),
        SvmPtr::from(&raw const *boxed),
    );
    let out = SvmPtr::from(&raw mut result);
    // SAFETY: all three outlive the launch, and `result` is not touched until it has ended.
    let launch = unsafe {
        svm.launch(Grid::new(3), move |lane| {
            let x = u64::from(lane.load(a.add(lane.id()))?);
            let y = lane.load(b)?;
            lane.atomic_add(out, x * y)?;
            Ok(())
        })
    };
    launch.unwrap().wait().unwrap();
    // SAFETY: the launch has ended.
    assert_eq!(unsafe { (&raw const result).read_volatile() }, 15 * 11);
    assert_eq!(svm.stats().to_device.bytes, 0, "nothing of it moves");
}

#[test]
fn what_was_never_touched_is_zero_on_the_device() {
    let svm = engine(ByteSize::mib(4));
    let memory = svm.alloc_slice::<u64>(1 << 20).unwrap();
    let mut wrong = svm.alloc_slice::<u64>(1).unwrap();
    let (p, out, n) = (memory.device_ptr(), wrong.device_ptr(), memory.len());
    // SAFETY: nothing of it is touched until the launch has ended.
    let launch = unsafe {
        svm.launch(Grid::new(n), move |lane| {
            if lane.load(p.add(lane.id()))? != 0 {
                lane.atomic_add(out, 1u64)?;
            }
            Ok(())
        })
    };
    launch.unwrap().wait().unwrap();
    wrong[0] += 0;
    assert_eq!(wrong[0], 0);
}

#[test]
fn two_devices_take_turns() {
    use gpusvm::{Resident, SoftGpu, Svm};
    let gpu = || SoftGpu::with_vram(ByteSize::mib(2)).unwrap();
    let svm = Svm::builder().device(gpu()).device(gpu()).build().unwrap();
    let numbers = svm.alloc_slice::<u64>(1 << 19).unwrap();
    let (p, n) = (numbers.device_ptr(), numbers.len());
    for round in 0..6 {
        // SAFETY: not touched by the CPU until the launch has ended.
        let launch = unsafe {
            svm.launch_resident(round % 2, Grid::new(n / 64), Resident::new(), move |lane| {
                for i in lane.id() * 64..lane.id() * 64 + 64 {
                    let x = lane.load(p.add(i))?;
                    lane.store(p.add(i), x + 1)?;
                }
                Ok(())
            })
        };
        launch.unwrap().wait().unwrap();
    }
    assert!(numbers.iter().all(|x| *x == 6));
    drop(numbers);
    assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
}
