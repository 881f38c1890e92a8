//! A writable tree below a directory, changed by system calls.

use std::cell::RefCell;
use std::os::fd::{AsFd as _, OwnedFd};

use cowl_layers::Result;
use cowl_layers::error::Errno;
use cowl_layers::sys::attr::{self, SetTime};
use cowl_layers::sys::node::RenameMode;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::sys::{copy, dir, node, stat, xattr};
use rustix::fs::OFlags;

use super::super::{
    attrs::Attrs,
    path::{split, split_first},
    position::TreePosition,
};
use super::{WritableTree, absent_is_none, unrequested};

/// A tree below a directory, for example a mount point.
pub(crate) struct DirTree {
    root: OwnedFd,
    /// The last position below [`LOOKUP_DEPTH`].
    position: RefCell<TreePosition>,
}

/// The depth up to which directories are looked up from the root each time, because programs in the tree may move them.
/// Deeper ones are looked up from the previous position.
const LOOKUP_DEPTH: usize = 32;

impl DirTree {
    /// Creates the tree below `root`.
    pub(crate) fn new(root: OwnedFd) -> Result<Self> {
        let copy = dir::reopen_dir(root.as_fd())?;
        Ok(Self {
            root,
            position: RefCell::new(TreePosition::new(copy)),
        })
    }

    /// Opens a directory with O_PATH.
    fn open(&self, path: &[u8]) -> Result<OwnedFd> {
        let mut at = dir::reopen_dir(self.root.as_fd())?;
        let mut rest = path;
        for depth in 1..=LOOKUP_DEPTH {
            let (part, more) = split_first(rest);
            if part.is_empty() {
                return Ok(at);
            }
            at = dir::open_dir(at.as_fd(), part)?;
            self.refuse_mount(&at)?;
            rest = more;
            if depth == LOOKUP_DEPTH && !split_first(rest).0.is_empty() {
                return self.open_deep(at, path);
            }
        }
        Ok(at)
    }

    /// Opens a directory deeper than [`LOOKUP_DEPTH`]; `near` is its ancestor at that depth.
    fn open_deep(&self, near: OwnedFd, path: &[u8]) -> Result<OwnedFd> {
        let stat = stat::stat_fd(&near)?;
        let mut position = self.position.try_borrow_mut().map_err(|_| Errno::BUSY)?;
        let is_current = position.ascend_towards(path).is_ok()
            && position.id_at(LOOKUP_DEPTH) == Some((stat.dev, stat.ino));
        if !is_current {
            *position = TreePosition::new(dir::reopen_dir(self.root.as_fd())?);
        }
        let mut rest = position.ascend_towards(path)?;
        loop {
            let (part, more) = split_first(rest);
            if part.is_empty() {
                break;
            }
            let next = dir::open_dir(position.here(), part)?;
            self.refuse_mount(&next)?;
            position.push(part, next)?;
            rest = more;
        }
        dir::open_path(position.here(), b".")
    }

    /// Closes a directory that is about to be moved or removed.
    fn forget(&self, path: &[u8]) -> Result<()> {
        let mut position = self.position.try_borrow_mut().map_err(|_| Errno::BUSY)?;
        if position.forget(path).is_err() {
            *position = TreePosition::new(dir::reopen_dir(self.root.as_fd())?);
        }
        Ok(())
    }

    /// Refuses a mount below the root, which is not part of the tree.
    fn refuse_mount(&self, fd: &OwnedFd) -> Result<()> {
        match stat::stat_fd(fd)?.dev == stat::stat_fd(&self.root)?.dev {
            true => Ok(()),
            false => Err(Errno::XDEV.into()),
        }
    }

    /// Opens the parent directory of a path, and returns it with the last name.
    fn open_parent<'p>(&self, path: &'p [u8]) -> Result<(OwnedFd, &'p [u8])> {
        let (parent, name) = split(path);
        Ok((self.open(parent)?, name))
    }

    /// Opens an object of any type with O_PATH.
    fn open_object(&self, path: &[u8]) -> Result<OwnedFd> {
        if path.is_empty() {
            return self.open(path);
        }
        let (parent, name) = self.open_parent(path)?;
        let found = dir::open_path(parent.as_fd(), name)?;
        self.refuse_mount(&found)?;
        Ok(found)
    }
}

impl WritableTree for DirTree {
    fn stat(&self, path: &[u8]) -> Result<Option<Stat>> {
        absent_is_none(self.open_object(path).and_then(|fd| stat::stat_fd(&fd)))
    }

    fn list(&self, path: &[u8]) -> Result<Vec<Vec<u8>>> {
        let entries = dir::entries(self.open(path)?.as_fd())?;
        Ok(entries.into_iter().map(|e| e.name.to_vec()).collect())
    }

    fn mkdir(&self, path: &[u8]) -> Result<()> {
        let (parent, name) = self.open_parent(path)?;
        node::mkdir(parent.as_fd(), name, 0o700)
    }

    fn create_file(&self, path: &[u8], content: Option<(OwnedFd, u64)>) -> Result<()> {
        let (parent, name) = self.open_parent(path)?;
        let to = node::create(parent.as_fd(), name, 0o600, OFlags::RDWR)?;
        match content {
            Some((from, size)) => copy::copy_data(from.as_fd(), to.as_fd(), size).map(drop),
            None => Ok(()),
        }
    }

    fn symlink(&self, path: &[u8], to: &[u8]) -> Result<()> {
        let (parent, name) = self.open_parent(path)?;
        node::symlink(parent.as_fd(), name, to)
    }

    fn mknod(&self, path: &[u8], kind: FileKind, rdev: u64) -> Result<()> {
        let (parent, name) = self.open_parent(path)?;
        node::mknod(parent.as_fd(), name, kind, 0o600, rdev)
    }

    fn link(&self, path: &[u8], new: &[u8]) -> Result<()> {
        let ((from, old), (to, new)) = (self.open_parent(path)?, self.open_parent(new)?);
        node::link(from.as_fd(), old, to.as_fd(), new)
    }

    fn set_attrs(&self, path: &[u8], kind: FileKind, attrs: &Attrs) -> Result<()> {
        let fd = self.open_object(path)?;
        let fd = fd.as_fd();
        attr::chown(fd, Some(attrs.uid), Some(attrs.gid))?;
        let present = xattr::list(fd)?;
        for name in unrequested(present.iter().map(AsRef::as_ref), attrs) {
            xattr::remove(fd, name)?;
        }
        for (name, value) in &attrs.xattrs {
            xattr::set(fd, name, value)?;
        }
        if kind != FileKind::Symlink {
            attr::chmod(fd, attrs.perm)?;
        }
        attr::utimens(fd, attrs.atime, attrs.mtime)
    }

    fn set_times(&self, path: &[u8], atime: SetTime, mtime: SetTime) -> Result<()> {
        attr::utimens(self.open_object(path)?.as_fd(), atime, mtime)
    }

    fn rename(&self, from: &[u8], to: &[u8], mode: RenameMode) -> Result<()> {
        self.forget(from)?;
        self.forget(to)?;
        let ((old, from), (new, to)) = (self.open_parent(from)?, self.open_parent(to)?);
        node::rename(old.as_fd(), from, new.as_fd(), to, mode)
    }

    fn unlink(&self, path: &[u8]) -> Result<()> {
        let (parent, name) = self.open_parent(path)?;
        node::unlink(parent.as_fd(), name)
    }

    fn rmdir(&self, path: &[u8]) -> Result<()> {
        self.forget(path)?;
        let (parent, name) = self.open_parent(path)?;
        node::rmdir(parent.as_fd(), name)
    }
}
