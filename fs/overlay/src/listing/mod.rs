//! Listings of directories for readdir.
//!
//! A directory is read when its listing begins at offset 0. Further requests continue at offsets that are valid without
//! the state of a reader ([`cookies`]), because directories are not opened (docs/decisions/0011).

mod cache;
mod cookies;
mod entry;
#[cfg(test)]
mod tests;
mod walk;

use std::sync::Arc;

use crate::inode::{Identity, Inode};
use crate::names::Names;
use cowl_layers::error::Result;
use cowl_layers::name::Name;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::MergedEntry;

pub use cache::Listing;
pub(crate) use cache::Listings;
pub(crate) use cookies::{Cookies, CookiesRecord};
use entry::Cookie;
pub use entry::{DirEntry, END};
pub(crate) use walk::Walk;

/// The service that reads directories.
#[derive(Clone, Copy)]
pub(crate) struct ReadDir<'o> {
    pub(crate) names: Names<'o>,
    pub(crate) listings: &'o Listings,
    pub(crate) cookies: &'o Cookies,
    pub(crate) walk: &'o Walk,
}

impl ReadDir<'_> {
    /// Returns a listing of a directory for a readdir request at `offset`.
    ///
    /// At offset 0 the directory is read again, so that new names are visible after rewinddir(3). At other offsets the
    /// cached listing is returned. If it was evicted, the directory is read again, which gives the same cookies to all
    /// names that still exist.
    pub(crate) fn listing(&self, inode: &Arc<Inode>, offset: u64) -> Result<Arc<Listing>> {
        let listings = self.listings;
        if offset == END {
            // The reader is at the end and does not need the listing any more.
            listings.remove(inode.ino());
            return Ok(Arc::default());
        }
        if offset > 0
            && let Some(known) = listings.get(inode.ino())
        {
            return Ok(known);
        }
        let fresh = Arc::new(self.read(inode)?);
        listings.put(inode.ino(), &fresh);
        if offset == 0 {
            self.note_listing(inode, &fresh)?;
        }
        Ok(fresh)
    }

    fn read(&self, inode: &Arc<Inode>) -> Result<Listing> {
        let Some(locations) = inode.locations()? else {
            return Ok(Listing::default());
        };
        let dots = |count, ino, cookie| DirEntry {
            merged: MergedEntry {
                name: Name::dots(count),
                kind: FileKind::Directory,
                ino,
                dir_index: usize::MAX,
                whiteout: false,
            },
            cookie,
        };
        let merged = self.names.list_names(&locations)?;
        let mut entries = Vec::with_capacity(merged.len() + 2);
        entries.push(dots(1, inode.ino(), Cookie::DOT));
        entries.push(dots(2, inode.parent_ino(), Cookie::DOT_DOT));
        entries.extend(without_cookies(merged));
        let names = entries.get_mut(2..).unwrap_or_default();
        self.cookies.arrange(inode.ino(), names);
        Ok(Listing {
            entries,
            locations: Some(locations),
        })
    }

    /// Returns the visible inode number of an entry. Only needed for listings without attributes, because attributes
    /// contain the number.
    pub(crate) fn entry_ino(&self, listing: &Listing, entry: &DirEntry) -> Result<u64> {
        let merged = &entry.merged;
        match &listing.locations {
            Some(locations) if !entry.is_dots() => {
                let view = self.names.cx.stack.view();
                let own = view.merged_entry_ino(locations, merged)?;
                let dir = locations.get(merged.dir_index);
                Ok(dir.map_or(own, |dir| {
                    let (dev, ino) = (dir.layer().dev(), merged.ino);
                    let object = Identity { dev, ino };
                    self.names.inodes.listed_number(object, own)
                }))
            }
            _ => Ok(merged.ino),
        }
    }
}

/// Returns entries that have no cookies yet.
fn without_cookies(merged: Vec<MergedEntry>) -> impl Iterator<Item = DirEntry> {
    merged.into_iter().map(|merged| DirEntry {
        merged,
        cookie: Cookie::DOT,
    })
}
