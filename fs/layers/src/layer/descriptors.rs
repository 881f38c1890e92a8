//! The open folder descriptors: a bounded number, the least recently used go first.
//!
//! Never one descriptor an inode: a hard limit of 20,000 open files is common, and trees are larger.

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use lru::LruCache;
use parking_lot::Mutex;

/// At most so many folders are kept open, whatever the limit of the process.
const MOST: u64 = 2048;

static OPEN: LazyLock<Mutex<LruCache<u64, Arc<OwnedFd>>>> = LazyLock::new(|| {
    let keep = NonZeroUsize::new(*KEEP).unwrap_or(NonZeroUsize::MIN);
    Mutex::new(LruCache::new(keep))
});

/// How many are kept.
static KEEP: LazyLock<usize> = LazyLock::new(|| {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let keep = (limit.unwrap_or(u64::MAX) / 4).clamp(16, MOST);
    usize::try_from(keep).unwrap_or(16)
});

static NEXT: AtomicU64 = AtomicU64::new(1);

/// A key that no other folder has had.
pub(crate) fn new_key() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The descriptor kept under `key`.
pub(crate) fn get(key: u64) -> Option<Arc<OwnedFd>> {
    OPEN.lock().get(&key).cloned()
}

/// Whether so many are kept that going up a long chain seldom opens one anew.
pub(crate) fn has_room() -> bool {
    *KEEP >= 128
}

/// Whether a descriptor is kept under `key`; that is no use of it.
pub(crate) fn is_open(key: u64) -> bool {
    OPEN.lock().contains(&key)
}

/// Which directories of a long chain are kept when it is opened from its beginning: the last ones, and above
/// them some at equal distances, so that the next chain begins at one of those and not at the root. They are a
/// part of what is kept, for a directory that lies in several layers has as many chains.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spaced {
    near: usize,
    step: usize,
}

impl Spaced {
    pub(crate) fn over(length: usize) -> Self {
        Self::of(length, *KEEP)
    }

    fn of(length: usize, keep: usize) -> Self {
        Self {
            near: (keep / 8).max(1),
            step: (length / (keep / 8).max(1)).max(1),
        }
    }

    /// Whether the one with so many of the chain below it is kept.
    pub(crate) fn keeps(self, below: usize) -> bool {
        !self.is_far(below) || below.is_multiple_of(self.step)
    }

    /// Whether it is none of the last ones.
    pub(crate) fn is_far(self, below: usize) -> bool {
        below >= self.near
    }
}

/// Keeps a descriptor. The one that has to go for it is closed outside the lock.
pub(crate) fn put(key: u64, fd: Arc<OwnedFd>) {
    let _closed = OPEN.lock().push(key, fd);
}

/// Lets go of a descriptor.
pub(crate) fn forget(key: u64) {
    let _closed = OPEN.lock().pop(&key);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_keeps_no_more_than_there_is_room_for() {
        for keep in [16, 64, 2048] {
            for length in [1, 5, keep - 1, keep, 3 * keep, 100 * keep] {
                let spaced = Spaced::of(length, keep);
                let kept = (0..length).filter(|below| spaced.keeps(*below)).count();
                assert!(kept <= keep, "{kept} of {length}, {keep} at most");
                assert!(kept >= length.min(keep / 8), "{kept} of {length}");
            }
        }
    }
}
