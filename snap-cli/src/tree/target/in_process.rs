//! Changing a tree through the overlay in process, without a mount.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cowl_layers::Result;
use cowl_layers::error::Errno;
use cowl_layers::name::Name;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::node::RenameMode;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_overlay::inode::Inode;
use cowl_overlay::{Caller, Op, OpenOptions, Overlay, RenameFlags, SetAttr, Writer};

use super::super::{
    attrs::Attrs,
    content::Blocks,
    path::{common, split, split_first},
};
use super::{Target, absent_is_none, others};

/// The overlay in process, over layers that are not mounted.
pub(crate) struct InProcess {
    overlay: Overlay,
    caller: Caller,
    way: RefCell<CachedPath>,
}

/// The directories on the path that was looked up last.
#[derive(Default)]
struct CachedPath {
    path: Vec<u8>,
    /// Each directory with where its name ends in the path.
    way: Vec<(usize, Arc<Inode>)>,
}

impl CachedPath {
    /// Truncates it to the common prefix with a path.
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

    /// Finds an object by its path, from the common prefix with the previous one. Nothing else changes these layers.
    fn find(&self, op: &Op<'_>, path: &[u8]) -> Result<Arc<Inode>> {
        let mut known = self.way.try_borrow_mut().map_err(|_| Errno::BUSY)?;
        known.back(path);
        let above = known.way.last().map(|(_, inode)| inode.clone());
        let mut inode = above.unwrap_or_else(|| self.overlay.root().clone());
        let mut rest = path.get(known.path.len()..).unwrap_or_default();
        loop {
            let (part, more) = split_first(rest);
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
        let how = OpenOptions {
            write: true,
            ..OpenOptions::default()
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
    fn stat(&self, path: &[u8]) -> Result<Option<Stat>> {
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

    fn rename(&self, from: &[u8], to: &[u8], how: RenameMode) -> Result<()> {
        self.forget(from)?;
        self.forget(to)?;
        let op = self.overlay.begin();
        let ((old, from), (new, to)) = (split(from), split(to));
        let flags = RenameFlags {
            no_replace: how == RenameMode::NoReplace,
            exchange: how == RenameMode::Exchange,
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
