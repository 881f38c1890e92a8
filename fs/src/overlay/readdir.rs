//! Open folders: a listing taken once, so that positions stay what they are while names come and go.

use std::sync::Arc;

use parking_lot::Mutex;

use super::Op;
use crate::error::{Errno, Error, Result};
use crate::inode::{Identity, Inode};
use crate::sys::stat::FileKind;
use crate::view::Listed;

/// One line of a listing.
#[derive(Clone, Debug)]
pub struct DirEntry {
    /// The name's bytes; `.` and `..` are among them.
    pub name: Box<[u8]>,
    /// Its type.
    pub kind: FileKind,
    /// The number that it shows.
    pub ino: u64,
}

/// An open folder.
#[derive(Debug)]
pub struct DirHandle {
    inode: Arc<Inode>,
    listing: Mutex<Option<Arc<[DirEntry]>>>,
}

impl DirHandle {
    /// The folder.
    pub fn inode(&self) -> &Arc<Inode> {
        &self.inode
    }
}

impl Op<'_> {
    /// Opens a folder.
    pub fn open_dir(&self, inode: &Arc<Inode>) -> Result<DirHandle> {
        inode.dir()?;
        Ok(DirHandle {
            inode: inode.clone(),
            listing: Mutex::new(None),
        })
    }

    /// The listing, to be read on from `offset`. It is taken when it is read from its beginning, so
    /// that rewinddir(3) shows what has come since.
    pub fn entries(&self, handle: &DirHandle, offset: u64) -> Result<Arc<[DirEntry]>> {
        let mut listing = handle.listing.lock();
        if let Some(known) = listing.as_ref()
            && offset > 0
        {
            return Ok(known.clone());
        }
        let fresh = self.take_listing(&handle.inode)?;
        *listing = Some(fresh.clone());
        Ok(fresh)
    }

    fn take_listing(&self, inode: &Arc<Inode>) -> Result<Arc<[DirEntry]>> {
        let dir = inode.dir()?;
        if dir.removed {
            return Ok(Arc::from([]));
        }
        let above = dir.alias.as_ref().map_or(inode.ino(), |a| a.parent.ino());
        let dot = |name: &[u8], ino| DirEntry {
            name: name.into(),
            kind: FileKind::Directory,
            ino,
        };
        let mut entries = vec![dot(b".", inode.ino()), dot(b"..", above)];
        let listed = self.names_in(&dir)?;
        entries.extend(listed.into_iter().map(
            |Listed {
                 name, kind, ino, ..
             }| DirEntry {
                name: name.as_bytes().into(),
                kind,
                ino: self.known_number(kind, ino),
            },
        ));
        Ok(entries.into())
    }

    /// What can't carry the mark of its number shows the one from before its copy-up, for as long as the
    /// mount lives: its place in the upper, where the listing finds another, is its identity.
    fn known_number(&self, kind: FileKind, listed: u64) -> u64 {
        if matches!(kind, FileKind::Regular | FileKind::Directory) {
            return listed;
        }
        let known = self.stack.upper.as_ref().and_then(|upper| {
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
        crate::sys::dir::readlink_fd(&*self.target(inode)?)
    }
}
