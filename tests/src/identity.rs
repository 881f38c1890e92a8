//! Which number stands for which object: a number never changes while its object lives, and never
//! stands for two. What is one object is told by the plain folder, by inode number and birth time.

use std::collections::{BTreeMap, BTreeSet};

use crate::random::Held;
use crate::tree::Tree;

/// Numbers from here on are given for as long as a mount lives, where two objects would have one
/// (docs/format.md, section 4).
const FOR_ONE_MOUNT: u64 = 1 << 63;

/// The numbers that were seen so far: of the plain object, and on the mount.
#[derive(Debug, Default)]
pub struct Numbers {
    known: BTreeMap<(u64, (i64, u32)), u64>,
}

impl Numbers {
    /// Forgets everything: the numbers may change here.
    pub fn forget(&mut self) {
        self.known.clear();
    }

    /// Told of a new mount.
    pub fn mounted_anew(&mut self) {
        self.known.retain(|_, number| *number < FOR_ONE_MOUNT);
    }

    /// Compares the numbers of the same objects on both sides, those that are held open too.
    pub fn check(
        &mut self,
        (mounted, plain): (&Tree, &Tree),
        (held, plainly): (&[Option<Held>], &[Option<Held>]),
    ) -> Result<(), String> {
        let names = mounted.iter().filter_map(|(path, entry)| {
            let other = plain.get(path)?;
            let what = format!("/{}", path.escape_ascii());
            Some((what, (other.ino, other.born), entry.ino))
        });
        let held = held.iter().zip(plainly).enumerate();
        let held = held.filter_map(|(slot, (here, there))| {
            let (here, there) = ((*here)?, (*there)?);
            Some((format!("held in {slot}"), (there.ino, there.born), here.ino))
        });
        let mut objects = BTreeMap::new();
        let mut wrong = Vec::new();
        let mut seen = BTreeSet::new();
        for (what, object, number) in names.chain(held) {
            let before = *self.known.entry(object).or_insert(number);
            if before != number {
                wrong.push(format!("{what}: was {before}, is {number}"));
            }
            let other = objects.entry(number).or_insert((object, what.clone()));
            if other.0 != object {
                wrong.push(format!("{number} stands for {what} and {}", other.1));
            }
            seen.insert(object);
        }
        // What is gone may come again as another object.
        self.known.retain(|object, _| seen.contains(object));
        if wrong.is_empty() {
            return Ok(());
        }
        wrong.truncate(12);
        Err(format!("numbers: {}", wrong.join("\n    ")))
    }
}
