//! A writable tree over layers that are not mounted, changed through the overlay in process.

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
    path::{common_prefix, split, split_first},
};
use super::{WritableTree, absent_is_none, unrequested};

/// A tree over layers that are not mounted.
pub(crate) struct OverlayTree {
    overlay: Overlay,
    caller: Caller,
    cached: RefCell<CachedPath>,
}

/// The directories along the path of the last lookup.
#[derive(Default)]
struct CachedPath {
    path: Vec<u8>,
    /// Each directory with the end of its name in the path.
    dirs: Vec<(usize, Arc<Inode>)>,
}

impl CachedPath {
    /// Releases the directories that are not on `path`.
    fn truncate_to(&mut self, path: &[u8]) {
        let same = common_prefix(&self.path, path);
        let ends_here = |end: usize| path.get(end).is_none_or(|&byte| byte == b'/');
        while let Some((end, inode)) = self.dirs.last()
            && (*end > same || !ends_here(*end))
        {
            inode.leave();
            self.dirs.pop();
        }
        let end = self.dirs.last().map_or(0, |(end, _)| *end);
        self.path.truncate(end);
    }

    /// Releases a directory that is about to be moved or removed.
    fn forget(&mut self, path: &[u8]) {
        self.truncate_to(path);
        if self.path == path {
            self.truncate_to(split(path).0);
        }
    }
}

impl OverlayTree {
    /// Creates the tree of an overlay.
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
            cached: RefCell::default(),
        }
    }

    /// Looks up an object by its path, beginning at the common ancestor with the previous path.
    ///
    /// The cache cannot be stale, because no other process changes these layers.
    fn find(&self, op: &Op<'_>, path: &[u8]) -> Result<Arc<Inode>> {
        let mut cached = self.cached.try_borrow_mut().map_err(|_| Errno::BUSY)?;
        cached.truncate_to(path);
        let above = cached.dirs.last().map(|(_, inode)| inode.clone());
        let mut inode = above.unwrap_or_else(|| self.overlay.root().clone());
        let mut rest = path.get(cached.path.len()..).unwrap_or_default();
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
                let more = path.get(cached.path.len()..end).unwrap_or_default();
                cached.path.extend_from_slice(more);
                cached.dirs.push((end, inode.clone()));
            }
        }
    }

    fn forget(&self, path: &[u8]) -> Result<()> {
        let mut cached = self.cached.try_borrow_mut().map_err(|_| Errno::BUSY)?;
        cached.forget(path);
        Ok(())
    }

    /// Creates a regular file with a copy of `content`: the source and its size.
    fn create_with_content(&self, path: &[u8], content: Option<(OwnedFd, u64)>) -> Result<()> {
        let op = self.overlay.begin();
        let (parent, name) = split(path);
        let options = OpenOptions {
            write: true,
            ..OpenOptions::default()
        };
        let parent = self.find(&op, parent)?;
        let (inode, handle) = op.create(self.caller, &parent, &Name::new(name)?, 0o600, options)?;
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

impl WritableTree for OverlayTree {
    fn stat(&self, path: &[u8]) -> Result<Option<Stat>> {
        let op = self.overlay.begin();
        let Some(inode) = absent_is_none(self.find(&op, path))? else {
            return Ok(None);
        };
        Ok(Some(op.attr(&inode)?.stat))
    }

    fn list(&self, path: &[u8]) -> Result<Vec<Vec<u8>>> {
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

    fn create_file(&self, path: &[u8], content: Option<(OwnedFd, u64)>) -> Result<()> {
        self.create_with_content(path, content)
    }

    fn symlink(&self, path: &[u8], to: &[u8]) -> Result<()> {
        let op = self.overlay.begin();
        let (parent, name) = split(path);
        op.symlink(self.caller, &self.find(&op, parent)?, &Name::new(name)?, to)
            .map(drop)
    }

    fn mknod(&self, path: &[u8], kind: FileKind, rdev: u64) -> Result<()> {
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

    fn set_attrs(&self, path: &[u8], kind: FileKind, attrs: &Attrs) -> Result<()> {
        let op = self.overlay.begin();
        let inode = self.find(&op, path)?;
        let owner = SetAttr {
            uid: Some(attrs.uid),
            gid: Some(attrs.gid),
            ..SetAttr::default()
        };
        op.set_attr(self.caller, &inode, &owner, None)?;
        let present = op.list_xattr(self.caller, &inode)?;
        let present = present.split(|&b| b == 0).filter(|name| !name.is_empty());
        for name in unrequested(present, attrs) {
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

    fn set_times(&self, path: &[u8], atime: SetTime, mtime: SetTime) -> Result<()> {
        let op = self.overlay.begin();
        let set = SetAttr {
            atime,
            mtime,
            ..SetAttr::default()
        };
        op.set_attr(self.caller, &self.find(&op, path)?, &set, None)
            .map(drop)
    }

    fn rename(&self, from: &[u8], to: &[u8], mode: RenameMode) -> Result<()> {
        self.forget(from)?;
        self.forget(to)?;
        let op = self.overlay.begin();
        let ((old, from), (new, to)) = (split(from), split(to));
        let flags = RenameFlags {
            no_replace: mode == RenameMode::NoReplace,
            exchange: mode == RenameMode::Exchange,
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
