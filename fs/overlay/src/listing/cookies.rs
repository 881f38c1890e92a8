//! The order of listings, which gives each entry its position.
//!
//! A directory is read without being opened (docs/decisions/0011), so a position must be sufficient to continue
//! after any changes since. The names are ordered by a hash. A position is the hash of the entry that comes next, and
//! reading continues with the first entry from it on. So an entry that is removed or created elsewhere moves no
//! position, and each entry that stays shows exactly once.
//!
//! It is the *next* entry because the kernel, which caches listings, finds a position again only if an entry leads to
//! it. A program that removes the entries that it has read (rm -rf) removes those before its position, and then
//! another entry leads there, if only `.` or `..`.
//!
//! The hash has 31 bits, so that programs with 32-bit offsets can read directories. Names with the same hash in one
//! directory get ranks, which are the upper bits of the position.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use cowl_layers::locks::Mutex;

use super::entry::{DirEntry, FIRST, LAST};
use cowl_layers::name::Name;

type Hash = Box<dyn Fn(&[u8]) -> u64 + Send + Sync>;
/// By directory and hash.
type Met = HashMap<u64, HashMap<u32, Vec<Name>>>;

/// The hash function, and the names with the same hash.
pub(crate) struct Cookies {
    hash: Hash,
    /// The names with the same hash that existed together. A name's index in its list is its rank, which never
    /// changes, because a program may hold a position with it. Of n names about n²/2³² are listed.
    met: Mutex<Met>,
}

impl std::fmt::Debug for Cookies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cookies")
            .field("met", &self.met)
            .finish_non_exhaustive()
    }
}

impl Default for Cookies {
    /// Uses a random key, so that no program can choose names with the same hash.
    fn default() -> Self {
        let keyed = RandomState::new();
        Self::with(move |name| keyed.hash_one(name))
    }
}

impl Cookies {
    /// Uses this hash function.
    pub(super) fn with(hash: impl Fn(&[u8]) -> u64 + Send + Sync + 'static) -> Self {
        Self {
            hash: Box::new(hash),
            met: Mutex::default(),
        }
    }

    #[allow(clippy::cast_possible_truncation, reason = "below 2^31")]
    fn hash(&self, name: &[u8]) -> u32 {
        FIRST + ((self.hash)(name) % u64::from(LAST - FIRST)) as u32
    }

    /// Sorts the names of a directory and gives each its position.
    pub(super) fn arrange(&self, dir: u64, entries: &mut [DirEntry]) {
        for entry in &mut *entries {
            entry.at.hash = self.hash(entry.name());
        }
        let order =
            |one: &DirEntry, two: &DirEntry| (one.at, one.name()).cmp(&(two.at, two.name()));
        entries.sort_unstable_by(order);
        let mut met = self.met.lock();
        let meet = |one: &DirEntry, two: &DirEntry| one.at.hash == two.at.hash;
        if !met.contains_key(&dir) && entries.windows(2).all(|two| !meets(two)) {
            return;
        }
        let met = met.entry(dir).or_default();
        for group in entries.chunk_by_mut(meet) {
            let [first, rest @ ..] = &mut *group else {
                continue;
            };
            let hash = first.at.hash;
            if rest.is_empty() && !met.contains_key(&hash) {
                continue;
            }
            let names = met.entry(hash).or_default();
            for entry in &mut *group {
                entry.at.rank = rank(names, entry.name());
            }
            group.sort_unstable_by(order);
        }
    }
}

fn meets(two: &[DirEntry]) -> bool {
    matches!(two, [one, two] if one.at.hash == two.at.hash)
}

/// Returns the index of `name` in the list; a new one is added at its end.
fn rank(names: &mut Vec<Name>, name: &Name) -> u32 {
    let known = names.iter().position(|known| known == name);
    let at = known.unwrap_or_else(|| {
        names.push(name.clone());
        names.len() - 1
    });
    u32::try_from(at).unwrap_or(u32::MAX)
}
