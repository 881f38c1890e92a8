//! openat(2) that closes cached descriptors if the process has none left.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Weak};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::path::Arg;

use crate::error::Errno;
use crate::locks::Mutex;

/// A cache of descriptors.
pub trait DescriptorCache: Send + Sync {
    /// Closes the descriptors that were used least recently: half of them, and at least one. Returns their number.
    ///
    /// The caller may hold any lock except the cache's own.
    fn evict_half(&self) -> usize;
}

static CACHES: Mutex<Vec<Weak<dyn DescriptorCache>>> = Mutex::new(Vec::new());

/// Registers a cache, whose descriptors are closed if an open fails with EMFILE or ENFILE.
pub fn register_cache(cache: &Arc<impl DescriptorCache + 'static>) {
    let mut caches = CACHES.lock();
    caches.retain(|known| known.strong_count() > 0);
    let cache: Weak<dyn DescriptorCache> = Arc::downgrade(&(cache.clone() as _));
    caches.push(cache);
}

/// Closes half of the descriptors of all caches. Returns their number.
pub fn evict_cached() -> usize {
    let caches: Vec<_> = CACHES.lock().iter().filter_map(Weak::upgrade).collect();
    caches.iter().map(|cache| cache.evict_half()).sum()
}

/// Retries an open while it fails for lack of descriptors and a cache has some.
fn retry<T>(open: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match open() {
            Err(Errno::MFILE | Errno::NFILE) if evict_cached() > 0 => {}
            done => return done,
        }
    }
}

/// Executes openat(2).
pub(crate) fn openat<P: Arg + Copy>(
    dir: impl AsFd,
    path: P,
    flags: OFlags,
    mode: Mode,
) -> Result<OwnedFd, Errno> {
    retry(|| rustix::fs::openat(&dir, path, flags, mode))
}

/// Executes openat2(2).
pub(crate) fn openat2<P: Arg + Copy>(
    dir: impl AsFd,
    path: P,
    flags: OFlags,
    mode: Mode,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    retry(|| rustix::fs::openat2(&dir, path, flags, mode, resolve))
}

/// Opens a directory, as a location only (O_PATH), at a path without symbolic links. Fails with ELOOP if there is one.
pub fn exact_dir(path: &Path) -> crate::error::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    match openat2(CWD, path, flags, Mode::empty(), resolve) {
        // A seccomp filter rejects openat2(2).
        Err(Errno::NOSYS) => Ok(openat(CWD, path, flags, Mode::empty())?),
        opened => Ok(opened?),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    struct Cache(AtomicUsize);

    impl DescriptorCache for Cache {
        fn evict_half(&self) -> usize {
            let left = self.0.load(Ordering::Relaxed);
            let evicted = left.div_ceil(2);
            self.0.store(left - evicted, Ordering::Relaxed);
            evicted
        }
    }

    #[test]
    fn open_is_retried_while_a_cache_has_descriptors() {
        let cache = Arc::new(Cache(AtomicUsize::new(4)));
        register_cache(&cache);
        let attempts = Cell::new(0);
        let open = |succeeds_with: usize| {
            attempts.set(0);
            retry(|| {
                attempts.set(attempts.get() + 1);
                match cache.0.load(Ordering::Relaxed) <= succeeds_with {
                    true => Ok(()),
                    false => Err(Errno::MFILE),
                }
            })
        };
        assert_eq!(open(1), Ok(()));
        assert_eq!(attempts.get(), 3);
        assert_eq!(retry(|| Err::<(), _>(Errno::NOENT)), Err(Errno::NOENT));
    }
}
