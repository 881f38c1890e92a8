//! Checks the identity of objects by inode number: the number of an object never changes while it exists, and two
//! objects never share one. The plain directory defines which objects are the same, by inode number and birth time.

use std::collections::{BTreeMap, BTreeSet};

use crate::random::Held;
use crate::tree::Tree;

/// Lower bound of the numbers that are valid for one mount only, used if two objects would otherwise share a number
/// (docs/format.md, section 4).
const TEMPORARY: u64 = 1 << 63;

/// The numbers seen so far: for each object of the plain directory, its number on the mount.
#[derive(Debug, Default)]
pub struct Numbers {
    known: BTreeMap<(u64, (i64, u32)), u64>,
}

impl Numbers {
    /// Discards all numbers, if they may change at this point.
    pub fn forget(&mut self) {
        self.known.clear();
    }

    /// Discards the numbers that are not valid in a new mount.
    pub fn mounted_anew(&mut self) {
        self.known.retain(|_, number| *number < TEMPORARY);
    }

    /// Compares the numbers of the same objects on both sides, including objects that are held open.
    pub fn check(
        &mut self,
        (mounted, plain): (&Tree, &Tree),
        (held, plainly): (&[Option<Held>], &[Option<Held>]),
    ) -> Result<(), String> {
        let names = mounted.iter().filter_map(|(path, entry)| {
            let other = plain.get(path)?;
            let label = format!("/{}", path.escape_ascii());
            Some((label, (other.ino, other.born), entry.ino))
        });
        let held = held.iter().zip(plainly).enumerate();
        let held = held.filter_map(|(slot, (here, there))| {
            let (here, there) = ((*here)?, (*there)?);
            Some((format!("held in {slot}"), (there.ino, there.born), here.ino))
        });
        let mut objects = BTreeMap::new();
        let mut wrong = Vec::new();
        let mut seen = BTreeSet::new();
        for (label, object, number) in names.chain(held) {
            let before = *self.known.entry(object).or_insert(number);
            if before != number {
                wrong.push(format!("{label}: was {before}, is {number}"));
            }
            let other = objects.entry(number).or_insert((object, label.clone()));
            if other.0 != object {
                wrong.push(format!("{number} is the number of {label} and {}", other.1));
            }
            seen.insert(object);
        }
        // The number of a removed object may be reused for another one.
        self.known.retain(|object, _| seen.contains(object));
        if wrong.is_empty() {
            return Ok(());
        }
        wrong.truncate(12);
        Err(format!("numbers: {}", wrong.join("\n    ")))
    }
}
