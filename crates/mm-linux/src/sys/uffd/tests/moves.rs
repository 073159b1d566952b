//! Pages out and back, and the pages that refuse.

use super::{BYTES, MISSING, complete, stopped};
use crate::sys::map::{self, Request};
use crate::sys::pagemap::{Categories, PageMap, Region};
use crate::sys::testing::{self, Ended, Forks, Pair, pages};
use crate::sys::uffd::{CopyFlags, Features, MoveFlags, RegisterModes};
use gpusvm_types::{ByteSize, Span, VirtAddr};
use rustix::io::Errno;

#[test]
fn move_pages_out_and_back() {
    let Some(pair) = Pair::of_pages(pages(16)) else {
        return;
    };
    pair.fill();
    assert_eq!(
        pair.out(ByteSize::ZERO, pages(16), false),
        complete(pages(16))
    );
    assert!(Pair::is_marked(&pair.staging));
    assert_eq!(
        pair.back(ByteSize::ZERO, pages(16), false),
        complete(pages(16))
    );
    assert!(Pair::is_marked(&pair.app));
}

#[test]
fn move_stops_at_a_hole_unless_allowed() {
    let Some(pair) = Pair::of_pages(pages(8)) else {
        return;
    };
    pair.fill();
    let hole = Span::from_len(pair.app.span().start() + pages(3), pages(2)).unwrap();
    // SAFETY: ours.
    unsafe { map::discard(hole) }.unwrap();
    assert_eq!(
        pair.out(ByteSize::ZERO, pages(8), false),
        stopped(pages(3), Errno::AGAIN)
    );
    assert_eq!(
        pair.out(pages(3), pages(5), false),
        stopped(ByteSize::ZERO, Errno::NOENT)
    );
    assert_eq!(pair.out(pages(3), pages(5), true), complete(pages(5)));
    assert_eq!(
        pair.back(ByteSize::ZERO, pages(8), true),
        complete(pages(8))
    );
    assert_eq!(pair.app.load(pages(7)), testing::mark(7));
}

#[test]
fn move_onto_a_page_is_refused_where_it_is() {
    let Some(pair) = Pair::of_pages(pages(8)) else {
        return;
    };
    pair.fill();
    assert!(pair.out(pages(2), pages(1), false).is_complete());
    // The page at 2 is in staging; one more comes to its place in the application.
    let page = Span::from_len(pair.app.span().start() + pages(2), pages(1)).unwrap();
    assert!(pair.a.zeropage(page, false).is_complete());
    assert_eq!(
        pair.out(ByteSize::ZERO, pages(8), false),
        stopped(pages(2), Errno::AGAIN)
    );
    assert_eq!(
        pair.out(pages(2), pages(6), false),
        stopped(ByteSize::ZERO, Errno::EXIST)
    );
    assert_eq!(pair.staging.load(pages(2)), testing::mark(2));
    assert_eq!(pair.app.load(pages(3)), testing::mark(3));
}

#[test]
fn zero_pages_move() {
    let Some(pair) = Pair::of_pages(pages(4)) else {
        return;
    };
    assert_eq!(pair.a.zeropage(pair.app.span(), false), complete(pages(4)));
    assert_eq!(
        pair.out(ByteSize::ZERO, pages(4), false),
        complete(pages(4))
    );
    assert_eq!(pair.staging.load(pages(1)), 0);
    assert_eq!(
        pair.back(ByteSize::ZERO, pages(4), false),
        complete(pages(4))
    );
    // The zero page that a read brings is the same.
    pair.a.unregister(pair.app.span()).unwrap();
    // SAFETY: ours.
    unsafe { map::discard(pair.app.span()) }.unwrap();
    assert_eq!(pair.app.load(pages(1)), 0);
    assert_eq!(pair.out(pages(1), pages(1), false), complete(pages(1)));
}

/// A marker, of poison or of write protection, is in the way of MOVE and goes with DONTNEED.
#[test]
fn markers_are_in_the_way_of_move() {
    let wanted = Features::POISON | Features::WP | Features::WP_UNPOPULATED;
    let (Some(uffd), Some(pair)) = (testing::uffd(wanted), Pair::of_pages(pages(1))) else {
        return;
    };
    pair.fill();
    let other = Request::new(pages(2))
        .never_huge()
        .dont_fork()
        .map()
        .unwrap();
    let modes = RegisterModes {
        missing: true,
        wp: true,
        minor: false,
    };
    // SAFETY: nobody touches it.
    unsafe { uffd.register(other.span(), modes) }.unwrap();
    let [poisoned, protected] = [0, 1].map(|n| {
        let start = other.span().start() + pages(n);
        Span::from_len(start, pages(1)).unwrap()
    });
    assert!(uffd.poison(poisoned, false).is_complete());
    uffd.write_protect(protected, true, false).unwrap();
    let pagemap = PageMap::open().unwrap();
    let mut out = [Region::EMPTY; 4];
    let found = pagemap.scan(other.span(), &mut out).unwrap();
    assert!(found.regions > 0 && out[0].categories.contains(Categories::SWAPPED));
    for span in [poisoned, protected] {
        let home = pair.app.span().start();
        // SAFETY: ours.
        let moved =
            || unsafe { uffd.move_pages(span.start(), home, pages(1), MoveFlags::default()) };
        assert_eq!(moved(), stopped(ByteSize::ZERO, Errno::EXIST), "{span}");
        // SAFETY: ours.
        unsafe { map::discard(span) }.unwrap();
        assert_eq!(moved(), complete(pages(1)), "{span}");
        // SAFETY: ours.
        let back = unsafe {
            pair.a
                .move_pages(home, span.start(), pages(1), MoveFlags::default())
        };
        assert_eq!(back, complete(pages(1)));
    }
}

#[test]
fn move_refuses_read_only_and_shared_memory() {
    use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous};
    let Some(pair) = Pair::of_pages(pages(4)) else {
        return;
    };
    pair.fill();
    let invalid = stopped(ByteSize::ZERO, Errno::INVAL);
    // SAFETY: nobody writes there.
    unsafe { map::protect(pair.app.span(), MprotectFlags::READ) }.unwrap();
    assert_eq!(
        pair.out(ByteSize::ZERO, pages(1), false),
        invalid,
        "source read-only"
    );
    // SAFETY: as above.
    unsafe { map::protect(pair.staging.span(), MprotectFlags::READ) }.unwrap();
    assert_eq!(
        pair.out(ByteSize::ZERO, pages(1), false),
        invalid,
        "both read-only"
    );
    // SAFETY: as above.
    let copied = unsafe {
        let src = VirtAddr::from(&raw const BYTES);
        pair.b.copy(
            pair.staging.span().start(),
            src,
            pages(1),
            CopyFlags::default(),
        )
    };
    assert_eq!(copied, complete(pages(1)), "COPY fills a read-only mapping");
    let access = MprotectFlags::READ | MprotectFlags::WRITE;
    // SAFETY: as above.
    unsafe { map::protect(pair.app.span(), access) }.unwrap();
    assert_eq!(
        pair.out(pages(1), pages(1), false),
        invalid,
        "destination read-only"
    );

    let len = pages(4).as_usize();
    let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    // SAFETY: no address is asked for.
    let shared = unsafe { mmap_anonymous(core::ptr::null_mut(), len, access, flags) }.unwrap();
    let dst = VirtAddr::from(shared);
    let span = Span::from_len(dst, pages(4)).unwrap();
    // SAFETY: nobody touches it.
    unsafe { pair.b.register(span, MISSING) }.unwrap();
    // SAFETY: nobody relies on the source.
    let to = unsafe {
        pair.b
            .move_pages(dst, pair.app.span().start(), pages(1), MoveFlags::default())
    };
    // SAFETY: as above.
    let from = unsafe {
        pair.a
            .move_pages(pair.app.span().start(), dst, pages(1), MoveFlags::default())
    };
    // SAFETY: mapped above.
    unsafe { rustix::mm::munmap(shared, len) }.unwrap();
    assert_eq!((to, from), (invalid, invalid), "shared");
}

/// Story: a page shared with a child cannot be moved, not even when the child is gone; what makes
/// it ours again is a write, and `populate_write` is one that changes nothing.
#[test]
fn a_page_shared_by_fork_moves_after_populate_write() {
    let forks = Forks::lock();
    let request = Request::new(pages(4)).aligned().never_huge();
    let Some(pair) = Pair::new(request, request.dont_fork()) else {
        return;
    };
    pair.fill();
    let mut while_alive = None;
    let (mut ready, mut go) = ([0; 2], [0; 2]);
    for pipe in [&mut ready, &mut go] {
        // SAFETY: two descriptors go where there is room for two.
        assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    }
    std::thread::scope(|scope| {
        let parent = scope.spawn(|| {
            wait_byte(ready[0]);
            while_alive = Some(pair.out(ByteSize::ZERO, pages(1), false));
            send_byte(go[1]);
        });
        let ended = forks.child(|| {
            send_byte(ready[1]);
            wait_byte(go[0]);
            0
        });
        assert_eq!(ended, Ended::Exit(0));
        parent.join().unwrap();
    });
    let busy = stopped(ByteSize::ZERO, Errno::BUSY);
    assert_eq!(while_alive, Some(busy), "the child lives");
    assert_eq!(
        pair.out(ByteSize::ZERO, pages(1), false),
        busy,
        "the child is gone"
    );
    map::populate_write(pair.app.span()).unwrap();
    assert_eq!(
        pair.out(ByteSize::ZERO, pages(4), false),
        complete(pages(4))
    );
    assert!(Pair::is_marked(&pair.staging));
    for fd in ready.into_iter().chain(go) {
        // SAFETY: opened above.
        unsafe { libc::close(fd) };
    }
}

fn send_byte(fd: i32) {
    // SAFETY: one byte of our own.
    unsafe { libc::write(fd, [1u8].as_ptr().cast(), 1) };
}

fn wait_byte(fd: i32) {
    let mut byte = [0u8];
    // SAFETY: one byte of our own.
    unsafe { libc::read(fd, byte.as_mut_ptr().cast(), 1) };
}
