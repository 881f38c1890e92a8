//! A cache of names that were resolved before they were requested.
//!
//! It covers directories that are only in lower layers. These do not change, so no invalidation is necessary: a
//! change of a name or of its object copies the directory up, which then has another first location. When layers are
//! replaced, the cache is emptied, because it would hold the removed ones open.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cowl_layers::locks::Mutex;

use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;
use cowl_layers::view::{Found, MergedEntry};

/// The maximum number of directories.
const MAX_DIRS: usize = 4;
/// The number of resolved names among which a requested one is searched for. Names are requested in the order in
/// which they were resolved, but some may be omitted.
const MAX_OMITTED: usize = 8;

/// A directory in the cache.
#[derive(Debug)]
struct PrefetchedDir {
    locs: Arc<[Arc<LayerDir>]>,
    /// The visible entries, until they are requested.
    entries: Option<Vec<MergedEntry>>,
    /// The resolved names, until they are requested.
    names: VecDeque<(Name, Found)>,
}

impl PrefetchedDir {
    fn is_at(&self, locs: &[Arc<LayerDir>]) -> bool {
        self.locs.len() == locs.len()
            && (self.locs.iter().zip(locs)).all(|(one, other)| one.is_same_location(other))
    }
}

/// A cache of the entries and names of directories, each of which is returned once.
#[derive(Debug, Default)]
pub(crate) struct Prefetched {
    dirs: Mutex<VecDeque<PrefetchedDir>>,
    /// Whether the cache may contain anything.
    is_used: AtomicBool,
}

impl Prefetched {
    /// Adds the visible entries of a directory, in place of the oldest directory if there are too many.
    pub(crate) fn add_dir(&self, locs: &Arc<[Arc<LayerDir>]>, entries: Vec<MergedEntry>) {
        self.is_used.store(true, Ordering::Relaxed);
        let mut dirs = self.dirs.lock();
        dirs.retain(|dir| !dir.is_at(locs));
        if dirs.len() >= MAX_DIRS {
            dirs.pop_front();
        }
        dirs.push_back(PrefetchedDir {
            locs: locs.clone(),
            entries: Some(entries),
            names: VecDeque::new(),
        });
    }

    /// Adds a name in a directory. Returns whether the directory is still in the cache.
    pub(crate) fn add_name(&self, locs: &[Arc<LayerDir>], name: Name, found: Found) -> bool {
        let mut dirs = self.dirs.lock();
        let Some(dir) = dirs.iter_mut().find(|dir| dir.is_at(locs)) else {
            return false;
        };
        dir.names.push_back((name, found));
        true
    }

    /// Takes the visible entries of a directory.
    pub(super) fn take_entries(&self, locs: &[Arc<LayerDir>]) -> Option<Vec<MergedEntry>> {
        if !self.is_used.load(Ordering::Relaxed) {
            return None;
        }
        let mut dirs = self.dirs.lock();
        dirs.iter_mut().find(|dir| dir.is_at(locs))?.entries.take()
    }

    /// Takes the result of the lookup of a name. Drops those of the names before it.
    pub(super) fn take_name(&self, locs: &[Arc<LayerDir>], name: &Name) -> Option<Found> {
        if !self.is_used.load(Ordering::Relaxed) {
            return None;
        }
        let mut dirs = self.dirs.lock();
        let names = &mut dirs.iter_mut().find(|dir| dir.is_at(locs))?.names;
        let next = names.iter().take(MAX_OMITTED);
        let at = next.into_iter().position(|(known, _)| known == name)?;
        names.drain(..at);
        names.pop_front().map(|(_, found)| found)
    }

    /// Drops everything.
    pub(crate) fn clear(&self) {
        self.dirs.lock().clear();
        self.is_used.store(false, Ordering::Relaxed);
    }
}
