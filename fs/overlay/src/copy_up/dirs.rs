//! Copy-up of directories.

use std::sync::Arc;

use super::stage::stage_dir;
use super::times::{preserving_ctime, preserving_times};
use crate::inode::{Alias, DirState, Identity, Inode, InodeTable, NumberMarker};
use crate::reach::{Context, Stack};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;
use cowl_layers::sys::node::RenameMode;

/// The copy-up of directories.
#[derive(Clone, Copy)]
pub(super) struct DirCopyUp<'o> {
    pub(super) cx: &'o Context<'o>,
    pub(super) inodes: &'o InodeTable,
}

impl DirCopyUp<'_> {
    /// Copies a directory up, and all directories above it that are not in the upper yet. Returns its state
    /// and its location in the upper.
    pub(super) fn dir_up(&self, inode: &Arc<Inode>) -> Result<(DirState, Arc<LayerDir>)> {
        let stack = &self.cx.stack;
        let dir = inode.dir()?;
        if let Some(up) = stack.upper_dir(&dir) {
            let up = up.clone();
            return Ok((dir, up));
        }
        stack.upper()?;
        // From the topmost directory that is not in the upper downwards, without recursion.
        let mut pending = vec![inode.clone()];
        while let Some(highest) = pending.last() {
            let dir = highest.dir()?;
            let Some(alias) = dir.alias.as_ref() else {
                // The root is always in the upper; nothing can be created in a removed directory.
                return Err(Error::NOT_FOUND);
            };
            let parent = alias.parent.clone();
            if stack.upper_dir(&parent.dir()?).is_some() {
                break;
            }
            pending.push(parent);
        }
        while let Some(next) = pending.pop() {
            let _copying = next.copying().lock();
            if stack.upper_dir(&next.dir()?).is_none() {
                preserving_ctime(self.cx, self.inodes, &next, |_, _| self.one_dir_up(&next))?;
            }
        }
        let dir = inode.dir()?;
        let up = stack.upper_dir(&dir).cloned().ok_or(Error::NOT_FOUND)?;
        Ok((dir, up))
    }

    /// Copies one directory up. Its parent must be in the upper, and the caller must hold its `copying`.
    fn one_dir_up(&self, inode: &Arc<Inode>) -> Result<()> {
        let dir = inode.dir()?;
        let (staged, stat) = stage_dir(self.cx, dir.top()?)?;
        let alias = dir.alias.ok_or(Error::NOT_FOUND)?;
        let _names = alias.parent.names()?.lock();
        let dir = inode.dir()?;
        if dir.removed {
            return Err(Error::NOT_FOUND);
        }
        // It may have been moved since; only the present name is used.
        let alias = match dir.alias {
            Some(now) if Arc::ptr_eq(&now.parent, &alias.parent) => now,
            _ => return Err(Error::Errno(Errno::STALE)),
        };
        let parent = parent_up(&self.cx.stack, &alias)?;
        let up = LayerDir::child(&parent, alias.name.clone(), stat.ino);
        preserving_times(self.cx, self.inodes, &alias.parent, &parent, |fd| {
            staged.commit(fd, &alias.name, RenameMode::NoReplace)
        })?;
        let identity = Identity::from_stat(&stat);
        self.inodes
            .relocate(inode, identity, NumberMarker::Present, || {
                inode.update_dir(|dir| {
                    dir.locs = std::iter::once(up)
                        .chain(dir.locs.iter().cloned())
                        .collect();
                    dir.redirect = None;
                    dir.identity = identity;
                })
            })?;
        alias.parent.advance_generation();
        inode.advance_generation();
        Ok(())
    }

    /// Copies up a directory that was removed and lay only below: its copy has no name either.
    pub(super) fn removed_dir_up(&self, inode: &Arc<Inode>) -> Result<()> {
        let _copying = inode.copying().lock();
        let dir = inode.dir()?;
        if self.cx.stack.upper_dir(&dir).is_some() {
            return Ok(());
        }
        let (staged, stat) = stage_dir(self.cx, dir.top()?)?;
        let fd = Arc::new(staged.open_path()?);
        let name = Name::new(staged.name())?;
        let up = LayerDir::child(&self.cx.stack.upper()?.layer.root_dir(), name, stat.ino);
        up.gone(fd);
        let identity = Identity::from_stat(&stat);
        self.inodes
            .relocate(inode, identity, NumberMarker::Present, || {
                inode.update_dir(|dir| {
                    dir.locs = Arc::from([up]);
                    dir.identity = identity;
                })
            })
    }
}

/// Returns the location in the upper of the directory that holds `alias`, which was copied up before.
pub(super) fn parent_up(stack: &Stack, alias: &Alias) -> Result<Arc<LayerDir>> {
    let parent = alias.parent.dir()?;
    stack
        .upper_dir(&parent)
        .cloned()
        .ok_or(Error::Errno(Errno::STALE))
}
