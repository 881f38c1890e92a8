//! Removal of names: unlink and rmdir.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::dirs::{lock_both, require_live_dir};
use super::name_removal::{NameRemoval, forget_name};
use super::upper_names::UpperNames;
use crate::copy_up::CopyUp;
use crate::inode::{DirState, Inode};
use crate::ledger::{Change, Intent};
use crate::names::{Hit, LinkIndex, Names};
use crate::plan::{self, NameState, RemovePlan, UpperEntry};
use crate::reach::Context;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::node::RenameMode;

/// The operations unlink and rmdir.
#[derive(Clone, Copy)]
pub(crate) struct Remove<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) names: Names<'o>,
    pub(crate) upper_names: UpperNames<'o>,
    pub(crate) copy_up: CopyUp<'o>,
    pub(crate) name_removal: NameRemoval<'o>,
    pub(crate) index: &'o LinkIndex,
}

impl Remove<'_> {
    /// Removes a name of an object that is not a directory.
    pub(crate) fn unlink(&self, parent: &Arc<Inode>, name: &Name) -> Result<()> {
        if self.was_removed(parent, name)? {
            return Ok(());
        }
        let upper_dir = match self.cx.stack.upper_dir(&require_live_dir(parent)?) {
            Some(upper_dir) => upper_dir.clone(),
            None => {
                // Do not copy up the directory for a name that cannot be removed.
                let inode = self.names.lookup(parent, name)?.ok_or(Error::NOT_FOUND)?;
                refuse_dir(&inode)?;
                self.cx.stack.upper()?;
                self.copy_up.copy_up_dir(parent)?.1
            }
        };
        let find = || {
            let hit = self.names.lookup_locked(parent, name)?;
            let hit = hit.ok_or(Error::NOT_FOUND)?;
            refuse_dir(&hit.inode)?;
            Ok::<_, Error>(hit)
        };
        let names = parent.names()?.lock();
        let hit = find()?;
        let (_names, hit) = if !hit.in_top && hit.stat.nlink > 1 {
            drop(names);
            self.name_removal.copy_up_all_links(&hit.inode)?;
            (parent.names()?.lock(), find()?)
        } else {
            (names, hit)
        };
        let dir = require_live_dir(parent)?;
        let state = self.name_state_from_hit(&hit, &dir, &upper_dir, name)?;
        let inode = hit.inode;
        let anchor = self.name_removal.open_anchor(&inode, parent, name)?;
        self.name_removal
            .prepare(&inode, (parent, name), anchor.as_ref());
        let intent = intent(parent, name);
        inode.update_states(None, |file, _| {
            self.cx
                .commit(&intent, || self.remove_name(&upper_dir, name, state))?;
            forget_name(file, parent, name, anchor)
        })?;
        inode.note_change();
        parent.note_change();
        self.name_removal.note_removed(&inode);
        Ok(())
    }

    /// Removes an empty directory.
    pub(crate) fn rmdir(&self, parent: &Arc<Inode>, name: &Name) -> Result<()> {
        if self.was_removed(parent, name)? {
            return Ok(());
        }
        let inode = self.names.lookup(parent, name)?.ok_or(Error::NOT_FOUND)?;
        let removed = inode.dir()?;
        self.cx.stack.upper()?;
        // Do not copy up the parent for a directory that cannot be removed.
        if !self.copy_up.is_in_upper(parent)? && !self.names.is_empty(&inode)? {
            return Err(Error::Errno(Errno::NOTEMPTY));
        }
        let (_, upper_dir) = self.copy_up.copy_up_dir(parent)?;
        // The lock of the removed directory prevents a race with a creation in it.
        let _names = lock_both(parent, &inode)?;
        let dir = require_live_dir(parent)?;
        if !self.names.is_empty(&inode)? {
            return Err(Error::Errno(Errno::NOTEMPTY));
        }
        let state = self.upper_names.name_state(&dir, &upper_dir, name)?;
        let removed_dir = match self.cx.stack.upper_dir(&removed) {
            Some(upper_dir) => Some((upper_dir, upper_dir.fd()?)),
            None => None,
        };
        let descriptor = removed_dir.as_ref().map(|(_, fd)| fd);
        self.name_removal
            .prepare(&inode, (parent, name), descriptor);
        let intent = intent(parent, name);
        inode.update_states(None, |dir, _| {
            let moving = removed_dir.map(|(upper_dir, fd)| (upper_dir.moving(), fd));
            self.cx
                .commit(&intent, || self.remove_name(&upper_dir, name, state))?;
            if let Some((moving, fd)) = moving {
                moving.set_removed(fd);
            }
            dir.set_removed();
            Ok(())
        })?;
        inode.note_change();
        parent.note_change();
        self.index.forget_moved(&inode);
        self.name_removal.note_removed(&inode);
        Ok(())
    }

    /// Whether a predecessor removed the name in the request of this operation.
    ///
    /// The kernel locks the directory until the request is answered, so a name that existed and is absent now was
    /// removed by it.
    fn was_removed(&self, parent: &Arc<Inode>, name: &Name) -> Result<bool> {
        Ok(self.cx.is_resumed(Change::Remove) && self.names.lookup(parent, name)?.is_none())
    }

    /// Returns the state of a name under which an object was just found.
    ///
    /// The caller must hold the directory's `names`.
    fn name_state_from_hit(
        &self,
        hit: &Hit,
        dir: &DirState,
        upper_dir: &LayerDir,
        name: &Name,
    ) -> Result<NameState> {
        if upper_dir.may_have_foreign_markers() {
            // It may also contain a marker of the name.
            return self.upper_names.name_state(dir, upper_dir, name);
        }
        Ok(if hit.in_top {
            NameState {
                upper: UpperEntry::Object,
                below: self.names.is_visible_below(dir, name)?,
            }
        } else {
            NameState {
                upper: UpperEntry::Nothing,
                below: true,
            }
        })
    }

    /// Removes a name on disk as its state requires.
    fn remove_name(&self, upper_dir: &LayerDir, name: &Name, state: NameState) -> Result<()> {
        let fd = upper_dir.fd()?;
        let fd = (*fd).as_fd();
        let upper = self.cx.stack.upper()?;
        match plan::remove(state) {
            RemovePlan::Absent => Err(Error::NOT_FOUND),
            RemovePlan::Hide => upper.whiteout_new(fd, name),
            RemovePlan::ReplaceWithWhiteout => {
                let whiteout = upper.stage_whiteout(fd)?;
                // Only an exchange can replace both files and directories with a whiteout. The replaced object
                // is removed together with the staged name.
                whiteout.replace((fd, name), RenameMode::Exchange, self.cx.order()?)
            }
            RemovePlan::Remove => self.remove_in_upper(fd, name),
        }
    }

    /// Removes an object that exists only in the upper layer.
    fn remove_in_upper(&self, dir: BorrowedFd<'_>, name: &Name) -> Result<()> {
        match sys::node::unlink(dir, name) {
            Err(error) if matches!(error.errno(), Errno::ISDIR | Errno::PERM) => {}
            other => return other,
        }
        match sys::node::rmdir(dir, name) {
            // The merged directory is empty, so the upper one contains only whiteouts. Move it to the work directory, where it is
            // removed together with them.
            Err(error) if error.errno() == Errno::NOTEMPTY => {
                let (staged, ()) = self.cx.stack.upper()?.work.stage(|work, tmp| {
                    sys::node::rename(dir, name, work, tmp, RenameMode::NoReplace)
                })?;
                drop(staged);
                Ok(())
            }
            other => other,
        }
    }
}

/// Returns the intent of a removal.
fn intent<'a>(parent: &Inode, name: &'a Name) -> Intent<'a> {
    Intent {
        change: Change::Remove,
        parents: (parent.ino(), 0),
        names: (name.as_bytes(), b""),
        object: 0,
    }
}

/// Returns EISDIR for a directory.
fn refuse_dir(inode: &Inode) -> Result<()> {
    if inode.is_dir() {
        return Err(Error::Errno(Errno::ISDIR));
    }
    Ok(())
}
