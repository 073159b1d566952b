//! What is never migrated: files and shared memory, which devices reach in place.

use super::{Kit, Setup};
use crate::mirror::Snap;
use crate::world::{Feature, Kind, Prot, World};
use gpusvm_types::PageCount;

/// Enough to have several chunks.
const PAGES: u64 = 1024;

/// A device reads a file.
pub fn file_read<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = bench.map(PAGES, Prot::ReadWrite, Kind::FileShared);
        bench.fill(span, 1);
        bench.world().protect(span, Prot::Read);
        bench.device_expect(0, span, 1);
        assert_eq!(bench.mirror().on_device(span), PageCount::ZERO);
    });
}

/// A device writes a file: the file has it.
pub fn file_write<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = bench.map(PAGES, Prot::ReadWrite, Kind::FileShared);
        assert_eq!(bench.device_fill(0, span, 1), Ok(()));
        bench.expect(span, 1);
        assert_eq!(bench.mirror().on_device(span), PageCount::ZERO);
        if bench.can(&[Feature::FileContents]) {
            let (at, world) = (span.start(), bench.world());
            assert_eq!(world.behind(at), world.read(at).ok());
        }
    });
}

/// Pages of a private file do not migrate: refused, and nothing is lost. What a device writes stays in
/// the process.
pub fn migrate_file_private<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = bench.map(PAGES, Prot::ReadWrite, Kind::FilePrivate);
        bench.fill(span, 1);
        let moved = bench.mirror().migrate_to_dev(span);
        assert!(moved.is_err(), "{moved:?}");
        bench.device_expect(0, span, 1);
        assert_eq!(bench.device_fill(0, span, 2), Ok(()));
        bench.expect(span, 2);
        if bench.can(&[Feature::FileContents]) {
            assert_eq!(bench.world().behind(span.start()), Some(0));
        }
    });
}

/// Shared memory does not migrate: refused, and reached in place.
pub fn migrate_shared<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = bench.map(PAGES, Prot::ReadWrite, Kind::Shared);
        bench.fill(span, 1);
        let moved = bench.mirror().migrate_to_dev(span);
        assert!(moved.is_err(), "{moved:?}");
        let writable = true;
        let all_in_ram = bench.mirror().snapshot(span);
        let mut all_in_ram = all_in_ram.iter();
        assert!(all_in_ram.all(|snap| *snap == Snap::System { writable }));
        bench.device_expect(0, span, 1);
        bench.expect(span, 1);
    });
}
