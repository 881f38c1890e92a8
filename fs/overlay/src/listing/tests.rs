//! Tests of directories that are read in parts while names are created and removed.

use std::collections::BTreeSet;
use std::path::Path;

use proptest::prelude::*;

use super::END;
use super::cookies::{Cookies, Hash, Key};
use crate::{Overlay, OverlayOptions};
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::Layer;

fn over(path: &Path) -> Overlay {
    let layer = Layer::open(path, XattrSpace::detect()).unwrap();
    Overlay::new(None, vec![layer], OverlayOptions::default()).unwrap()
}

/// A hash with frequent collisions.
fn weak(_: &Key, name: &[u8]) -> u64 {
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

/// A step of the reader, or of another process.
#[derive(Clone, Debug)]
enum ReaderStep {
    Read(usize),
    Create(u8),
    Remove(u8),
    /// The listing is evicted from the cache.
    Evict,
}

fn steps() -> impl Strategy<Value = Vec<ReaderStep>> {
    let step = prop_oneof![
        3 => (1_usize..6).prop_map(ReaderStep::Read),
        3 => any::<u8>().prop_map(ReaderStep::Create),
        3 => any::<u8>().prop_map(ReaderStep::Remove),
        2 => Just(ReaderStep::Evict),
    ];
    proptest::collection::vec(step, 1..80)
}

fn check(hash: Hash, before: &BTreeSet<u8>, steps: &[ReaderStep]) {
    let dir = tempfile::tempdir().unwrap();
    let path = |number: &u8| dir.path().join(format!("f{number}"));
    for number in before {
        std::fs::write(path(number), b"").unwrap();
    }
    let mut overlay = over(dir.path());
    overlay.cookies = Cookies::with_hash(hash);
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
            ReaderStep::Read(most) => part(&mut seen, &mut at, *most),
            ReaderStep::Create(number) => std::fs::write(path(number), b"").unwrap(),
            ReaderStep::Remove(number) => {
                lasting.remove(number);
                match std::fs::remove_file(path(number)) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{error}"),
                    _ => {}
                }
            }
            ReaderStep::Evict => overlay.listings.remove(1),
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

    /// A name that exists during the whole listing is returned exactly once, whatever is created and removed meanwhile.
    #[test]
    fn lasting_names_are_listed_exactly_once(before in proptest::collection::btree_set(any::<u8>(), 0..60), steps in steps()) {
        let good = |_: &Key, name: &[u8]| name.iter().fold(7_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3) >> 1);
        check(good, &before, &steps);
    }

    /// Positions remain valid with a hash that has collisions in every listing.
    #[test]
    fn colliding_names_are_listed_exactly_once(before in proptest::collection::btree_set(any::<u8>(), 0..60), steps in steps()) {
        check(weak, &before, &steps);
    }
}

#[test]
fn cookies_are_distinct_and_fit_into_32_bits() {
    let dir = tempfile::tempdir().unwrap();
    for number in 0..500 {
        std::fs::write(dir.path().join(format!("f{number}")), b"").unwrap();
    }
    for hash in [None, Some(weak as Hash), Some(|_: &Key, _: &[u8]| 5)] {
        let mut overlay = over(dir.path());
        let good = hash.is_none();
        if let Some(hash) = hash {
            overlay.cookies = Cookies::with_hash(hash);
        }
        let listing = overlay.begin().listing(overlay.root(), 0).unwrap();
        let positions: Vec<u64> = listing.entries_from(0).map(|(next, _)| next).collect();
        let distinct: BTreeSet<u64> = positions.iter().copied().collect();
        assert_eq!((positions.len(), distinct.len()), (502, 502));
        assert_eq!(positions.last(), Some(&END));
        if good {
            // The probability of a collision among 500 names is about 1 in 10,000.
            let large = positions.iter().filter(|at| **at > END).count();
            assert!(large <= 2, "{large}");
        }
    }
}

/// The cache is bounded, but a directory that exceeds the bound is not read again for each request.
#[test]
fn cached_listings_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), b"").unwrap();
    let overlay = over(dir.path());
    let one = overlay.begin().listing(overlay.root(), 0).unwrap();
    for ino in 0..200_000 {
        overlay.listings.put(ino, &one);
    }
    let cache = overlay.listings.0.lock();
    assert_eq!(cache.names, cache.listings.len() * 3);
    assert!(cache.names <= super::cache::MAX_NAMES);
    drop(cache);
    let part = overlay.begin().listing(overlay.root(), 1).unwrap();
    let again = overlay.begin().listing(overlay.root(), 1).unwrap();
    assert!(std::sync::Arc::ptr_eq(&part, &again));
}
