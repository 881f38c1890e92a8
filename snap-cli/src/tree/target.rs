//! What a tree is changed through: a mount, so that programs inside see it, or the file system in process.
//! Paths are relative and lead through no symbolic link.

use std::cell::RefCell;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use cowl_layers::Result;
use cowl_layers::error::Errno;
use cowl_layers::name::Name;
use cowl_layers::sys::attr::{self, SetTime};
use cowl_layers::sys::node::RenameHow;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::sys::{copy, dir, node, stat, xattr};
use cowl_overlay::inode::Inode;
use cowl_overlay::{Caller, Op, OpenHow, Overlay, RenameFlags, SetAttr, Writer};
use rustix::fs::OFlags;

use super::attrs::Attrs;
use super::content::Blocks;
use super::path::{common, split};
use super::position::Position;

/// A tree that can be changed.
pub(crate) trait Target {
    /// What lies at a path; `None` where nothing does.
    fn look(&self, path: &[u8]) -> Result<Option<Stat>>;
    /// What is in a folder.
    fn names(&self, path: &[u8]) -> Result<Vec<Vec<u8>>>;
    /// Makes a folder that only its maker may enter.
    fn mkdir(&self, path: &[u8]) -> Result<()>;
    /// Makes a regular file with this content.
    fn file(&self, path: &[u8], content: Option<(OwnedFd, u64)>) -> Result<()>;
    /// Makes a symbolic link.
    fn symlink(&self, path: &[u8], to: &[u8]) -> Result<()>;
    /// Makes a device, fifo or socket.
    fn node(&self, path: &[u8], kind: FileKind, rdev: u64) -> Result<()>;
    /// Gives a file one more name.
    fn link(&self, path: &[u8], new: &[u8]) -> Result<()>;
    /// Gives what lies there these attributes and no others.
    fn attrs(&self, path: &[u8], kind: FileKind, attrs: &Attrs) -> Result<()>;
    /// Sets the times alone.
    fn times(&self, path: &[u8], atime: SetTime, mtime: SetTime) -> Result<()>;
    /// Renames.
    fn rename(&self, from: &[u8], to: &[u8], how: RenameHow) -> Result<()>;
    /// Removes a name that is no folder's.
    fn unlink(&self, path: &[u8]) -> Result<()>;
    /// Removes an empty folder.
    fn rmdir(&self, path: &[u8]) -> Result<()>;
}

fn absent_is_none<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.is_absent() || error.errno() == Errno::LOOP => Ok(None),
        Err(error) => Err(error),
    }
}

/// The first name of a path, and the rest.
fn first(path: &[u8]) -> (&[u8], &[u8]) {
    let path = path.strip_prefix(b"/").unwrap_or(path);
    match path.iter().position(|&byte| byte == b'/') {
        Some(at) => path.split_at(at),
        None => (path, b""),
    }
}

/// A folder, a mount point for one.
pub(crate) struct Folder {
    root: OwnedFd,
    way: RefCell<Position>,
}

/// So many directories from the root on are looked for anew each time, for programs in the tree may move them;
/// what lies deeper is looked for from the last place on.
const ANEW: usize = 32;

impl Folder {
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
            let (part, more) = first(rest);
            if part.is_empty() {
                return Ok(at);
            }
            at = dir::open_dir(at.as_fd(), part)?;
            self.is_here(&at)?;
            rest = more;
            if depth == ANEW && !first(rest).0.is_empty() {
                return self.open_deep(at, path);
            }
        }
        Ok(at)
    }

    /// Opens a directory that lies deep; `near` is the one on the way to it that was opened anew.
    fn open_deep(&self, near: OwnedFd, path: &[u8]) -> Result<OwnedFd> {
        let stat = stat::stat_fd(&near)?;
        let mut way = self.way.try_borrow_mut().map_err(|_| Errno::BUSY)?;
        let known = way.towards(path).is_ok() && way.id_at(ANEW) == Some((stat.dev, stat.ino));
        if !known {
            *way = Position::new(dir::reopen_dir(self.root.as_fd())?);
        }
        let mut rest = way.towards(path)?;
        loop {
            let (part, more) = first(rest);
            if part.is_empty() {
                break;
            }
            let next = dir::open_dir(way.here(), part)?;
            self.is_here(&next)?;
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

    /// What is mounted inside is no part of it: nothing there is looked at, changed or removed.
    fn is_here(&self, fd: &OwnedFd) -> Result<()> {
        match stat::stat_fd(fd)?.dev == stat::stat_fd(&self.root)?.dev {
            true => Ok(()),
            false => Err(Errno::XDEV.into()),
        }
    }

    fn parent<'p>(&self, path: &'p [u8]) -> Result<(OwnedFd, &'p [u8])> {
        let (parent, name) = split(path);
        Ok((self.open(parent)?, name))
    }

    /// Anything, by a descriptor that reads nothing.
    fn any(&self, path: &[u8]) -> Result<OwnedFd> {
        if path.is_empty() {
            return self.open(path);
        }
        let (parent, name) = self.parent(path)?;
        let found = dir::open_path(parent.as_fd(), name)?;
        self.is_here(&found)?;
        Ok(found)
    }
}

impl Target for Folder {
    fn look(&self, path: &[u8]) -> Result<Option<Stat>> {
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

    fn rename(&self, from: &[u8], to: &[u8], how: RenameHow) -> Result<()> {
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

/// The attributes that are there and should not be (an ACL that a new object has from its folder).
fn others<'n>(there: impl Iterator<Item = &'n [u8]>, attrs: &Attrs) -> Vec<&'n [u8]> {
    there
        .filter(|name| attrs.xattrs.iter().all(|(wanted, _)| wanted != name))
        .collect()
}

/// The file system in process, over layers that nobody has mounted.
pub(crate) struct InProcess {
    overlay: Overlay,
    caller: Caller,
    way: RefCell<Known>,
}

/// The way to the directory that was last found.
#[derive(Default)]
struct Known {
    path: Vec<u8>,
    /// Each directory with where its name ends in the path.
    way: Vec<(usize, Arc<Inode>)>,
}

impl Known {
    /// Goes back to what it has in common with a path.
    fn back(&mut self, path: &[u8]) {
        let same = common(&self.path, path);
        let ends_here = |end: usize| path.get(end).is_none_or(|&byte| byte == b'/');
        while let Some((end, inode)) = self.way.last()
            && (*end > same || !ends_here(*end))
        {
            inode.leave();
            self.way.pop();
        }
        let end = self.way.last().map_or(0, |(end, _)| *end);
        self.path.truncate(end);
    }

    /// Forgets a directory that is about to be moved or removed.
    fn forget(&mut self, path: &[u8]) {
        self.back(path);
        if self.path == path {
            self.back(split(path).0);
        }
    }
}

impl InProcess {
    pub(crate) fn new(overlay: Overlay) -> Self {
        let caller = Caller {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            umask: 0,
            pid: std::process::id(),
        };
        Self {
            overlay,
            caller,
            way: RefCell::default(),
        }
    }

    /// Finds an object by its path, from the way to the last one on. Nobody else changes these layers.
    fn find(&self, op: &Op<'_>, path: &[u8]) -> Result<Arc<Inode>> {
        let mut known = self.way.try_borrow_mut().map_err(|_| Errno::BUSY)?;
        known.back(path);
        let above = known.way.last().map(|(_, inode)| inode.clone());
        let mut inode = above.unwrap_or_else(|| self.overlay.root().clone());
        let mut rest = path.get(known.path.len()..).unwrap_or_default();
        loop {
            let (part, more) = first(rest);
            if part.is_empty() {
                return Ok(inode);
            }
            inode = op
                .lookup(&inode, &Name::new(part)?)?
                .ok_or(cowl_layers::Error::NOT_FOUND)?;
            rest = more;
            if inode.is_dir() {
                let end = path.len() - rest.len();
                let more = path.get(known.path.len()..end).unwrap_or_default();
                known.path.extend_from_slice(more);
                known.way.push((end, inode.clone()));
            }
        }
    }

    fn forget(&self, path: &[u8]) -> Result<()> {
        let mut known = self.way.try_borrow_mut().map_err(|_| Errno::BUSY)?;
        known.forget(path);
        Ok(())
    }

    fn write(&self, path: &[u8], content: Option<(OwnedFd, u64)>) -> Result<()> {
        let op = self.overlay.begin();
        let (parent, name) = split(path);
        let how = OpenHow {
            write: true,
            ..OpenHow::default()
        };
        let parent = self.find(&op, parent)?;
        let (inode, handle) = op.create(self.caller, &parent, &Name::new(name)?, 0o600, how)?;
        let Some((from, size)) = content else {
            self.overlay.close(&handle);
            return Ok(());
        };
        let fill = || -> Result<()> {
            let mut blocks = Blocks::new(from, size);
            while let Some((mut at, mut block)) = blocks.next()? {
                while !block.is_empty() {
                    let done = op.write(&handle, at, block, Writer::Privileged)?;
                    at += done as u64;
                    block = block.get(done..).unwrap_or_default();
                }
            }
            let set = SetAttr {
                size: Some(size),
                ..SetAttr::default()
            };
            op.set_attr(self.caller, &inode, &set, Some(&handle))
                .map(drop)
        };
        let filled = fill();
        self.overlay.close(&handle);
        filled
    }
}

impl Target for InProcess {
    fn look(&self, path: &[u8]) -> Result<Option<Stat>> {
        let op = self.overlay.begin();
        let Some(inode) = absent_is_none(self.find(&op, path))? else {
            return Ok(None);
        };
        Ok(Some(op.attr(&inode)?.stat))
    }

    fn names(&self, path: &[u8]) -> Result<Vec<Vec<u8>>> {
        let op = self.overlay.begin();
        let entries = op.listing(&self.find(&op, path)?, 0)?;
        let names = entries.iter().map(|entry| entry.name().to_vec());
        Ok(names.filter(|n| n != b"." && n != b"..").collect())
    }

    fn mkdir(&self, path: &[u8]) -> Result<()> {
        let op = self.overlay.begin();
        let (parent, name) = split(path);
        op.mkdir(
            self.caller,
            &self.find(&op, parent)?,
            &Name::new(name)?,
            0o700,
        )
        .map(drop)
    }

    fn file(&self, path: &[u8], content: Option<(OwnedFd, u64)>) -> Result<()> {
        self.write(path, content)
    }

    fn symlink(&self, path: &[u8], to: &[u8]) -> Result<()> {
        let op = self.overlay.begin();
        let (parent, name) = split(path);
        op.symlink(self.caller, &self.find(&op, parent)?, &Name::new(name)?, to)
            .map(drop)
    }

    fn node(&self, path: &[u8], kind: FileKind, rdev: u64) -> Result<()> {
        let op = self.overlay.begin();
        let (parent, name) = split(path);
        let mode = kind.mode_bits() | 0o600;
        op.mknod(
            self.caller,
            &self.find(&op, parent)?,
            &Name::new(name)?,
            mode,
            rdev,
        )
        .map(drop)
    }

    fn link(&self, path: &[u8], new: &[u8]) -> Result<()> {
        let op = self.overlay.begin();
        let (parent, name) = split(new);
        op.link(
            &self.find(&op, path)?,
            &self.find(&op, parent)?,
            &Name::new(name)?,
        )
        .map(drop)
    }

    fn attrs(&self, path: &[u8], kind: FileKind, attrs: &Attrs) -> Result<()> {
        let op = self.overlay.begin();
        let inode = self.find(&op, path)?;
        let owner = SetAttr {
            uid: Some(attrs.uid),
            gid: Some(attrs.gid),
            ..SetAttr::default()
        };
        op.set_attr(self.caller, &inode, &owner, None)?;
        let there = op.list_xattr(self.caller, &inode)?;
        let there = there.split(|&b| b == 0).filter(|name| !name.is_empty());
        for name in others(there, attrs) {
            op.remove_xattr(&inode, name)?;
        }
        for (name, value) in &attrs.xattrs {
            op.set_xattr(self.caller, &inode, name, value, 0)?;
        }
        let rest = SetAttr {
            mode: (kind != FileKind::Symlink).then_some(attrs.perm),
            atime: attrs.atime,
            mtime: attrs.mtime,
            ..SetAttr::default()
        };
        op.set_attr(self.caller, &inode, &rest, None).map(drop)
    }

    fn times(&self, path: &[u8], atime: SetTime, mtime: SetTime) -> Result<()> {
        let op = self.overlay.begin();
        let set = SetAttr {
            atime,
            mtime,
            ..SetAttr::default()
        };
        op.set_attr(self.caller, &self.find(&op, path)?, &set, None)
            .map(drop)
    }

    fn rename(&self, from: &[u8], to: &[u8], how: RenameHow) -> Result<()> {
        self.forget(from)?;
        self.forget(to)?;
        let op = self.overlay.begin();
        let ((old, from), (new, to)) = (split(from), split(to));
        let flags = RenameFlags {
            no_replace: how == RenameHow::NoReplace,
            exchange: how == RenameHow::Exchange,
            whiteout: false,
        };
        let (old, new) = (self.find(&op, old)?, self.find(&op, new)?);
        op.rename(
            self.caller,
            &old,
            &Name::new(from)?,
            &new,
            &Name::new(to)?,
            flags,
        )
    }

    fn unlink(&self, path: &[u8]) -> Result<()> {
        let op = self.overlay.begin();
        let (parent, name) = split(path);
        op.unlink(&self.find(&op, parent)?, &Name::new(name)?)
    }

    fn rmdir(&self, path: &[u8]) -> Result<()> {
        self.forget(path)?;
        let op = self.overlay.begin();
        let (parent, name) = split(path);
        op.rmdir(&self.find(&op, parent)?, &Name::new(name)?)
    }
}
