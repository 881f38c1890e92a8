//! Reading folders in parts, while names come and go.

use std::collections::BTreeSet;
use std::path::Path;

use proptest::prelude::*;

use super::END;
use super::cookies::Cookies;
use crate::{Overlay, OverlayOptions};
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::Layer;

fn over(path: &Path) -> Overlay {
    let layer = Layer::open(path, XattrSpace::detect()).unwrap();
    Overlay::new(None, vec![layer], OverlayOptions::default()).unwrap()
}

/// A hash under which names meet often.
fn weak(name: &[u8]) -> u64 {
    name.iter().map(|byte| u64::from(byte % 3)).sum()
}

fn read(overlay: &Overlay, at: u64, most: usize) -> (Vec<String>, u64) {
    let listing = overlay.begin().listing(overlay.root(), at).unwrap();
    let part: Vec<_> = listing.entries_from(at).take(most).collect();
    let next = part.last().map_or(END, |(next, _)| *next);
    let names = part.into_iter().map(|(_, entry)| entry.name().to_vec());
    let names = names.map(|name| String::from_utf8(name).unwrap());
    (names.collect(), next)
}

/// One step of who reads, or of somebody else.
#[derive(Clone, Debug)]
enum Step {
    Read(usize),
    Make(u8),
    Remove(u8),
    /// The listing that was taken is not kept any longer.
    Lose,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (1_usize..6).prop_map(Step::Read),
        3 => any::<u8>().prop_map(Step::Make),
        3 => any::<u8>().prop_map(Step::Remove),
        2 => Just(Step::Lose),
    ];
    proptest::collection::vec(step, 1..80)
}

fn check(hash: fn(&[u8]) -> u64, before: &BTreeSet<u8>, steps: &[Step]) {
    let dir = tempfile::tempdir().unwrap();
    let path = |number: &u8| dir.path().join(format!("f{number}"));
    for number in before {
        std::fs::write(path(number), b"").unwrap();
    }
    let mut overlay = over(dir.path());
    overlay.cookies = Cookies::with(hash);
    let mut lasting: BTreeSet<u8> = before.clone();
    let (mut seen, mut at) = (Vec::new(), 0);
    let part = |seen: &mut Vec<String>, at: &mut u64, most| {
        let (names, next) = read(&overlay, *at, most);
        seen.extend(names);
        *at = next;
    };
    part(&mut seen, &mut at, 1);
    for step in steps {
        match step {
            Step::Read(most) => part(&mut seen, &mut at, *most),
            Step::Make(number) => std::fs::write(path(number), b"").unwrap(),
            Step::Remove(number) => {
                lasting.remove(number);
                match std::fs::remove_file(path(number)) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{error}"),
                    _ => {}
                }
            }
            Step::Lose => overlay.listings.drop(1),
        }
    }
    while at != END {
        part(&mut seen, &mut at, 3);
    }
    let wanted = [".".to_owned(), "..".to_owned()].into_iter();
    for name in wanted.chain(lasting.iter().map(|number| format!("f{number}"))) {
        let times = seen.iter().filter(|one| **one == name).count();
        assert_eq!(times, 1, "{name} in {seen:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// What stays while a folder is read shows exactly once, whatever comes and goes beside it.
    #[test]
    fn what_stays_shows_exactly_once(before in proptest::collection::btree_set(any::<u8>(), 0..60), steps in steps()) {
        let good = |name: &[u8]| name.iter().fold(7_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3) >> 1);
        check(good, &before, &steps);
    }

    /// Also where the hash is so bad that names meet in every listing.
    #[test]
    fn names_that_meet_show_once_too(before in proptest::collection::btree_set(any::<u8>(), 0..60), steps in steps()) {
        check(weak, &before, &steps);
    }
}

#[test]
fn every_name_has_a_position_of_its_own_and_it_fits_32_bits() {
    let dir = tempfile::tempdir().unwrap();
    for number in 0..500 {
        std::fs::write(dir.path().join(format!("f{number}")), b"").unwrap();
    }
    for hash in [None, Some(weak as fn(&[u8]) -> u64), Some(|_: &[u8]| 5)] {
        let mut overlay = over(dir.path());
        let good = hash.is_none();
        if let Some(hash) = hash {
            overlay.cookies = Cookies::with(hash);
        }
        let listing = overlay.begin().listing(overlay.root(), 0).unwrap();
        let positions: Vec<u64> = listing.entries_from(0).map(|(next, _)| next).collect();
        let distinct: BTreeSet<u64> = positions.iter().copied().collect();
        assert_eq!((positions.len(), distinct.len()), (502, 502));
        assert_eq!(positions.last(), Some(&END));
        if good {
            // Of 500 names two meet once in ten thousand tries.
            let large = positions.iter().filter(|at| **at > END).count();
            assert!(large <= 2, "{large}");
        }
    }
}

/// A folder longer than all that is kept is still not listed anew for every part.
#[test]
fn the_kept_listings_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), b"").unwrap();
    let overlay = over(dir.path());
    let one = overlay.begin().listing(overlay.root(), 0).unwrap();
    for ino in 0..200_000 {
        overlay.listings.put(ino, &one);
    }
    let kept = overlay.listings.0.lock();
    assert_eq!(kept.names, kept.listings.len() * 3);
    assert!(kept.names <= super::cache::MOST_NAMES);
    drop(kept);
    let part = overlay.begin().listing(overlay.root(), 1).unwrap();
    let again = overlay.begin().listing(overlay.root(), 1).unwrap();
    assert!(std::sync::Arc::ptr_eq(&part, &again));
}
