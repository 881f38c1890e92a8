//! The inode numbers of objects whose visible number is not on disk.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use super::identity::Identity;
use super::values::{NumberValue, encode};
use crate::ledger::{Kind, Ledger, Word};

/// The range of substitute numbers: the top bit is set, which no lower file system uses.
const RANGE: u64 = 1 << 63;

/// Whether `ino` is a substitute number.
pub(crate) fn is_substitute(ino: u64) -> bool {
    ino & RANGE != 0
}

/// The recorded numbers: of objects whose own number was taken, of those of a type that cannot have the `cowl.ino`
/// xattr with the number from before their copy-up, and of those that were known when layers left the stack.
#[derive(Debug, Default)]
pub(crate) struct Substitutes {
    numbers: FxHashMap<Identity, u64>,
    /// The objects with a recorded number outside of the range of substitutes, by that number. No other object gets it.
    owners: FxHashMap<u64, Identity>,
    /// The number of substitutes assigned so far.
    assigned: u64,
    /// Whether layers have left the stack, so that new objects can have the numbers of others as their own.
    is_reused: bool,
    ledger: Option<Arc<Ledger>>,
    /// The objects whose numbers are to be removed from the ledger.
    stale: Vec<Identity>,
}

impl Substitutes {
    /// Records all numbers, and every change from now on, in a ledger.
    pub(super) fn attach(&mut self, ledger: &Arc<Ledger>) {
        self.ledger = Some(ledger.clone());
        for (identity, number) in &self.numbers {
            self.note(*identity, Some(*number));
        }
        self.note_words();
    }

    fn note(&self, identity: Identity, number: Option<u64>) {
        let Some(ledger) = &self.ledger else { return };
        let Identity { dev, ino } = identity;
        // Device numbers are small, so this is unique in practice.
        let key = ino ^ dev.rotate_right(16);
        match number {
            Some(number) => {
                ledger.put(
                    Kind::Number,
                    key,
                    &encode(&NumberValue { dev, ino, number }),
                );
            }
            None => ledger.delete(Kind::Number, key),
        }
    }

    fn note_words(&self) {
        if let Some(ledger) = &self.ledger {
            ledger.set(Word::Substitutes, self.assigned);
            ledger.set(Word::Reused, u64::from(self.is_reused));
        }
    }

    /// Returns the recorded number of an object.
    pub(super) fn get(&self, identity: Identity) -> Option<u64> {
        self.numbers.get(&identity).copied()
    }

    /// Returns the number of an object: the recorded one, or `own`; `None` if its own number is reserved for another
    /// object.
    pub(crate) fn find(&self, identity: Identity, own: u64) -> Option<u64> {
        match self.numbers.get(&identity) {
            Some(number) => Some(*number),
            None if self.is_reused && self.owners.contains_key(&own) => None,
            None => Some(own),
        }
    }

    /// Records the number of an object.
    pub(super) fn record(&mut self, identity: Identity, number: u64) {
        self.note(identity, Some(number));
        if let Some(before) = self.numbers.insert(identity, number)
            && before != number
        {
            self.release(identity, before);
        }
        if !is_substitute(number) {
            self.owners.insert(number, identity);
        }
    }

    /// Assigns and records a new substitute number.
    pub(super) fn assign(&mut self, identity: Identity) -> u64 {
        self.assigned += 1;
        self.note_words();
        let number = RANGE | self.assigned;
        self.record(identity, number);
        number
    }

    /// Removes the recorded number of an object.
    pub(super) fn remove(&mut self, identity: Identity) {
        if let Some(number) = self.numbers.remove(&identity) {
            self.note(identity, None);
            self.release(identity, number);
        }
    }

    fn release(&mut self, identity: Identity, number: u64) {
        if self.owners.get(&number) == Some(&identity) {
            self.owners.remove(&number);
        }
    }

    /// Removes the substitute of an object that is not known any more, unless the reason for it persists.
    pub(super) fn note_forgotten(&mut self, identity: Identity) {
        if !self.is_reused {
            self.remove(identity);
        }
    }

    /// Removes the numbers from the ledger that [`Self::reserve`] has replaced. Until then a successor finds the objects
    /// of either stack.
    pub(super) fn drop_stale(&mut self) {
        for identity in std::mem::take(&mut self.stale) {
            if !self.numbers.contains_key(&identity) {
                self.note(identity, None);
            }
        }
    }

    /// Whether an object with this number of its own can be the one with the number `ino`.
    pub(crate) fn may_be(&self, identity: Identity, own: u64, ino: u64) -> bool {
        self.numbers.get(&identity).copied().unwrap_or(own) == ino
    }

    /// Replaces all recorded numbers by these, and reserves them.
    pub(super) fn reserve(&mut self, numbers: impl Iterator<Item = (Identity, u64)>) {
        self.stale.extend(self.numbers.keys().copied());
        self.numbers.clear();
        self.owners.clear();
        self.is_reused = true;
        self.note_words();
        let numbers: Vec<_> = numbers.collect();
        self.numbers.reserve(numbers.len());
        self.owners.reserve(numbers.len());
        for (identity, number) in numbers {
            self.record(identity, number);
        }
    }
}

/// The recorded numbers, for the record of state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SubstitutesRecord {
    pub(crate) numbers: BTreeMap<Identity, u64>,
    pub(crate) assigned: u64,
    pub(crate) is_reused: bool,
}

impl Substitutes {
    pub(super) fn to_record(&self) -> SubstitutesRecord {
        let Self {
            numbers,
            // The inverse of `numbers`.
            owners: _,
            assigned,
            is_reused,
            // The successor has one of its own.
            ledger: _,
            stale: _,
        } = self;
        SubstitutesRecord {
            numbers: numbers
                .iter()
                .map(|(identity, ino)| (*identity, *ino))
                .collect(),
            assigned: *assigned,
            is_reused: *is_reused,
        }
    }

    pub(crate) fn from_record(record: &SubstitutesRecord) -> Self {
        let mut substitutes = Self {
            assigned: record.assigned,
            is_reused: record.is_reused,
            ..Self::default()
        };
        for (identity, number) in &record.numbers {
            substitutes.record(*identity, *number);
        }
        substitutes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Identity = Identity { dev: 1, ino: 10 };
    const TWO: Identity = Identity { dev: 1, ino: 20 };

    #[test]
    fn a_reserved_number_belongs_to_one_object() {
        let mut substitutes = Substitutes::default();
        assert_eq!(substitutes.find(TWO, 7), Some(7));
        substitutes.reserve([(ONE, 7)].into_iter());
        assert_eq!(substitutes.find(ONE, 10), Some(7));
        assert_eq!(substitutes.find(TWO, 7), None);
        let number = substitutes.assign(TWO);
        assert!(is_substitute(number));
        substitutes.note_forgotten(TWO);
        assert_eq!(substitutes.find(TWO, 7), Some(number), "7 is still taken");
        substitutes.remove(ONE);
        substitutes.remove(TWO);
        assert_eq!(substitutes.find(TWO, 7), Some(7));
    }

    #[test]
    fn a_moved_object_retains_its_reservation() {
        let mut substitutes = Substitutes::default();
        substitutes.reserve([(ONE, 7)].into_iter());
        substitutes.record(TWO, 7);
        substitutes.remove(ONE);
        assert_eq!(substitutes.find(TWO, 20), Some(7));
        assert_eq!(substitutes.find(ONE, 7), None);
    }
}
