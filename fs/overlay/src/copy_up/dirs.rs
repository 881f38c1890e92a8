//! Copy-up of directories.

use std::sync::Arc;

use super::stage::stage_dir;
use super::times::{preserve_ctime, preserve_times};
use crate::inode::{Alias, DirState, Identity, Inode, InodeTable, NumberStorage};
use crate::reach::{Context, Stack};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;

/// The copy-up of directories.
#[derive(Clone, Copy)]
pub(super) struct DirCopyUp<'o> {
    pub(super) cx: &'o Context<'o>,
    pub(super) inodes: &'o InodeTable,
}

impl DirCopyUp<'_> {
    /// Copies up a directory and all its ancestors that are not in the upper layer.
    ///
    /// Returns the state of the directory and its location in the upper layer.
    pub(super) fn copy_up_dir(&self, inode: &Arc<Inode>) -> Result<(DirState, Arc<LayerDir>)> {
        let stack = &self.cx.stack;
        let dir = inode.dir()?;
        if let Some(upper_dir) = stack.upper_dir(&dir) {
            let upper_dir = upper_dir.clone();
            return Ok((dir, upper_dir));
        }
        stack.upper()?;
        // Collect the ancestors iteratively, because a deep path would overflow the stack.
        let mut pending = vec![inode.clone()];
        while let Some(highest) = pending.last() {
            let dir = highest.dir()?;
            let Some(alias) = dir.alias.as_ref() else {
                // A removed directory: the root, which has no alias either, is always in the upper layer.
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
                preserve_ctime(self.cx, self.inodes, &next, |_, _| {
                    self.copy_up_one_dir(&next)
                })?;
            }
        }
        let dir = inode.dir()?;
        let upper_dir = stack.upper_dir(&dir).cloned().ok_or(Error::NOT_FOUND)?;
        Ok((dir, upper_dir))
    }

    /// Copies up one directory.
    ///
    /// Its parent must be in the upper layer. The caller must hold the directory's `copying`.
    fn copy_up_one_dir(&self, inode: &Arc<Inode>) -> Result<()> {
        let dir = inode.dir()?;
        let (staged, stat) = stage_dir(self.cx, dir.top()?)?;
        let alias = dir.alias.ok_or(Error::NOT_FOUND)?;
        let _names = alias.parent.names()?.lock();
        let dir = inode.dir()?;
        if dir.removed {
            return Err(Error::NOT_FOUND);
        }
        // The directory may have been renamed while it was staged: use its current name.
        let alias = match dir.alias {
            Some(now) if Arc::ptr_eq(&now.parent, &alias.parent) => now,
            _ => return Err(Error::Errno(Errno::STALE)),
        };
        let parent = parent_in_upper(&self.cx.stack, &alias)?;
        let upper_dir = LayerDir::child(&parent, alias.name.clone(), stat.ino);
        upper_dir.note_no_foreign_markers();
        preserve_times(self.cx, self.inodes, &alias.parent, &parent, |fd| {
            staged.commit(fd, &alias.name)
        })?;
        let identity = Identity::from_stat(&stat);
        self.inodes
            .relocate(inode, identity, NumberStorage::OnDisk, || {
                inode.update_dir(|dir| {
                    dir.locs = std::iter::once(upper_dir)
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

    /// Copies up a removed directory that was only in lower layers. The copy has no name either.
    pub(super) fn copy_up_removed_dir(&self, inode: &Arc<Inode>) -> Result<()> {
        let _copying = inode.copying().lock();
        let dir = inode.dir()?;
        if self.cx.stack.upper_dir(&dir).is_some() {
            return Ok(());
        }
        let (staged, stat) = stage_dir(self.cx, dir.top()?)?;
        let fd = Arc::new(staged.open_path()?);
        let name = Name::new(staged.name())?;
        let upper_dir = LayerDir::child(&self.cx.stack.upper()?.layer.root_dir(), name, stat.ino);
        upper_dir.set_removed(fd);
        let identity = Identity::from_stat(&stat);
        self.inodes
            .relocate(inode, identity, NumberStorage::OnDisk, || {
                inode.update_dir(|dir| {
                    dir.locs = Arc::from([upper_dir]);
                    dir.identity = identity;
                })
            })
    }
}

/// Returns the location of an alias's parent in the upper layer; ESTALE if it was not copied up.
pub(super) fn parent_in_upper(stack: &Stack, alias: &Alias) -> Result<Arc<LayerDir>> {
    let parent = alias.parent.dir()?;
    stack
        .upper_dir(&parent)
        .cloned()
        .ok_or(Error::Errno(Errno::STALE))
}
