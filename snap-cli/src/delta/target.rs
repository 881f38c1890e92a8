//! What a tree is changed through: a mount, so that programs inside see it, or the file system in process.
//! Paths are relative and lead through no symbolic link.

use std::os::fd::{AsFd as _, OwnedFd};

use cowl_fs::Result;
use cowl_fs::error::Errno;
use cowl_fs::name::Name;
use cowl_fs::overlay::{Caller, OpenHow, Overlay, RenameFlags, SetAttr, Writer};
use cowl_fs::sys::attr::{self, SetTime};
use cowl_fs::sys::node::RenameHow;
use cowl_fs::sys::stat::{FileKind, Stat};
use cowl_fs::sys::{copy, dir, node, stat, xattr};
use rustix::fs::OFlags;

use super::content::Blocks;
use super::make::{Attrs, split};

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

fn parts(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/')
        .filter(|part| !part.is_empty())
}

/// A folder, a mount point for one.
pub(crate) struct Folder(pub(crate) OwnedFd);

impl Folder {
    fn open(&self, path: &[u8]) -> Result<OwnedFd> {
        let mut at = dir::reopen_dir(self.0.as_fd())?;
        for part in parts(path) {
            at = dir::open_dir(at.as_fd(), part)?;
            self.is_here(&at)?;
        }
        Ok(at)
    }

    /// What is mounted inside is no part of it: nothing there is looked at, changed or removed.
    fn is_here(&self, fd: &OwnedFd) -> Result<()> {
        match stat::stat_fd(fd)?.dev == stat::stat_fd(&self.0)?.dev {
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
        let ((old, from), (new, to)) = (self.parent(from)?, self.parent(to)?);
        node::rename(old.as_fd(), from, new.as_fd(), to, how)
    }

    fn unlink(&self, path: &[u8]) -> Result<()> {
        let (parent, name) = self.parent(path)?;
        node::unlink(parent.as_fd(), name)
    }

    fn rmdir(&self, path: &[u8]) -> Result<()> {
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
}

impl InProcess {
    pub(crate) fn new(overlay: Overlay) -> Self {
        let caller = Caller {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            umask: 0,
            pid: std::process::id(),
        };
        Self { overlay, caller }
    }

    fn write(&self, path: &[u8], content: Option<(OwnedFd, u64)>) -> Result<()> {
        let op = self.overlay.begin();
        let (parent, name) = split(path);
        let how = OpenHow {
            write: true,
            ..OpenHow::default()
        };
        let parent = op.find(parent)?;
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
        let Some(inode) = absent_is_none(op.find(path))? else {
            return Ok(None);
        };
        Ok(Some(op.attr(&inode)?.stat))
    }

    fn names(&self, path: &[u8]) -> Result<Vec<Vec<u8>>> {
        let op = self.overlay.begin();
        let entries = op.listing(&op.find(path)?, 0)?;
        let names = entries.iter().map(|entry| entry.name().to_vec());
        Ok(names.filter(|n| n != b"." && n != b"..").collect())
    }

    fn mkdir(&self, path: &[u8]) -> Result<()> {
        let op = self.overlay.begin();
        let (parent, name) = split(path);
        op.mkdir(self.caller, &op.find(parent)?, &Name::new(name)?, 0o700)
            .map(drop)
    }

    fn file(&self, path: &[u8], content: Option<(OwnedFd, u64)>) -> Result<()> {
        self.write(path, content)
    }

    fn symlink(&self, path: &[u8], to: &[u8]) -> Result<()> {
        let op = self.overlay.begin();
        let (parent, name) = split(path);
        op.symlink(self.caller, &op.find(parent)?, &Name::new(name)?, to)
            .map(drop)
    }

    fn node(&self, path: &[u8], kind: FileKind, rdev: u64) -> Result<()> {
        let op = self.overlay.begin();
        let (parent, name) = split(path);
        let mode = kind.mode_bits() | 0o600;
        op.mknod(
            self.caller,
            &op.find(parent)?,
            &Name::new(name)?,
            mode,
            rdev,
        )
        .map(drop)
    }

    fn link(&self, path: &[u8], new: &[u8]) -> Result<()> {
        let op = self.overlay.begin();
        let (parent, name) = split(new);
        op.link(&op.find(path)?, &op.find(parent)?, &Name::new(name)?)
            .map(drop)
    }

    fn attrs(&self, path: &[u8], kind: FileKind, attrs: &Attrs) -> Result<()> {
        let op = self.overlay.begin();
        let inode = op.find(path)?;
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
        op.set_attr(self.caller, &op.find(path)?, &set, None)
            .map(drop)
    }

    fn rename(&self, from: &[u8], to: &[u8], how: RenameHow) -> Result<()> {
        let op = self.overlay.begin();
        let ((old, from), (new, to)) = (split(from), split(to));
        let flags = RenameFlags {
            no_replace: how == RenameHow::NoReplace,
            exchange: how == RenameHow::Exchange,
            whiteout: false,
        };
        let (old, new) = (op.find(old)?, op.find(new)?);
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
        op.unlink(&op.find(parent)?, &Name::new(name)?)
    }

    fn rmdir(&self, path: &[u8]) -> Result<()> {
        let op = self.overlay.begin();
        let (parent, name) = split(path);
        op.rmdir(&op.find(parent)?, &Name::new(name)?)
    }
}
