//! A cache of open directory descriptors with a bounded size and LRU eviction.
//!
//! One descriptor for each inode is not possible: a hard limit of 20,000 open files is common, and trees are larger.

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use crate::locks::Mutex;
use crate::sys::open::{DescriptorCache, register_cache};
use lru::LruCache;

/// The maximum number of cached descriptors, whatever the limit of the process.
const MAX_CAPACITY: u64 = 2048;

static OPEN: LazyLock<Mutex<LruCache<u64, Arc<OwnedFd>>>> = LazyLock::new(|| {
    let capacity = NonZeroUsize::new(*CAPACITY).unwrap_or(NonZeroUsize::MIN);
    Mutex::new(LruCache::new(capacity))
});

/// The capacity of the cache: a quarter of the process's soft limit, within bounds.
static CAPACITY: LazyLock<usize> = LazyLock::new(|| {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let capacity = (limit.unwrap_or(u64::MAX) / 4).clamp(16, MAX_CAPACITY);
    usize::try_from(capacity).unwrap_or(16)
});

static NEXT: AtomicU64 = AtomicU64::new(1);

/// Returns a key that was never used before in this process.
pub(crate) fn new_key() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Returns the cached descriptor of `key`, and marks it as recently used.
pub(crate) fn get(key: u64) -> Option<Arc<OwnedFd>> {
    OPEN.lock().get(&key).cloned()
}

/// The cache, for [`crate::sys::open`].
struct DirectoryCache;

impl DescriptorCache for DirectoryCache {
    fn evict_half(&self) -> usize {
        let mut open = OPEN.lock();
        let count = open.len().div_ceil(2);
        let evicted: Vec<_> = (0..count).filter_map(|_| open.pop_lru()).collect();
        drop(open);
        evicted.len()
    }
}

/// Keeps the cache registered with [`crate::sys::open`] for the lifetime of the process.
static REGISTERED: LazyLock<Arc<DirectoryCache>> = LazyLock::new(|| {
    let cache = Arc::new(DirectoryCache);
    register_cache(&cache);
    cache
});

/// Whether the cache is so large that a walk up a long chain of directories rarely has to reopen one.
pub(crate) fn has_room() -> bool {
    *CAPACITY >= 128
}

/// Whether the descriptor of `key` is cached. Does not count as a use of it.
pub(crate) fn is_open(key: u64) -> bool {
    OPEN.lock().contains(&key)
}

/// The selection of directories that are cached when a long chain is opened from its root.
///
/// The deepest ones are cached, and above them some at equal distances, so that the next open of a chain begins at one
/// of those instead of the root. Together they use only a part of the capacity, because a directory that exists in
/// several layers has as many chains.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spaced {
    near: usize,
    step: usize,
}

impl Spaced {
    pub(crate) fn over(length: usize) -> Self {
        Self::with_capacity(length, *CAPACITY)
    }

    fn with_capacity(length: usize, capacity: usize) -> Self {
        Self {
            near: (capacity / 8).max(1),
            step: (length / (capacity / 8).max(1)).max(1),
        }
    }

    /// Whether to cache the directory that has `below` directories of the chain below it.
    pub(crate) fn keeps(self, below: usize) -> bool {
        !self.is_far(below) || below.is_multiple_of(self.step)
    }

    /// Whether the directory with `below` directories below it is not among the deepest ones.
    pub(crate) fn is_far(self, below: usize) -> bool {
        below >= self.near
    }
}

/// Caches a descriptor. An evicted one is closed after the cache is unlocked.
pub(crate) fn put(key: u64, fd: Arc<OwnedFd>) {
    LazyLock::force(&REGISTERED);
    let _closed = OPEN.lock().push(key, fd);
}

/// Removes a descriptor from the cache. It is closed after the cache is unlocked.
pub(crate) fn forget(key: u64) {
    let _closed = OPEN.lock().pop(&key);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_holds_at_most_the_cached_descriptors() {
        for capacity in [16, 64, 2048] {
            for length in [1, 5, capacity - 1, capacity, 3 * capacity, 100 * capacity] {
                let spaced = Spaced::with_capacity(length, capacity);
                let kept = (0..length).filter(|below| spaced.keeps(*below)).count();
                assert!(kept <= capacity, "{kept} of {length}, {capacity} at most");
                assert!(kept >= length.min(capacity / 8), "{kept} of {length}");
            }
        }
    }
}
