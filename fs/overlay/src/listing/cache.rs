//! A cache of the listings that processes are reading.

use std::ops::Deref;
use std::sync::Arc;

use cowl_layers::locks::Mutex;
use lru::LruCache;

use super::entry::{Cookie, DirEntry, END};
use cowl_layers::layer::LayerDir;

/// The maximum total number of names in the cached listings.
///
/// The most recently used listing is cached regardless of its length. Otherwise a large directory would be read again
/// for each readdir request.
pub(super) const MAX_NAMES: usize = 1 << 17;

/// A snapshot of the entries of a directory, sorted by their cookies.
#[derive(Debug, Default)]
pub struct Listing {
    pub(super) entries: Vec<DirEntry>,
    /// The locations of the directory; `None` if it was removed.
    pub(super) locations: Option<Arc<[Arc<LayerDir>]>>,
}

impl Listing {
    /// Returns the entries from `offset` on, each with the offset of the next one.
    pub fn entries_from(&self, offset: u64) -> impl Iterator<Item = (u64, &DirEntry)> {
        let cookie = Cookie::from_offset(offset);
        let skip = self.entries.partition_point(|entry| entry.cookie < cookie);
        let rest = self.entries.get(skip..).unwrap_or_default();
        let behind = rest.iter().skip(1).map(|next| next.cookie.to_offset());
        behind.chain(std::iter::once(END)).zip(rest)
    }
}

impl Deref for Listing {
    type Target = [DirEntry];

    fn deref(&self) -> &[DirEntry] {
        &self.entries
    }
}

/// A cache of listings by the inode numbers of their directories, with LRU eviction.
#[derive(Debug)]
pub(crate) struct Listings(pub(super) Mutex<ListingCache>);

#[derive(Debug)]
pub(super) struct ListingCache {
    pub(super) listings: LruCache<u64, Arc<Listing>>,
    pub(super) names: usize,
}

impl Default for Listings {
    fn default() -> Self {
        Self(Mutex::new(ListingCache {
            listings: LruCache::unbounded(),
            names: 0,
        }))
    }
}

impl Listings {
    pub(super) fn get(&self, ino: u64) -> Option<Arc<Listing>> {
        self.0.lock().listings.get(&ino).cloned()
    }

    pub(super) fn put(&self, ino: u64, listing: &Arc<Listing>) {
        let mut cache = self.0.lock();
        cache.names += listing.len();
        if let Some(old) = cache.listings.put(ino, listing.clone()) {
            cache.names -= old.len();
        }
        while cache.names > MAX_NAMES && cache.listings.len() > 1 {
            let Some((_, old)) = cache.listings.pop_lru() else {
                break;
            };
            cache.names -= old.len();
        }
    }

    /// Drops all listings. Readers continue with new ones, at the same offsets.
    pub(crate) fn clear(&self) {
        let mut cache = self.0.lock();
        cache.listings.clear();
        cache.names = 0;
    }

    pub(super) fn remove(&self, ino: u64) {
        let mut cache = self.0.lock();
        if let Some(old) = cache.listings.pop(&ino) {
            cache.names -= old.len();
        }
    }
}
