//! Directories of one layer.
//!
//! A directory refers to its parent and its name there, not to a path. So no path exceeds PATH_MAX, and a rename of a
//! directory needs no update of those below it.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::locks::{RwLock, RwLockWriteGuard};

use super::{Layer, descriptors};
use crate::error::{Errno, Error, Result};
use crate::name::Name;
use crate::shown::Show as _;
use crate::sys;

/// The depth down to which a parent is reopened through `..` even if the descriptor cache is large.
const MAX_UP_DEPTH: u32 = 256;

/// The access for which a directory is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// To look up names in it.
    Lookup,
    /// To read it.
    Read,
}

/// The kind of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opened {
    /// It may be O_PATH, and its offset may not be 0.
    ForLookup,
    /// It is readable, and was just opened, so its offset is 0.
    ForRead,
}

/// A directory inside one layer.
pub struct LayerDir {
    layer: Arc<Layer>,
    key: u64,
    ino: u64,
    /// The number of its ancestors at the time of the lookup.
    depth: u32,
    /// Whether a listing has shown that it contains no foreign markers.
    lacks_markers: AtomicBool,
    location: RwLock<DirLocation>,
}

#[derive(Clone)]
enum DirLocation {
    Root,
    Child {
        parent: Arc<LayerDir>,
        name: Name,
    },
    /// Unlinked while still referenced.
    Removed(Arc<OwnedFd>),
}

impl LayerDir {
    pub(super) fn root(layer: Arc<Layer>) -> Arc<Self> {
        let ino = layer.ino;
        Arc::new(Self {
            layer,
            key: descriptors::new_key(),
            ino,
            depth: 0,
            lacks_markers: AtomicBool::new(false),
            location: RwLock::new(DirLocation::Root),
        })
    }

    /// Refers to the directory `name` in `parent`, without opening it.
    ///
    /// When it is opened, its inode number is compared with `ino`, to detect a rename or removal.
    pub fn child(parent: &Arc<Self>, name: Name, ino: u64) -> Arc<Self> {
        Arc::new(Self {
            layer: parent.layer.clone(),
            key: descriptors::new_key(),
            ino,
            depth: parent.depth.saturating_add(1),
            lacks_markers: AtomicBool::new(false),
            location: RwLock::new(DirLocation::Child {
                parent: parent.clone(),
                name,
            }),
        })
    }

    /// Returns the layer of the directory.
    pub fn layer(&self) -> &Arc<Layer> {
        &self.layer
    }

    /// Returns a number that identifies this object and is never reused by the process.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// Whether the directory may contain names that are markers of fuse-overlayfs or of a container image layer.
    pub fn may_have_foreign_markers(&self) -> bool {
        self.layer.is_foreign() && !self.lacks_markers.load(Ordering::Relaxed)
    }

    /// Records that the directory is new or was listed, and contains no foreign markers.
    ///
    /// It will contain none later: a lower layer does not change, and in the upper one such names are refused.
    pub fn note_no_foreign_markers(&self) {
        self.lacks_markers.store(true, Ordering::Relaxed);
    }

    /// Returns the inode number on disk.
    pub fn ino(&self) -> u64 {
        self.ino
    }

    /// Returns a descriptor for `*at` calls, O_PATH or readable.
    pub fn fd(&self) -> Result<Arc<OwnedFd>> {
        Ok(self.opened(Access::Lookup)?.0)
    }

    /// Returns a descriptor for one pass of getdents64(2) from the start of the directory.
    pub(super) fn readable(&self) -> Result<Arc<OwnedFd>> {
        match self.opened(Access::Read)? {
            (fd, Opened::ForRead) => Ok(fd),
            (fd, Opened::ForLookup) => Ok(Arc::new(sys::dir::reopen_dir(fd.as_fd())?)),
        }
    }

    /// Returns a descriptor, and its kind.
    ///
    /// A readable descriptor is cached for lookups as well, because a second open costs as much as a lookup.
    fn opened(&self, access: Access) -> Result<(Arc<OwnedFd>, Opened)> {
        // Retry after a race with a rename of a directory in the chain: if it happens between the read of the
        // directory's name and its open, the name is absent or refers to another inode.
        let mut last = Error::NOT_FOUND;
        for _ in 0..8 {
            match self.open_chain(access) {
                Err(error) if error.is_absent() || error.errno() == Errno::STALE => last = error,
                other => return other,
            }
        }
        Err(last)
    }

    fn open_chain(&self, access: Access) -> Result<(Arc<OwnedFd>, Opened)> {
        if let Some(fd) = descriptors::get(self.key) {
            return Ok((fd, Opened::ForLookup));
        }
        let (parent, name) = match self.location.read().clone() {
            DirLocation::Root => return Ok((self.layer.root.clone(), Opened::ForLookup)),
            DirLocation::Removed(fd) => return Ok((fd, Opened::ForLookup)),
            DirLocation::Child { parent, name } => (parent, name),
        };
        // Go up to the nearest open directory, then open those below it. Recursion would overflow the stack in a
        // deep tree.
        let mut chain: Vec<(u64, u64, Name)> = vec![(self.key, self.ino, name)];
        let mut above = parent;
        let mut fd = loop {
            if let Some(fd) = descriptors::get(above.key) {
                break fd;
            }
            let location = above.location.read().clone();
            match location {
                DirLocation::Root => break above.layer.root.clone(),
                DirLocation::Removed(fd) => break fd,
                DirLocation::Child { parent, name } => {
                    chain.push((above.key, above.ino, name));
                    above = parent;
                }
            }
        };
        let spaced = descriptors::Spaced::over(chain.len());
        let mut far = Vec::new();
        while let Some((key, ino, name)) = chain.pop() {
            let next = if access == Access::Read && chain.is_empty() {
                sys::dir::open_dir_to_read(fd.as_fd(), &name)?
            } else {
                sys::dir::open_dir(fd.as_fd(), &name)?
            };
            if sys::stat::stat_fd(&next)?.ino != ino {
                return Err(Error::Errno(Errno::STALE));
            }
            fd = Arc::new(next);
            if spaced.keeps(chain.len()) {
                descriptors::put(key, fd.clone());
                if spaced.is_far(chain.len()) {
                    far.push(key);
                }
            }
        }
        // Mark the far ones as the most recently used, so that the deeper ones are evicted first: the far ones are
        // needed only when those below them are no longer cached.
        for key in far {
            let _used = descriptors::get(key);
        }
        let opened = match access {
            Access::Lookup => Opened::ForLookup,
            Access::Read => Opened::ForRead,
        };
        Ok((fd, opened))
    }

    /// Reopens the parent directory through `..` and caches it, if its descriptor was evicted.
    ///
    /// A tree walk calls this when it leaves a directory. Otherwise, in a tree whose depth exceeds the cache's
    /// capacity, the chain would be reopened from its root. Failures are ignored, because this is only an optimization.
    ///
    /// If a mount's root is not the root of its file system, as in the private mount of a layer, the kernel resolves
    /// `..` by walking up to the mount's root (`path_connected`), in time proportional to the depth. For directories
    /// where that takes longer than reopening the nearest part of the chain, this does nothing.
    pub fn leave(&self) {
        if self.depth > MAX_UP_DEPTH && descriptors::has_room() {
            return;
        }
        let DirLocation::Child { parent, .. } = self.location.read().clone() else {
            return;
        };
        if matches!(
            *parent.location.read(),
            DirLocation::Root | DirLocation::Removed(_)
        ) || descriptors::is_open(parent.key)
        {
            return;
        }
        let Some(fd) = descriptors::get(self.key) else {
            return;
        };
        // After a concurrent move, `..` may differ from `parent`.
        if let Ok(above) = sys::dir::open_dir(fd.as_fd(), b"..")
            && sys::stat::stat_fd(&above).is_ok_and(|stat| stat.ino == parent.ino)
        {
            descriptors::put(parent.key, Arc::new(above));
        }
    }

    /// Returns the path relative to the layer's root, without a leading slash; empty for the root.
    ///
    /// Fails with ESTALE if the directory or one above it was removed.
    pub fn path_in_layer(&self) -> Result<Vec<u8>> {
        let mut names = Vec::new();
        let mut location = self.location.read().clone();
        loop {
            location = match location {
                DirLocation::Root => break,
                DirLocation::Removed(_) => return Err(Error::Errno(Errno::STALE)),
                DirLocation::Child { parent, name } => {
                    names.push(name);
                    parent.location.read().clone()
                }
            };
        }
        names.reverse();
        Ok(names.join(&b'/'))
    }

    /// Returns the descriptor of a directory that was removed ([`Self::set_removed`]); `None` for any other.
    pub fn removed_fd(&self) -> Option<Arc<OwnedFd>> {
        match &*self.location.read() {
            DirLocation::Removed(fd) => Some(fd.clone()),
            DirLocation::Root | DirLocation::Child { .. } => None,
        }
    }

    /// Whether both refer to the same directory of the same layer.
    pub fn is_same_location(&self, other: &Self) -> bool {
        self.key == other.key || (self.layer.id() == other.layer.id() && self.ino == other.ino)
    }

    /// Locks the directory's location. The caller holds the lock while it moves or removes the directory on disk.
    ///
    /// Other threads that read the location block until the lock is released, so that they see neither the old
    /// location after the move nor the new one before it.
    pub fn moving(&self) -> Moving<'_> {
        Moving(self.location.write())
    }

    /// Records that the directory was removed. Later operations on it use the descriptor `fd`.
    pub fn set_removed(&self, fd: Arc<OwnedFd>) {
        *self.location.write() = DirLocation::Removed(fd);
    }
}

/// The locked location of a directory that is being moved or removed.
pub struct Moving<'a>(RwLockWriteGuard<'a, DirLocation>);

impl Moving<'_> {
    /// Records the new location.
    pub fn to(mut self, parent: &Arc<LayerDir>, name: Name) {
        *self.0 = DirLocation::Child {
            parent: parent.clone(),
            name,
        };
    }

    /// Records that the directory was removed. Later operations on it use the descriptor `fd`.
    pub fn set_removed(mut self, fd: Arc<OwnedFd>) {
        *self.0 = DirLocation::Removed(fd);
    }
}

impl fmt::Debug for Moving<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Moving")
    }
}

impl Drop for LayerDir {
    fn drop(&mut self) {
        descriptors::forget(self.key);
        // If this drops the last reference to a long chain of parents, each would be dropped recursively, which
        // overflows the stack.
        let mut location = std::mem::replace(self.location.get_mut(), DirLocation::Root);
        while let DirLocation::Child { parent, .. } = location {
            let Some(mut parent) = Arc::into_inner(parent) else {
                break;
            };
            location = std::mem::replace(parent.location.get_mut(), DirLocation::Root);
        }
    }
}

impl fmt::Display for LayerDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layer = self.layer.path().shown();
        match self.path_in_layer() {
            Ok(path) => write!(f, "{layer}:{}", path.shown()),
            Err(_) => write!(f, "{layer}:(removed)"),
        }
    }
}

impl fmt::Debug for LayerDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
