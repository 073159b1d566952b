//! The map of VMAs: drawings, and a model.

use super::*;
use gpusvm_types::{PAGE_SIZE, PageCount};

/// Drawings are of these pages.
const FIRST: u64 = 0x1000;

fn span(from: u64, to: u64) -> Span {
    let first = VirtAddr::new(FIRST << 12).page() + PageCount::new(from);
    Span::of_pages(first, PageCount::new(to - from))
}

fn object(name: char) -> Vma<char> {
    Vma::Object(Binding {
        object: name,
        offset: ByteSize::ZERO,
        writable: true,
    })
}

fn vma(name: char) -> Option<Vma<char>> {
    match name {
        '.' => None,
        'm' => Some(Vma::Mirror),
        name => Some(object(name)),
    }
}

/// Holes all over but for what is drawn: `m` is mirror, a letter an object, each run from its begin.
fn drawn(drawing: &str) -> Gpuvas<char> {
    let vmas = Gpuvas::new();
    vmas.replace(everything(), None);
    let mut from = 0;
    let mut rest = drawing;
    while let Some(name) = rest.chars().next() {
        let run = rest.chars().take_while(|next| *next == name).count();
        let to = from + run as u64;
        vmas.replace(span(from, to), vma(name));
        (from, rest) = (to, &rest[run..]);
    }
    vmas
}

/// What is at each of `pages` pages: which page of the object, as a letter in upper case for the first
/// page of a VMA.
fn draw(vmas: &Gpuvas<char>, pages: u64) -> String {
    let letter = |page: u64| {
        let here = span(page, page + 1);
        match vmas.find(here.start()) {
            None => '.',
            Some((whole, Vma::Mirror)) if whole.start() == here.start() => 'M',
            Some((_, Vma::Mirror)) => 'm',
            Some((whole, Vma::Object(of))) if whole.start() == here.start() => {
                of.object.to_ascii_uppercase()
            }
            Some((_, Vma::Object(of))) => of.object,
        }
    };
    (0..pages).map(letter).collect()
}

#[test]
fn what_replaces_what() {
    // Before, what goes where, after.
    let rows = [
        ("mmmmmmmm", 'a', 2, 4, "MmAaMmmm"), // into the middle
        ("mmmmmmmm", 'a', 0, 2, "AaMmmmmm"), // at the front
        ("mmmmmmmm", 'a', 6, 8, "MmmmmmAa"), // at the back
        ("mmmmmmmm", 'a', 0, 8, "Aaaaaaaa"), // all of it
        ("mmmmmmmm", '.', 2, 4, "Mm..Mmmm"), // a hole
        ("mm..mmmm", 'm', 2, 4, "Mmmmmmmm"), // closed again: one mirror
        ("mmaammmm", 'm', 2, 4, "Mmmmmmmm"), // an object gone: one mirror
        ("mmaammmm", 'm', 2, 3, "MmmAMmmm"), // half of it gone
        ("mmaammmm", '.', 1, 5, "M....Mmm"), // object, and mirror on both sides
        ("aaaaaaaa", 'b', 2, 4, "AaBbAaaa"), // an object into another
        ("aaaabbbb", 'c', 2, 6, "AaCcccBb"), // over the border of two
        ("aaaabbbb", 'm', 3, 5, "AaaMmBbb"), // as above
        ("........", 'a', 2, 4, "..Aa...."), // into a hole
        ("........", 'm', 2, 4, "..Mm...."), // as above
        ("m......m", 'm', 1, 7, "Mmmmmmmm"), // two neighbours
        ("a.b.m.c.", '.', 0, 8, "........"), // many at once
        ("a.b.m.c.", 'd', 1, 6, "ADddddC."), // as above
        ("mmmmmmmm", 'm', 2, 4, "Mmmmmmmm"), // nothing new
    ];
    for (before, name, from, to, after) in rows {
        let vmas = drawn(before);
        let replaced = vmas.replace(span(from, to), vma(name));
        assert_eq!(draw(&vmas, 8), after, "{name} at {from}..{to} of {before}");
        // What comes back is what was there, and nothing but that.
        let restored = Gpuvas::new();
        restored.replace(everything(), None);
        for (at, old) in replaced {
            assert!(span(from, to).covers(at));
            restored.replace(at, Some(old));
        }
        let wanted = drawn(before);
        for page in from..to {
            let at = span(page, page + 1).start();
            let is_bound = |vmas: &Gpuvas<char>| vmas.find(at).is_some();
            assert_eq!(is_bound(&restored), is_bound(&wanted), "{before} at {page}");
        }
    }
}

/// Each page says which page of which object it is.
type Model = [Option<(char, u64)>];

fn check(vmas: &Gpuvas<char>, model: &Model) {
    for (page, wanted) in (0..).zip(model) {
        let at = span(page, page + 1).start();
        let found = vmas.find(at).map(|(whole, vma)| match vma {
            Vma::Mirror => ('m', 0),
            Vma::Object(of) => {
                let offset = of.offset + at.offset_from(whole.start());
                (of.object, offset.get() / PAGE_SIZE.get())
            }
        });
        assert_eq!(found, *wanted, "page {page}");
    }
    let all = vmas.inside(everything());
    for pair in all.windows(2) {
        assert!(pair[0].0.end() <= pair[1].0.start(), "they overlap");
        let touch = pair[0].0.end() == pair[1].0.start();
        let mirrors = pair.iter().all(|vma| matches!(vma.1, Vma::Mirror));
        assert!(!(touch && mirrors), "two mirrors that touch");
    }
}

/// Every three replacements of six pages, one after the other.
#[test]
fn every_piece_leads_where_it_led_before() {
    const PAGES: u64 = 6;
    let steps: Vec<(u64, u64, char)> = (0..PAGES)
        .flat_map(|from| (from + 1..=PAGES).map(move |to| (from, to)))
        .flat_map(|(from, to)| ['m', '.', 'a'].map(|name| (from, to, name)))
        .collect();
    let apply = |vmas: &Gpuvas<char>, model: &mut [Option<(char, u64)>], step, object| {
        let (from, to, name): (u64, u64, char) = step;
        let name = if name == 'a' { object } else { name };
        vmas.replace(span(from, to), vma(name));
        for (page, place) in (0..)
            .zip(model)
            .filter(|(page, _)| (from..to).contains(page))
        {
            *place = match name {
                '.' => None,
                'm' => Some(('m', 0)),
                name => Some((name, page - from)),
            };
        }
    };
    for first in &steps {
        for second in &steps {
            for third in &steps {
                let vmas = Gpuvas::new();
                let mut model = [Some(('m', 0)); 6];
                for (step, object) in [first, second, third].into_iter().zip(['a', 'b', 'c']) {
                    apply(&vmas, &mut model, *step, object);
                }
                check(&vmas, &model);
            }
        }
    }
}

#[test]
fn everything_mirrors_the_process_at_first() {
    let vmas = Gpuvas::<char>::new();
    for at in [0, 0x1000, u64::MAX / 2, u64::MAX - 0x1000] {
        let found = vmas.find(VirtAddr::new(at));
        assert!(matches!(found, Some((_, Vma::Mirror))), "{at:#x}");
    }
    assert_eq!(vmas.inside(span(2, 4))[0].0, span(2, 4), "clipped");
    assert_eq!(vmas.clear().len(), 1);
    assert!(vmas.find(VirtAddr::new(0)).is_none(), "nothing is bound");
}
