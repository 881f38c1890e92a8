//! A cache of the names in directories that exist in many layers.
//!
//! With cached names, a lookup accesses only the layers that contain the name, and a listing reads only the upper.
//!
//! The cache covers the locations below the upper, which do not change during a mount. It is keyed by the first of
//! them, because its key is never reused ([`LayerDir::key`]). No invalidation is necessary: a copy-up adds a location
//! above them, and a pushed layer makes the location in the old upper the first one, which has another key. When layers
//! are replaced, the cache is emptied, because it would keep the removed ones open.

use std::sync::Arc;

use cowl_layers::locks::Mutex;
use lru::LruCache;

use cowl_layers::layer::LayerDir;
use cowl_layers::view::{NameIndex, View};

/// The minimum number of locations below the upper for which names are cached. With fewer, it is cheaper to access all
/// of them.
const MIN_LOCATIONS: usize = 3;
/// The number of lookups in a directory after which all of its names are read. A listing reads them at once.
const LOOKUPS_BEFORE_READ: u32 = 8;
/// The maximum total number of cached names.
const MAX_NAMES: usize = 1 << 17;
/// The maximum number of cached directories.
const MAX_DIRS: usize = 1 << 12;

/// The key of the first location, and the number of locations.
type Key = (u64, usize);

/// The cache entry of a directory.
#[derive(Clone, Debug)]
enum CachedDir {
    /// The names are not cached. The number of lookups so far.
    Counted(u32),
    /// The cached names.
    Cached(Arc<NameIndex>),
    /// The names are too many, or cannot be read: then each lookup reports the error itself.
    Uncacheable,
}

/// The operation that needs the names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NamesFor {
    /// A lookup of one name.
    Lookup,
    /// A listing of all names.
    Listing,
}

/// A cache of the names in directories with many locations, with LRU eviction.
#[derive(Debug)]
pub(crate) struct DeepDirs(Mutex<DeepCache>);

#[derive(Debug)]
struct DeepCache {
    dirs: LruCache<Key, CachedDir>,
    names: usize,
}

impl Default for DeepDirs {
    fn default() -> Self {
        Self(Mutex::new(DeepCache {
            dirs: LruCache::unbounded(),
            names: 0,
        }))
    }
}

impl DeepDirs {
    /// Returns the names in the locations `below` the upper, if they are cached or it is efficient to read them now.
    pub(super) fn names(
        &self,
        view: &View,
        below: &[Arc<LayerDir>],
        operation: NamesFor,
    ) -> Option<Arc<NameIndex>> {
        let first = below.first().filter(|_| below.len() >= MIN_LOCATIONS)?;
        let key = (first.key(), below.len());
        match self.count_lookup(key) {
            CachedDir::Cached(names) => return Some(names),
            CachedDir::Counted(times)
                if operation == NamesFor::Listing || times >= LOOKUPS_BEFORE_READ => {}
            CachedDir::Counted(_) | CachedDir::Uncacheable => return None,
        }
        let names = match view.index_names(below) {
            Ok(names) if names.len() <= MAX_NAMES => Arc::new(names),
            Ok(_) => {
                self.put(key, CachedDir::Uncacheable);
                return None;
            }
            Err(error) => {
                log::warn!("cannot read all names of {first}: {error}");
                self.put(key, CachedDir::Uncacheable);
                return None;
            }
        };
        self.put(key, CachedDir::Cached(names.clone()));
        Some(names)
    }

    /// Drops everything.
    pub(crate) fn clear(&self) {
        let mut cache = self.0.lock();
        cache.dirs.clear();
        cache.names = 0;
    }

    /// Returns the cache entry of a directory after counting a lookup in it.
    fn count_lookup(&self, key: Key) -> CachedDir {
        let mut cache = self.0.lock();
        match cache.dirs.get_mut(&key) {
            Some(CachedDir::Counted(times)) => {
                *times += 1;
                CachedDir::Counted(*times)
            }
            Some(known) => known.clone(),
            None => {
                cache.put(key, CachedDir::Counted(1));
                CachedDir::Counted(1)
            }
        }
    }

    fn put(&self, key: Key, dir: CachedDir) {
        self.0.lock().put(key, dir);
    }
}

impl DeepCache {
    fn put(&mut self, key: Key, dir: CachedDir) {
        self.names += dir.names();
        if let Some(old) = self.dirs.put(key, dir) {
            self.names -= old.names();
        }
        while self.names > MAX_NAMES || self.dirs.len() > MAX_DIRS {
            let Some((_, old)) = self.dirs.pop_lru() else {
                break;
            };
            self.names -= old.names();
        }
    }
}

impl CachedDir {
    fn names(&self) -> usize {
        match self {
            CachedDir::Cached(names) => names.len(),
            CachedDir::Counted(_) | CachedDir::Uncacheable => 0,
        }
    }
}
