//! The order of entries in a listing, and the cookie of each.
//!
//! A directory is read without being opened (docs/decisions/0011), so there is no state for each reader: an offset
//! must be sufficient to continue after any changes since. Entries are therefore sorted by a hash of their names. An
//! offset is the cookie of the next entry, and reading continues with the first entry whose cookie is not smaller. The
//! creation or removal of an entry changes no other cookie, so each entry that exists during the whole listing is
//! returned exactly once.
//!
//! An offset is the cookie of the *next* entry because the kernel caches listings, and finds an offset in its cache
//! only if an entry precedes it. A program that removes the entries that it has read (rm -rf) removes those before its
//! offset. Then another entry still precedes it, at least `.` or `..`.
//!
//! A hash has 31 bits, so that programs with 32-bit offsets can read directories. Names with the same hash in one
//! directory are distinguished by ranks, which are the upper bits of the cookie.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};
use siphasher::sip::SipHasher13;

use cowl_layers::locks::Mutex;

use super::entry::{DirEntry, FIRST, LAST};
use crate::inode::encode;
use crate::ledger::{Kind, Ledger, Word};
use cowl_layers::error::Result;
use cowl_layers::name::Name;

/// A hash function of a key and a name.
pub(super) type Hash = fn(&Key, &[u8]) -> u64;
pub(super) type Key = [u64; 2];
/// Names whose hashes collide, by directory and hash.
type Collisions = HashMap<u64, HashMap<u32, Vec<Name>>>;

/// An assignment of cookies, for the record of state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CookiesRecord {
    pub(crate) key: Key,
    /// Names with the same hash, in the order of their ranks, by the directory's inode number and the hash.
    pub(crate) names: BTreeMap<(u64, u32), Vec<Vec<u8>>>,
}

/// The assignment of cookies: the hash function and the known collisions.
#[derive(Debug)]
pub(crate) struct Cookies {
    hash: Hash,
    key: Key,
    /// Names with the same hash that existed at the same time. The index of a name in its list is its rank, which never
    /// changes, because a program may hold an offset that contains it. About n²/2³² of n names collide.
    collisions: Mutex<Collisions>,
    ledger: OnceLock<Arc<Ledger>>,
}

impl Default for Cookies {
    /// Creates an assignment with a randomly keyed hash, so that no program can choose names that collide.
    fn default() -> Self {
        let random = |word: u64| RandomState::new().hash_one(word);
        Self {
            hash: |[first, second], name| SipHasher13::new_with_keys(*first, *second).hash(name),
            key: [random(0), random(1)],
            collisions: Mutex::default(),
            ledger: OnceLock::new(),
        }
    }
}

impl Cookies {
    /// Creates an assignment with this hash function.
    #[cfg(test)]
    pub(super) fn with_hash(hash: Hash) -> Self {
        Self {
            hash,
            ..Self::default()
        }
    }

    /// Returns the record of the assignment, for the record of state.
    pub(crate) fn to_record(&self) -> CookiesRecord {
        let Self {
            // It depends on the version of the record only.
            hash: _,
            key,
            collisions,
            // The successor has one of its own.
            ledger: _,
        } = self;
        let mut names = BTreeMap::new();
        for (dir, hashes) in &*collisions.lock() {
            for (hash, colliding) in hashes {
                let colliding = colliding.iter().map(|name| name.as_bytes().to_vec());
                names.insert((*dir, *hash), colliding.collect());
            }
        }
        CookiesRecord { key: *key, names }
    }

    /// Creates the assignment of a record. Fails with EINVAL if it contains an invalid name.
    pub(crate) fn from_record(record: &CookiesRecord) -> Result<Self> {
        let mut collisions = Collisions::new();
        for ((dir, hash), names) in &record.names {
            let names = names.iter().map(Name::new).collect::<Result<_>>()?;
            collisions.entry(*dir).or_default().insert(*hash, names);
        }
        Ok(Self {
            key: record.key,
            collisions: Mutex::new(collisions),
            ..Self::default()
        })
    }

    /// Records the key, all collisions, and every later one in a ledger.
    pub(crate) fn attach(&self, ledger: &Arc<Ledger>) {
        if self.ledger.set(ledger.clone()).is_err() {
            return;
        }
        let [first, second] = self.key;
        ledger.set(Word::Key0, first);
        ledger.set(Word::Key1, second);
        for (dir, hashes) in &*self.collisions.lock() {
            for (hash, names) in hashes {
                self.note_collision(*dir, *hash, names);
            }
        }
    }

    fn note_collision(&self, dir: u64, hash: u32, names: &[Name]) {
        if let Some(ledger) = self.ledger.get() {
            let names: Vec<_> = names.iter().map(|name| name.as_bytes().to_vec()).collect();
            // Unique in practice: numbers of directories are not as large.
            let key = dir.rotate_left(32) ^ u64::from(hash);
            ledger.put(Kind::Collision, key, &encode(&((dir, hash), names)));
        }
    }

    #[allow(clippy::cast_possible_truncation, reason = "below 2^31")]
    fn hash(&self, name: &[u8]) -> u32 {
        FIRST + ((self.hash)(&self.key, name) % u64::from(LAST - FIRST)) as u32
    }

    /// Assigns cookies to the entries of the directory with the inode number `dir`, and sorts the entries by them.
    pub(super) fn arrange(&self, dir: u64, entries: &mut [DirEntry]) {
        for entry in &mut *entries {
            entry.cookie.hash = self.hash(entry.name());
        }
        let order = |one: &DirEntry, two: &DirEntry| {
            (one.cookie, one.name()).cmp(&(two.cookie, two.name()))
        };
        entries.sort_unstable_by(order);
        let mut collisions = self.collisions.lock();
        let same_hash = |one: &DirEntry, two: &DirEntry| one.cookie.hash == two.cookie.hash;
        if !collisions.contains_key(&dir) && entries.windows(2).all(|two| !is_collision(two)) {
            return;
        }
        let collisions = collisions.entry(dir).or_default();
        for group in entries.chunk_by_mut(same_hash) {
            let [first, rest @ ..] = &mut *group else {
                continue;
            };
            let hash = first.cookie.hash;
            if rest.is_empty() && !collisions.contains_key(&hash) {
                continue;
            }
            let names = collisions.entry(hash).or_default();
            let known = names.len();
            for entry in &mut *group {
                entry.cookie.rank = rank(names, entry.name());
            }
            if names.len() > known {
                self.note_collision(dir, hash, names);
            }
            group.sort_unstable_by(order);
        }
    }
}

fn is_collision(two: &[DirEntry]) -> bool {
    matches!(two, [one, two] if one.cookie.hash == two.cookie.hash)
}

/// Returns the index of `name` in the list, and appends a name that is not in it.
fn rank(names: &mut Vec<Name>, name: &Name) -> u32 {
    let known = names.iter().position(|known| known == name);
    let index = known.unwrap_or_else(|| {
        names.push(name.clone());
        names.len() - 1
    });
    u32::try_from(index).unwrap_or(u32::MAX)
}
