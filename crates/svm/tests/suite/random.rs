//! Any order of anything: after each step everything is as it must be, and at the end every byte is.

use crate::lab::{Lab, READ, WRITE, everywhere, part};
use gpusvm_mm::{AddressSpace, Reason};
use gpusvm_mm_sim::{Backing, Options, Prot};
use gpusvm_svm::{FaultCtx, GetPagesError};
use gpusvm_types::{ByteSize, Span, VirtAddr};
use std::collections::BTreeMap;

const SEEDS: u64 = 200;
const STEPS: u64 = 40;
/// How much of a block is played with.
pub(crate) const PLAYGROUND: u64 = 96;

/// One pass over a fault, as a driver makes it. Whether the device can go on.
pub(crate) fn fault(lab: &Lab, at: VirtAddr, ctx: &FaultCtx, to: Option<usize>) -> bool {
    lab.svm.collect_garbage();
    let Ok(range) = lab.svm.range_find_or_insert(at, ctx, everywhere()) else {
        return false;
    };
    let serving = range.serve();
    if range.is_gone() || lab.svm.range_arm(&range, &serving) != Ok(true) {
        return false;
    }
    if let Some(device) = to.filter(|_| range.can_migrate()) {
        // Full, or gone meanwhile: get_pages sees where the pages are.
        let _ = lab.devices[device].migrate(range.span());
    }
    match lab.get_pages(&range, ctx) {
        Ok(prepared) => lab.commit(&range, prepared),
        Err(GetPagesError::MixedPagemaps { .. }) => {
            let _ = lab.svm.range_evict(&range);
            false
        }
        Err(_) => false,
    }
}

/// What the program believes its memory to be: nothing for what is not mapped.
#[derive(Debug)]
struct Game {
    lab: std::sync::Arc<Lab>,
    area: Span,
    words: BTreeMap<VirtAddr, u64>,
    step: u64,
}

impl Game {
    fn new(seed: u64) -> Self {
        let options = Options {
            seed,
            ..Options::default()
        };
        // Devices 0 and 1 reach each other, 2 is a stranger.
        let lab = Lab::with(options, &[0, 0, 1], ByteSize::kib(128));
        let area = part(lab.block(), 0, PLAYGROUND);
        let word = |at: VirtAddr| (at, at.get());
        let words = area.pages().map(|page| word(page.start())).collect();
        Self {
            lab,
            area,
            words,
            step: 0,
        }
    }

    fn random(&self, end: u64) -> u64 {
        self.lab.sim.random(end)
    }

    fn at(&self) -> VirtAddr {
        part(self.area, self.random(PLAYGROUND), 1).start()
    }

    /// A few pages.
    fn span(&self) -> Span {
        let first = self.random(PLAYGROUND);
        let count = 1 + self.random(24);
        part(self.area, first, count.min(PLAYGROUND - first))
    }

    /// A page, another of the same or of a later one, and so on: what is mapped is seldom.
    fn play(&mut self) {
        self.step += 1;
        match self.random(16) {
            0..=5 => self.fault(),
            6 => self.unmap(),
            7 => self.map(),
            8 => self.drop_contents(),
            9 | 10 => self.write(),
            11 => drop(self.lab.svm.collect_garbage()),
            12 => self.with_range(|lab, at| {
                if let Some(range) = lab.svm.range_find(at) {
                    lab.svm.range_remove(&range);
                }
            }),
            13 => self.with_range(|lab, at| {
                if let Some(range) = lab.svm.range_find(at) {
                    let _ = lab.svm.range_evict(&range);
                }
            }),
            14 => {
                let _ = self.lab.sim.bring_home(self.span());
            }
            _ => self.lab.invalidate(self.span(), Reason::Protect),
        }
    }

    fn fault(&self) {
        let ctx = [WRITE, READ][usize::from(self.random(2) == 0)];
        let to = match self.random(5) {
            0 => None,
            1 | 2 => Some(0),
            3 => Some(1),
            _ => Some(2),
        };
        fault(&self.lab, self.at(), &ctx, to);
    }

    fn with_range(&self, act: impl FnOnce(&Lab, VirtAddr)) {
        act(&self.lab, self.at());
    }

    fn unmap(&mut self) {
        let span = self.span();
        self.lab.sim.munmap(span);
        self.words.retain(|at, _| !span.contains(*at));
    }

    fn map(&mut self) {
        let span = self.span();
        let backing = match self.random(4) {
            0 => Backing::Private,
            _ => Backing::Mirrored,
        };
        self.lab.sim.mmap_fixed(span, Prot::ReadWrite, backing);
        let words = span.pages().map(|page| (page.start(), 0));
        self.words.extend(words);
    }

    fn drop_contents(&mut self) {
        let span = self.span();
        self.lab.sim.madvise_dontneed(span);
        for (_, word) in self.words.iter_mut().filter(|(at, _)| span.contains(**at)) {
            *word = 0;
        }
    }

    fn write(&mut self) {
        let at = self.at();
        let value = self.step;
        let written = self.lab.sim.write_u64(at, value).is_ok();
        let word = self.words.get_mut(&at);
        assert_eq!(written, word.is_some(), "{at}");
        word.into_iter().for_each(|word| *word = value);
    }

    fn end(&self) {
        self.lab.svm.collect_garbage();
        for (at, word) in &self.words {
            assert_eq!(self.lab.sim.read_u64(*at), Ok(*word), "{at}");
        }
        self.lab.assert_ends();
        for device in &self.lab.devices {
            assert_eq!(device.reached(), 0, "maps and unmaps");
            assert_eq!(device.free_pages(), 1024);
        }
    }
}

/// No range outlives its mapping, except as garbage.
#[track_caller]
pub(crate) fn assert_covered(lab: &Lab) {
    for span in lab.spans() {
        let range = lab.svm.range_find(span.start()).unwrap();
        let vma = lab.sim.find_vma(span.start()).unwrap();
        let is_covered = vma.is_some_and(|vma| vma.span.covers(span));
        let seed = lab.sim.seed();
        assert!(
            is_covered || range.is_unmapped(),
            "seed {seed}: {span} is neither mapped nor garbage"
        );
    }
}

#[test]
fn ranges_never_overlap_whatever_happens() {
    for seed in 0..SEEDS {
        let mut game = Game::new(seed);
        for _ in 0..STEPS {
            game.play();
            game.lab.assert_sound();
            assert_covered(&game.lab);
        }
        game.end();
    }
}
