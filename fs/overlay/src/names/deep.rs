//! Directories that lie in many layers: their names are remembered, so that a lookup costs as many system
//! calls as the name has locations, and a listing no more than the upper's.
//!
//! Only the locations below the upper are covered, which do not change under a mount. They are identified by
//! the first of them, whose key is never reused ([`LayerDir::key`]): a copy-up puts a location above them, a
//! pushed layer makes the upper's the first of them, and then the names are others.

use std::sync::Arc;

use cowl_layers::locks::Mutex;
use lru::LruCache;

use cowl_layers::layer::LayerDir;
use cowl_layers::view::{NameIndex, View};

/// The number of locations below the upper from which on names are remembered: with fewer, querying all of
/// them is cheaper.
const MANY: usize = 3;
/// The number of lookups after which all names are read; a listing reads them at once.
const QUERIES: u32 = 8;
/// The largest total number of remembered names.
const MOST_NAMES: usize = 1 << 17;
/// The largest number of remembered directories.
const MOST_DIRS: usize = 1 << 12;

/// The key of the first location, and the number of locations.
type Key = (u64, usize);

/// What is remembered of a directory.
#[derive(Clone, Debug)]
enum Deep {
    /// The number of lookups in it.
    Queried(u32),
    /// Its names.
    Known(Arc<NameIndex>),
    /// They are too many, or cannot be read: then each lookup meets the error itself.
    Never,
}

/// The number of names that are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// A lookup.
    One,
    /// A listing.
    All,
}

/// A cache of the directories that were queried lately.
#[derive(Debug)]
pub(crate) struct DeepDirs(Mutex<DeepCache>);

#[derive(Debug)]
struct DeepCache {
    dirs: LruCache<Key, Deep>,
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
    /// Returns the names in a directory's locations below the upper, `below`, if they are remembered or are
    /// worth reading now.
    pub(super) fn names(
        &self,
        view: &View,
        below: &[Arc<LayerDir>],
        need: Need,
    ) -> Option<Arc<NameIndex>> {
        let first = below.first().filter(|_| below.len() >= MANY)?;
        let key = (first.key(), below.len());
        match self.query(key) {
            Deep::Known(names) => return Some(names),
            Deep::Queried(times) if need == Need::All || times >= QUERIES => {}
            Deep::Queried(_) | Deep::Never => return None,
        }
        let names = match view.index_names(below) {
            Ok(names) if names.len() <= MOST_NAMES => Arc::new(names),
            Ok(_) => {
                self.put(key, Deep::Never);
                return None;
            }
            Err(error) => {
                log::warn!("cannot read all names of {first}: {error}");
                self.put(key, Deep::Never);
                return None;
            }
        };
        self.put(key, Deep::Known(names.clone()));
        Some(names)
    }

    /// Returns the state of a directory, and counts the query.
    fn query(&self, key: Key) -> Deep {
        let mut cache = self.0.lock();
        match cache.dirs.get_mut(&key) {
            Some(Deep::Queried(times)) => {
                *times += 1;
                Deep::Queried(*times)
            }
            Some(known) => known.clone(),
            None => {
                cache.put(key, Deep::Queried(1));
                Deep::Queried(1)
            }
        }
    }

    fn put(&self, key: Key, deep: Deep) {
        self.0.lock().put(key, deep);
    }
}

impl DeepCache {
    fn put(&mut self, key: Key, deep: Deep) {
        self.names += deep.names();
        if let Some(old) = self.dirs.put(key, deep) {
            self.names -= old.names();
        }
        while self.names > MOST_NAMES || self.dirs.len() > MOST_DIRS {
            let Some((_, old)) = self.dirs.pop_lru() else {
                break;
            };
            self.names -= old.names();
        }
    }
}

impl Deep {
    fn names(&self) -> usize {
        match self {
            Self::Known(names) => names.len(),
            Self::Queried(_) | Self::Never => 0,
        }
    }
}
