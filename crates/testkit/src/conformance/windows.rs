//! What happens while a copy is under way: the copy stands at a gate meanwhile.
//!
//! ```text
//!   migrates   collect ---- copy: at the gate ............ copy, commit
//!   acts                       unmap, drop, remap ...
//!   opens                           a while later: the gate
//! ```

use super::{Bench, Kit, Setup};
use crate::world::{Feature, Prot, World};
use gpusvm_sync::Arc;
use gpusvm_types::{PageCount, Span};

type Act<W> = fn(&Bench<W>, Span);

/// What is acted upon: some pages amid others of one block.
const PAGES: u64 = 64;

fn middle(span: Span) -> Span {
    Span::of_pages(
        span.first_page() + PageCount::new(PAGES / 4),
        PageCount::new(PAGES / 2),
    )
}

/// Does something to memory while it is being copied to the device.
fn during_copy<W: World>(kit: &Kit, needs: &'static [Feature], act: Act<W>) {
    kit.race::<W>(&Setup::default(), |bench| {
        if bench.mirror().gpu.hook().is_none() {
            println!("skipped: this device has no gate for copies");
            return;
        }
        if bench.can(needs) {
            let span = bench.memory(PAGES);
            bench.fill(span, 1);
            acts_during_copy(bench, span, act);
        }
    });
}

fn acts_during_copy<W: World>(bench: &Arc<Bench<W>>, span: Span, act: Act<W>) {
    let hold = |bench: &Bench<W>| {
        let gpu = &bench.mirror().gpu;
        gpu.hook().map(crate::dmirror::CopyHook::hold);
    };
    hold(bench);
    let migrates = move |bench: &Arc<Bench<W>>| {
        // What comes of it depends on what is done meanwhile.
        let _ = bench.mirror().migrate_to_dev(span);
    };
    let acts = move |bench: &Arc<Bench<W>>| {
        wait_for_copy(bench);
        act(bench, span);
    };
    let opens = move |bench: &Arc<Bench<W>>| {
        wait_for_copy(bench);
        bench.world().pause();
        let gpu = &bench.mirror().gpu;
        gpu.hook().map(crate::dmirror::CopyHook::release);
    };
    bench.run(vec![Box::new(migrates), Box::new(acts), Box::new(opens)]);
    bench.check();
}

fn wait_for_copy<W: World>(bench: &Bench<W>) {
    let hook = bench.mirror().gpu.hook().expect("asked before");
    assert!(hook.wait_for_copy(), "a copy is under way");
}

/// The middle is unmapped: it is gone, and the rest is right wherever it is.
pub fn unmap_during_copy<W: World>(kit: &Kit) {
    during_copy::<W>(kit, &[Feature::Unmap], |bench, span| {
        bench.world().unmap(middle(span));
        let read = bench.world().read(middle(span).start());
        assert!(read.is_err(), "{read:?}");
        for left in span.without(middle(span)).into_iter().flatten() {
            bench.expect(left, 1);
        }
    });
}

/// The middle gets another address: it is right there, and so is the rest.
pub fn remap_during_copy<W: World>(kit: &Kit) {
    during_copy::<W>(kit, &[Feature::Remap], |bench, span| {
        let to = bench.remap(middle(span), false);
        bench.expect_moved(to, middle(span), 1);
        for left in span.without(middle(span)).into_iter().flatten() {
            bench.expect(left, 1);
        }
        bench.device_expect_moved(0, to, middle(span), 1);
    });
}

/// The contents of the middle are given up: zeroes there, and what is written later stays.
pub fn dontneed_during_copy<W: World>(kit: &Kit) {
    during_copy::<W>(kit, &[Feature::DropContents], |bench, span| {
        bench.world().drop_contents(middle(span));
        bench.expect_zero(middle(span));
        bench.fill(middle(span), 2);
        bench.expect(middle(span), 2);
        for left in span.without(middle(span)).into_iter().flatten() {
            bench.expect(left, 1);
        }
        bench.device_expect(0, middle(span), 2);
    });
}

/// It becomes read-only: no device writes it from then on, whatever was under way.
pub fn protect_during_migration<W: World>(kit: &Kit) {
    during_copy::<W>(kit, &[], |bench, span| {
        bench.world().protect(span, Prot::Read);
        let written = bench.device_fill(0, span, 2);
        assert!(written.is_err(), "it is read-only");
        bench.expect(span, 1);
        bench.device_expect(0, span, 1);
    });
}
