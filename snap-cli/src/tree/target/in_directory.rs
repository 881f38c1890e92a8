//! Changing a tree through system calls below one directory.

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
    position::Position,
};
use super::{Target, absent_is_none, others};

/// A tree below a directory, for example a mount point.
pub(crate) struct InDirectory {
    root: OwnedFd,
    way: RefCell<Position>,
}

/// The depth up to which directories are looked up from the root each time, because programs in the tree may move them.
/// Deeper ones are looked up from the previous position.
const ANEW: usize = 32;

impl InDirectory {
    pub(crate) fn new(root: OwnedFd) -> Result<Self> {
        let again = dir::reopen_dir(root.as_fd())?;
        Ok(Self {
            root,
            way: RefCell::new(Position::new(again)),
        })
    }

    fn open(&self, path: &[u8]) -> Result<OwnedFd> {
        let mut at = dir::reopen_dir(self.root.as_fd())?;
        let mut rest = path;
        for depth in 1..=ANEW {
            let (part, more) = split_first(rest);
            if part.is_empty() {
                return Ok(at);
            }
            at = dir::open_dir(at.as_fd(), part)?;
            self.refuse_mount(&at)?;
            rest = more;
            if depth == ANEW && !split_first(rest).0.is_empty() {
                return self.open_deep(at, path);
            }
        }
        Ok(at)
    }

    /// Opens a directory deeper than [`ANEW`]; `near` is its ancestor at that depth.
    fn open_deep(&self, near: OwnedFd, path: &[u8]) -> Result<OwnedFd> {
        let stat = stat::stat_fd(&near)?;
        let mut way = self.way.try_borrow_mut().map_err(|_| Errno::BUSY)?;
        let known = way.towards(path).is_ok() && way.id_at(ANEW) == Some((stat.dev, stat.ino));
        if !known {
            *way = Position::new(dir::reopen_dir(self.root.as_fd())?);
        }
        let mut rest = way.towards(path)?;
        loop {
            let (part, more) = split_first(rest);
            if part.is_empty() {
                break;
            }
            let next = dir::open_dir(way.here(), part)?;
            self.refuse_mount(&next)?;
            way.push(part, next)?;
            rest = more;
        }
        dir::open_path(way.here(), b".")
    }

    /// Forgets a directory that is about to be moved or removed.
    fn forget(&self, path: &[u8]) -> Result<()> {
        let mut way = self.way.try_borrow_mut().map_err(|_| Errno::BUSY)?;
        if way.forget(path).is_err() {
            *way = Position::new(dir::reopen_dir(self.root.as_fd())?);
        }
        Ok(())
    }

    /// Refuses what is mounted inside: it is not part of the tree.
    fn refuse_mount(&self, fd: &OwnedFd) -> Result<()> {
        match stat::stat_fd(fd)?.dev == stat::stat_fd(&self.root)?.dev {
            true => Ok(()),
            false => Err(Errno::XDEV.into()),
        }
    }

    fn parent<'p>(&self, path: &'p [u8]) -> Result<(OwnedFd, &'p [u8])> {
        let (parent, name) = split(path);
        Ok((self.open(parent)?, name))
    }

    /// Opens any object with O_PATH.
    fn any(&self, path: &[u8]) -> Result<OwnedFd> {
        if path.is_empty() {
            return self.open(path);
        }
        let (parent, name) = self.parent(path)?;
        let found = dir::open_path(parent.as_fd(), name)?;
        self.refuse_mount(&found)?;
        Ok(found)
    }
}

impl Target for InDirectory {
    fn stat(&self, path: &[u8]) -> Result<Option<Stat>> {
        absent_is_none(self.any(path).and_then(|fd| stat::stat_fd(&fd)))
    }

    fn names(&self, path: &[u8]) -> Result<Vec<Vec<u8>>> {
        let entries = dir::entries(self.open(path)?.as_fd())?;
        Ok(entries.into_iter().map(|e| e.name.to_vec()).collect())
    }

    fn mkdir(&self, path: &[u8]) -> Result<()> {
        let (parent, name) = self.parent(path)?;
        node::mkdir(parent.as_fd(), name, 0o700)
    }

    fn file(&self, path: &[u8], content: Option<(OwnedFd, u64)>) -> Result<()> {
        let (parent, name) = self.parent(path)?;
        let to = node::create(parent.as_fd(), name, 0o600, OFlags::RDWR)?;
        match content {
            Some((from, size)) => copy::copy_data(from.as_fd(), to.as_fd(), size).map(drop),
            None => Ok(()),
        }
    }

    fn symlink(&self, path: &[u8], to: &[u8]) -> Result<()> {
        let (parent, name) = self.parent(path)?;
        node::symlink(parent.as_fd(), name, to)
    }

    fn node(&self, path: &[u8], kind: FileKind, rdev: u64) -> Result<()> {
        let (parent, name) = self.parent(path)?;
        node::mknod(parent.as_fd(), name, kind, 0o600, rdev)
    }

    fn link(&self, path: &[u8], new: &[u8]) -> Result<()> {
        let ((from, old), (to, new)) = (self.parent(path)?, self.parent(new)?);
        node::link(from.as_fd(), old, to.as_fd(), new)
    }

    fn attrs(&self, path: &[u8], kind: FileKind, attrs: &Attrs) -> Result<()> {
        let fd = self.any(path)?;
        let fd = fd.as_fd();
        attr::chown(fd, Some(attrs.uid), Some(attrs.gid))?;
        let there = xattr::list(fd)?;
        for name in others(there.iter().map(AsRef::as_ref), attrs) {
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

    fn times(&self, path: &[u8], atime: SetTime, mtime: SetTime) -> Result<()> {
        attr::utimens(self.any(path)?.as_fd(), atime, mtime)
    }

    fn rename(&self, from: &[u8], to: &[u8], how: RenameMode) -> Result<()> {
        self.forget(from)?;
        self.forget(to)?;
        let ((old, from), (new, to)) = (self.parent(from)?, self.parent(to)?);
        node::rename(old.as_fd(), from, new.as_fd(), to, how)
    }

    fn unlink(&self, path: &[u8]) -> Result<()> {
        let (parent, name) = self.parent(path)?;
        node::unlink(parent.as_fd(), name)
    }

    fn rmdir(&self, path: &[u8]) -> Result<()> {
        self.forget(path)?;
        let (parent, name) = self.parent(path)?;
        node::rmdir(parent.as_fd(), name)
    }
}
