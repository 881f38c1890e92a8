//! Folders that lie in many layers: their names are remembered, so that a look at one costs as much as
//! it has places, and a listing no more than the upper's.
//!
//! Only of the places below the upper, which do not change under a mount. They are known by the first of
//! them, whose key nothing else ever has ([`LayerDir::key`]): a copy-up puts a place above them, a pushed
//! layer makes the upper's the first of them, and then the names are others.

use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use super::Op;
use cowl_layers::layer::LayerDir;
use cowl_layers::view::{Known, PlaceNames};

/// So many places below the upper are many: with fewer, asking all of them is cheaper.
const MANY: usize = 3;
/// Names are asked so often before they are read for that; a listing reads them at once.
const ASKED: u32 = 8;
/// How many names may be remembered together.
const MOST_NAMES: usize = 1 << 17;
/// How many folders.
const MOST_FOLDERS: usize = 1 << 12;

/// The key of the first place, and how many there are.
type Key = (u64, usize);

/// What is remembered of one.
#[derive(Clone, Debug)]
enum Deep {
    /// Names were asked for so often.
    Asked(u32),
    /// Its names.
    Known(Arc<PlaceNames>),
    /// They are too many, or can't be read: then each name that is asked for meets the error itself.
    Never,
}

/// The folders that were asked for lately.
#[derive(Debug)]
pub(super) struct DeepFolders(Mutex<Kept>);

#[derive(Debug)]
struct Kept {
    folders: LruCache<Key, Deep>,
    names: usize,
}

impl Default for DeepFolders {
    fn default() -> Self {
        Self(Mutex::new(Kept {
            folders: LruCache::unbounded(),
            names: 0,
        }))
    }
}

impl Deep {
    fn names(&self) -> usize {
        match self {
            Self::Known(names) => names.len(),
            Self::Asked(_) | Self::Never => 0,
        }
    }
}

impl DeepFolders {
    /// What is known; notes that it was asked for.
    fn ask(&self, key: Key) -> Deep {
        let mut kept = self.0.lock();
        match kept.folders.get_mut(&key) {
            Some(Deep::Asked(often)) => {
                *often += 1;
                Deep::Asked(*often)
            }
            Some(known) => known.clone(),
            None => {
                kept.put(key, Deep::Asked(1));
                Deep::Asked(1)
            }
        }
    }

    fn put(&self, key: Key, deep: Deep) {
        self.0.lock().put(key, deep);
    }
}

impl Kept {
    fn put(&mut self, key: Key, deep: Deep) {
        self.names += deep.names();
        if let Some(old) = self.folders.put(key, deep) {
            self.names -= old.names();
        }
        while self.names > MOST_NAMES || self.folders.len() > MOST_FOLDERS {
            let Some((_, old)) = self.folders.pop_lru() else {
                break;
            };
            self.names -= old.names();
        }
    }
}

impl Op<'_> {
    /// The names of a folder's places below the upper, where they are remembered. `now`: all of them are
    /// wanted.
    pub(super) fn deep_names(&self, locs: &[Arc<LayerDir>], now: bool) -> Option<Arc<PlaceNames>> {
        let below = self.cx.stack.below_upper(locs);
        let first = below.first().filter(|_| below.len() >= MANY)?;
        let folders = &self.overlay.deep;
        let key = (first.key(), below.len());
        match folders.ask(key) {
            Deep::Known(names) => return Some(names),
            Deep::Asked(often) if now || often >= ASKED => {}
            Deep::Asked(_) | Deep::Never => return None,
        }
        let names = match self.cx.stack.view().place_names(below) {
            Ok(names) if names.len() <= MOST_NAMES => Arc::new(names),
            Ok(_) => {
                folders.put(key, Deep::Never);
                return None;
            }
            Err(error) => {
                log::warn!("cannot read all names of {first:?}: {error}");
                folders.put(key, Deep::Never);
                return None;
            }
        };
        folders.put(key, Deep::Known(names.clone()));
        Some(names)
    }

    /// How those names are told to the view.
    pub(super) fn known<'a>(
        &self,
        locs: &[Arc<LayerDir>],
        names: Option<&'a Arc<PlaceNames>>,
    ) -> Option<Known<'a>> {
        let above = locs.len() - self.cx.stack.below_upper(locs).len();
        names.map(|names| Known { above, names })
    }
}
