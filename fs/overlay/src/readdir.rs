//! Listings: taken when a folder is read from its beginning, and read on at positions that hold on their
//! own ([`super::cookies`]), because nobody tells when a folder is opened or closed.

use std::ops::Deref;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use super::Op;
use super::cookies::{END, Position};
use crate::inode::{Identity, Inode};
use crate::reach;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::Line;

/// How many names the listings that are kept may have together. The one that was used last is kept
/// whatever its length, or reading a large folder would take its listing anew for every part.
pub(super) const MOST_NAMES: usize = 1 << 17;

/// One line of a listing; `.` and `..` are among them.
#[derive(Clone, Debug)]
pub struct DirEntry {
    pub(super) line: Line,
    pub(super) at: Position,
}

impl DirEntry {
    /// The name.
    pub fn name(&self) -> &Name {
        &self.line.name
    }

    /// Its type.
    pub fn kind(&self) -> FileKind {
        self.line.kind
    }

    /// The inode number that lies on the disk; of `.` and `..` the one that shows.
    pub fn number_on_disk(&self) -> u64 {
        self.line.ino
    }

    /// Whether it is `.` or `..`.
    pub fn is_dots(&self) -> bool {
        self.at <= Position::DOT_DOT
    }
}

/// What a folder held when it was listed, in the order of the positions.
#[derive(Debug, Default)]
pub struct Listing {
    entries: Vec<DirEntry>,
    /// Where the folder lay.
    places: Option<Arc<[Arc<LayerDir>]>>,
}

impl Listing {
    /// The entries from a position on, each with the position behind it.
    pub fn from(&self, offset: u64) -> impl Iterator<Item = (u64, &DirEntry)> {
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

/// The listings that are being read, by their folders' numbers.
#[derive(Debug)]
pub(super) struct Listings(pub(super) Mutex<Kept>);

#[derive(Debug)]
pub(super) struct Kept {
    pub(super) listings: LruCache<u64, Arc<Listing>>,
    pub(super) names: usize,
}

impl Default for Listings {
    fn default() -> Self {
        Self(Mutex::new(Kept {
            listings: LruCache::unbounded(),
            names: 0,
        }))
    }
}

impl Listings {
    fn get(&self, ino: u64) -> Option<Arc<Listing>> {
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

impl Op<'_> {
    /// The listing of a folder, to be read on from `offset`. From the beginning it is taken anew, so that
    /// rewinddir(3) shows what has come since; further on the one that was taken is read on, or one that is
    /// taken now, which shows the same of all that stayed.
    pub fn listing(&self, inode: &Arc<Inode>, offset: u64) -> Result<Arc<Listing>> {
        let listings = &self.overlay.listings;
        if offset == END {
            // Nothing is left, and whoever asks has read it all.
            listings.drop(inode.ino());
            return Ok(Arc::default());
        }
        if offset > 0
            && let Some(known) = listings.get(inode.ino())
        {
            return Ok(known);
        }
        let fresh = Arc::new(self.take_listing(inode)?);
        listings.put(inode.ino(), &fresh);
        Ok(fresh)
    }

    fn take_listing(&self, inode: &Arc<Inode>) -> Result<Listing> {
        let Some(places) = inode.places()? else {
            return Ok(Listing::default());
        };
        let dot = |number, ino, at| DirEntry {
            line: Line {
                name: Name::dots(number),
                kind: FileKind::Directory,
                ino,
                place: usize::MAX,
                whiteout: false,
            },
            at,
        };
        let lines = self.lines_of(&places)?;
        let mut entries = Vec::with_capacity(lines.len() + 2);
        entries.push(dot(1, inode.ino(), Position::DOT));
        entries.push(dot(2, inode.parent_ino(), Position::DOT_DOT));
        entries.extend(lines.into_iter().map(|line| DirEntry {
            line,
            at: Position::DOT,
        }));
        let names = entries.get_mut(2..).unwrap_or_default();
        self.overlay.cookies.arrange(inode.ino(), names);
        Ok(Listing {
            entries,
            places: Some(places),
        })
    }

    /// The number that an entry shows. Asked for only where it is told: a listing with attributes has it
    /// from those.
    pub fn entry_number(&self, listing: &Listing, entry: &DirEntry) -> Result<u64> {
        match &listing.places {
            Some(places) if !entry.is_dots() => {
                let number = self.cx.stack.view().line_number(places, &entry.line)?;
                Ok(self.known_number(entry.kind(), number))
            }
            _ => Ok(entry.line.ino),
        }
    }

    /// What can't carry the mark of its number shows the one from before its copy-up, for as long as the
    /// mount lives: its place in the upper, where the listing finds another, is its identity.
    fn known_number(&self, kind: FileKind, listed: u64) -> u64 {
        if matches!(kind, FileKind::Regular | FileKind::Directory) {
            return listed;
        }
        let known = self.cx.stack.writable().and_then(|upper| {
            let dev = upper.layer.dev();
            self.overlay
                .inodes
                .substitute(Identity { dev, ino: listed })
        });
        known.unwrap_or(listed)
    }

    /// The target of a symbolic link.
    pub fn read_link(&self, inode: &Inode) -> Result<Vec<u8>> {
        if inode.kind() != FileKind::Symlink {
            return Err(Error::Errno(Errno::INVAL));
        }
        cowl_layers::sys::dir::readlink_fd(&*reach::access_path(inode)?)
    }
}
