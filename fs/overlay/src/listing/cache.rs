//! A cache of listings that are being read.

use std::ops::Deref;
use std::sync::Arc;

use cowl_layers::locks::Mutex;
use lru::LruCache;

use super::entry::{DirEntry, END, Position};
use cowl_layers::layer::LayerDir;

/// The largest total number of names in the cached listings. The most recently used listing stays cached whatever
/// its length, or a large directory would be read again for every part.
pub(super) const MOST_NAMES: usize = 1 << 17;

/// The entries of a directory when it was listed, in the order of their positions.
#[derive(Debug, Default)]
pub struct Listing {
    pub(super) entries: Vec<DirEntry>,
    /// The directory's locations.
    pub(super) locations: Option<Arc<[Arc<LayerDir>]>>,
}

impl Listing {
    /// Returns the entries from a position on, each with the position behind it.
    pub fn entries_from(&self, offset: u64) -> impl Iterator<Item = (u64, &DirEntry)> {
        let at = Position::from_cookie(offset);
        let skip = self.entries.partition_point(|entry| entry.at < at);
        let rest = self.entries.get(skip..).unwrap_or_default();
        let behind = rest.iter().skip(1).map(|next| next.at.to_cookie());
        behind.chain(std::iter::once(END)).zip(rest)
    }
}

impl Deref for Listing {
    type Target = [DirEntry];

    fn deref(&self) -> &[DirEntry] {
        &self.entries
    }
}

/// A cache of the listings that are being read, by the numbers of their directories.
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
        let mut kept = self.0.lock();
        kept.names += listing.len();
        if let Some(old) = kept.listings.put(ino, listing.clone()) {
            kept.names -= old.len();
        }
        while kept.names > MOST_NAMES && kept.listings.len() > 1 {
            let Some((_, old)) = kept.listings.pop_lru() else {
                break;
            };
            kept.names -= old.len();
        }
    }

    pub(super) fn drop(&self, ino: u64) {
        let mut kept = self.0.lock();
        if let Some(old) = kept.listings.pop(&ino) {
            kept.names -= old.len();
        }
    }
}
