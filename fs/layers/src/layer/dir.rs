//! Directories inside one layer: reached from the parent by name, so that no path is ever too long and a rename of
//! a directory above needs no change below.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use parking_lot::{RwLock, RwLockWriteGuard};

use super::{Layer, descriptors};
use crate::error::{Errno, Error, Result};
use crate::name::Name;
use crate::shown::Show as _;
use crate::sys;

/// The largest depth of a directory whose parent is opened through `..`, if there are enough descriptors to do
/// without.
const UP_AT_MOST: u32 = 256;

/// The access for which a directory is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// To find names in it.
    Find,
    /// To read it.
    Read,
}

/// The kind of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opened {
    /// It may be O_PATH, or have been read before.
    ToFind,
    /// It is readable, and was opened just now.
    ToRead,
}

/// A directory inside one layer.
pub struct LayerDir {
    layer: Arc<Layer>,
    key: u64,
    ino: u64,
    /// The number of directories above it when it was found.
    depth: u32,
    place: RwLock<Place>,
}

#[derive(Clone)]
enum Place {
    Root,
    Child {
        parent: Arc<LayerDir>,
        name: Name,
    },
    /// It was removed while it is still referenced.
    Gone(Arc<OwnedFd>),
}

impl LayerDir {
    pub(super) fn root(layer: Arc<Layer>) -> Arc<Self> {
        let ino = layer.ino;
        Arc::new(Self {
            layer,
            key: descriptors::new_key(),
            ino,
            depth: 0,
            place: RwLock::new(Place::Root),
        })
    }

    /// Returns the directory `name` in `parent`; `ino` is its inode number, by which it is recognized.
    pub fn child(parent: &Arc<Self>, name: Name, ino: u64) -> Arc<Self> {
        Arc::new(Self {
            layer: parent.layer.clone(),
            key: descriptors::new_key(),
            ino,
            depth: parent.depth.saturating_add(1),
            place: RwLock::new(Place::Child {
                parent: parent.clone(),
                name,
            }),
        })
    }

    /// Returns the layer.
    pub fn layer(&self) -> &Arc<Layer> {
        &self.layer
    }

    /// Returns a number of this location alone, for as long as the process lives.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// Its inode number on disk.
    pub fn ino(&self) -> u64 {
        self.ino
    }

    /// A descriptor of the folder, to find names in it with; O_PATH or more.
    pub fn fd(&self) -> Result<Arc<OwnedFd>> {
        Ok(self.opened(Access::Find)?.0)
    }

    /// A descriptor that the folder can be read with, once and from its beginning.
    pub(super) fn readable(&self) -> Result<Arc<OwnedFd>> {
        match self.opened(Access::Read)? {
            (fd, Opened::ToRead) => Ok(fd),
            (fd, Opened::ToFind) => Ok(Arc::new(sys::dir::reopen_dir(fd.as_fd())?)),
        }
    }

    /// Returns a descriptor. A readable one is kept for finding names as well: a second open costs as much as
    /// a lookup.
    fn opened(&self, access: Access) -> Result<(Arc<OwnedFd>, Opened)> {
        // A rename of a folder on the way may come between reading its name and opening it: then
        // the name is gone or leads to another inode, and the way is read anew.
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
            return Ok((fd, Opened::ToFind));
        }
        let (parent, name) = match self.place.read().clone() {
            Place::Root => return Ok((self.layer.root.clone(), Opened::ToFind)),
            Place::Gone(fd) => return Ok((fd, Opened::ToFind)),
            Place::Child { parent, name } => (parent, name),
        };
        // Upwards to the nearest open folder, then down again, without recursion: trees are deep.
        let mut way: Vec<(u64, u64, Name)> = vec![(self.key, self.ino, name)];
        let mut above = parent;
        let mut fd = loop {
            if let Some(fd) = descriptors::get(above.key) {
                break fd;
            }
            let place = above.place.read().clone();
            match place {
                Place::Root => break above.layer.root.clone(),
                Place::Gone(fd) => break fd,
                Place::Child { parent, name } => {
                    way.push((above.key, above.ino, name));
                    above = parent;
                }
            }
        };
        let spaced = descriptors::Spaced::over(way.len());
        let mut far = Vec::new();
        while let Some((key, ino, name)) = way.pop() {
            let next = if access == Access::Read && way.is_empty() {
                sys::dir::open_dir_to_read(fd.as_fd(), &name)?
            } else {
                sys::dir::open_dir(fd.as_fd(), &name)?
            };
            if sys::stat::stat_fd(&next)?.ino != ino {
                return Err(Error::Errno(Errno::STALE));
            }
            fd = Arc::new(next);
            if spaced.keeps(way.len()) {
                descriptors::put(key, fd.clone());
                if spaced.is_far(way.len()) {
                    far.push(key);
                }
            }
        }
        // They are of use once those below them are not: not to be evicted before.
        for key in far {
            let _used = descriptors::get(key);
        }
        let opened = match access {
            Access::Find => Opened::ToFind,
            Access::Read => Opened::ToRead,
        };
        Ok((fd, opened))
    }

    /// Keeps the directory above open, through `..` of this one, where it was closed meanwhile.
    ///
    /// To be called by a walk that goes back up: a chain of directories that is deeper than there are
    /// descriptors would have to be opened from its beginning again. Nothing is lost where it fails.
    ///
    /// In a mount whose root is not its file system's, as a layer's own mount is, the kernel answers `..` by
    /// following the way up to that root (`path_connected`). Where that takes longer than opening the nearest
    /// part of the chain again, this does nothing.
    pub fn leave(&self) {
        if self.depth > UP_AT_MOST && descriptors::has_room() {
            return;
        }
        let Place::Child { parent, .. } = self.place.read().clone() else {
            return;
        };
        if matches!(*parent.place.read(), Place::Root | Place::Gone(_))
            || descriptors::is_open(parent.key)
        {
            return;
        }
        let Some(fd) = descriptors::get(self.key) else {
            return;
        };
        // Only ever the directory that is meant: this one may have been moved.
        if let Ok(above) = sys::dir::open_dir(fd.as_fd(), b"..")
            && sys::stat::stat_fd(&above).is_ok_and(|stat| stat.ino == parent.ino)
        {
            descriptors::put(parent.key, Arc::new(above));
        }
    }

    /// Where it lies, from the layer's root, without a leading slash; empty for the root.
    /// ESTALE when it was removed.
    pub fn path_in_layer(&self) -> Result<Vec<u8>> {
        let mut names = Vec::new();
        let mut place = self.place.read().clone();
        loop {
            place = match place {
                Place::Root => break,
                Place::Gone(_) => return Err(Error::Errno(Errno::STALE)),
                Place::Child { parent, name } => {
                    names.push(name);
                    parent.place.read().clone()
                }
            };
        }
        names.reverse();
        Ok(names.join(&b'/'))
    }

    /// Whether both are the same folder of the same layer.
    pub fn same_place(&self, other: &Self) -> bool {
        self.key == other.key || (self.layer.id() == other.layer.id() && self.ino == other.ino)
    }

    /// To be held while the folder is moved or removed on disk: who asks for its way meanwhile waits.
    pub fn moving(&self) -> Moving<'_> {
        Moving(self.place.write())
    }

    /// Told when the folder is removed while it is still known; `fd` keeps it.
    pub fn gone(&self, fd: Arc<OwnedFd>) {
        *self.place.write() = Place::Gone(fd);
    }
}

/// A folder whose place is just changing.
pub struct Moving<'a>(RwLockWriteGuard<'a, Place>);

impl Moving<'_> {
    /// It was moved.
    pub fn to(mut self, parent: &Arc<LayerDir>, name: Name) {
        *self.0 = Place::Child {
            parent: parent.clone(),
            name,
        };
    }

    /// It was removed; `fd` keeps it.
    pub fn gone(mut self, fd: Arc<OwnedFd>) {
        *self.0 = Place::Gone(fd);
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
        // A long chain of parents that all end here would drop recursively, one stack frame each.
        let mut place = std::mem::replace(self.place.get_mut(), Place::Root);
        while let Place::Child { parent, .. } = place {
            let Some(mut parent) = Arc::into_inner(parent) else {
                break;
            };
            place = std::mem::replace(parent.place.get_mut(), Place::Root);
        }
    }
}

impl fmt::Debug for LayerDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self
            .path_in_layer()
            .unwrap_or_else(|_| b"(removed)".to_vec());
        write!(f, "{}:{}", self.layer.path().shown(), path.escape_ascii())
    }
}
