//! Listings: read when a directory is read from its beginning, and continued at positions that are valid by
//! themselves ([`cookies`]), because the kernel does not report when a directory is opened or closed.

mod cache;
mod cookies;
mod entry;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::inode::{Identity, Inode};
use crate::names::Names;
use cowl_layers::error::Result;
use cowl_layers::name::Name;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::MergedEntry;

pub use cache::Listing;
pub(crate) use cache::Listings;
pub(crate) use cookies::Cookies;
use entry::Position;
pub use entry::{DirEntry, END};

/// Reading of directories.
#[derive(Clone, Copy)]
pub(crate) struct ReadDir<'o> {
    pub(crate) names: Names<'o>,
    pub(crate) listings: &'o Listings,
    pub(crate) cookies: &'o Cookies,
}

impl ReadDir<'_> {
    /// Returns the listing of a directory, to be read on from `offset`. From the beginning it is read anew, so
    /// that rewinddir(3) shows new names; further on the cached one is used, or one that is read now, which shows
    /// the same of all names that stayed.
    pub(crate) fn listing(&self, inode: &Arc<Inode>, offset: u64) -> Result<Arc<Listing>> {
        let listings = self.listings;
        if offset == END {
            // Nothing is left, and the caller has read all of it.
            listings.drop(inode.ino());
            return Ok(Arc::default());
        }
        if offset > 0
            && let Some(known) = listings.get(inode.ino())
        {
            return Ok(known);
        }
        let fresh = Arc::new(self.read(inode)?);
        listings.put(inode.ino(), &fresh);
        Ok(fresh)
    }

    fn read(&self, inode: &Arc<Inode>) -> Result<Listing> {
        let Some(locations) = inode.locations()? else {
            return Ok(Listing::default());
        };
        let dot = |number, ino, at| DirEntry {
            merged: MergedEntry {
                name: Name::dots(number),
                kind: FileKind::Directory,
                ino,
                dir_index: usize::MAX,
                whiteout: false,
            },
            at,
        };
        let merged = self.names.list_names(&locations)?;
        let mut entries = Vec::with_capacity(merged.len() + 2);
        entries.push(dot(1, inode.ino(), Position::DOT));
        entries.push(dot(2, inode.parent_ino(), Position::DOT_DOT));
        entries.extend(merged.into_iter().map(|merged| DirEntry {
            merged,
            at: Position::DOT,
        }));
        let names = entries.get_mut(2..).unwrap_or_default();
        self.cookies.arrange(inode.ino(), names);
        Ok(Listing {
            entries,
            locations: Some(locations),
        })
    }

    /// Returns the number that an entry shows. Needed only for listings without attributes, which have it.
    pub(crate) fn entry_ino(&self, listing: &Listing, entry: &DirEntry) -> Result<u64> {
        match &listing.locations {
            Some(locations) if !entry.is_dots() => {
                let number = self
                    .names
                    .cx
                    .stack
                    .view()
                    .merged_entry_ino(locations, &entry.merged)?;
                Ok(self.known_number(entry.kind(), number))
            }
            _ => Ok(entry.merged.ino),
        }
    }

    /// Returns the number of an object that cannot carry the marker of its number: it shows the one from before its
    /// copy-up for as long as the mount lives. It is identified by its number in the upper, which the listing has.
    fn known_number(&self, kind: FileKind, listed: u64) -> u64 {
        if matches!(kind, FileKind::Regular | FileKind::Directory) {
            return listed;
        }
        let known = self.names.cx.stack.writable().and_then(|upper| {
            let dev = upper.layer.dev();
            self.names.inodes.substitute(Identity { dev, ino: listed })
        });
        known.unwrap_or(listed)
    }
}
