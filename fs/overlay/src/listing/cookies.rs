//! Positions in listings: what telldir(3) tells and the protocol calls an offset.
//!
//! A folder is read without being opened (docs/decisions/0011), so a position must say by itself where
//! to go on, whatever came and went since. The names are ordered by a hash; a position names the hash of the
//! entry that comes next, and reading goes on with the first one that is there from it on. So what is
//! removed or made anywhere else moves nothing, and what stays shows exactly once.
//!
//! Of the entry that comes *next*: the kernel, which keeps listings, finds a position again only where an
//! entry leads to it. A program that removes what it has read (rm -rf) removes entries before its position,
//! and the one that leads there is then another one, if only `.` or `..`.
//!
//! The hash has 31 bits, so that programs with 32-bit offsets can read folders; names that have one hash
//! in one folder get ranks, which stand above it.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use parking_lot::Mutex;

use super::entry::{DirEntry, FIRST, LAST};
use cowl_layers::name::Name;

type Hash = Box<dyn Fn(&[u8]) -> u64 + Send + Sync>;
/// By folder and hash.
type Met = HashMap<u64, HashMap<u32, Vec<Name>>>;

/// How names are hashed, and the names that met.
pub(crate) struct Cookies {
    hash: Hash,
    /// The names that were there together. A name's place in its list is its rank; it
    /// keeps it, because somebody may hold a position that says so. Few: of n names about n²/2³² meet.
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
    /// With a key of its own: nobody can choose names that meet.
    fn default() -> Self {
        let keyed = RandomState::new();
        Self::with(move |name| keyed.hash_one(name))
    }
}

impl Cookies {
    /// With this hash.
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

    /// Puts the names of a folder in order and gives each its position.
    pub(super) fn arrange(&self, folder: u64, entries: &mut [DirEntry]) {
        for entry in &mut *entries {
            entry.at.hash = self.hash(entry.name());
        }
        let order =
            |one: &DirEntry, two: &DirEntry| (one.at, one.name()).cmp(&(two.at, two.name()));
        entries.sort_unstable_by(order);
        let mut met = self.met.lock();
        let meet = |one: &DirEntry, two: &DirEntry| one.at.hash == two.at.hash;
        if !met.contains_key(&folder) && entries.windows(2).all(|two| !meets(two)) {
            return;
        }
        let met = met.entry(folder).or_default();
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

/// The place of `name` in the list, at its end when it is new.
fn rank(names: &mut Vec<Name>, name: &Name) -> u32 {
    let known = names.iter().position(|known| known == name);
    let at = known.unwrap_or_else(|| {
        names.push(name.clone());
        names.len() - 1
    });
    u32::try_from(at).unwrap_or(u32::MAX)
}
