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
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let keep = (limit.unwrap_or(u64::MAX) / 4).clamp(16, MOST);
    let keep = usize::try_from(keep).ok().and_then(NonZeroUsize::new);
    Mutex::new(LruCache::new(keep.unwrap_or(NonZeroUsize::MIN)))
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

/// Keeps a descriptor. The one that has to go for it is closed outside the lock.
pub(crate) fn put(key: u64, fd: Arc<OwnedFd>) {
    let _closed = OPEN.lock().push(key, fd);
}

/// Lets go of a descriptor.
pub(crate) fn forget(key: u64) {
    let _closed = OPEN.lock().pop(&key);
}
