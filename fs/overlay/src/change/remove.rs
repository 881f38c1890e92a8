//! Removing names.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::dirs::{live_dir, lock_both};
use super::name_removal::{NameRemoval, forget_name};
use super::upper_names::UpperNames;
use crate::copy_up::CopyUp;
use crate::inode::{DirState, Inode};
use crate::names::{Hit, LinkIndex, Names};
use crate::plan::{self, NameState, RemovePlan, UpperEntry};
use crate::reach::Context;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::node::RenameMode;

/// Removal of names.
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
    /// Removes a name that is not a directory.
    pub(crate) fn unlink(&self, parent: &Arc<Inode>, name: &Name) -> Result<()> {
        let up = match self.cx.stack.upper_dir(&live_dir(parent)?) {
            Some(up) => up.clone(),
            None => {
                // The directory is not copied up for a name that cannot be removed.
                let inode = self.names.lookup(parent, name)?.ok_or(Error::NOT_FOUND)?;
                refuse_dir(&inode)?;
                self.cx.stack.upper()?;
                self.copy_up.dir_up(parent)?.1
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
            self.name_removal.gather_links(&hit.inode)?;
            (parent.names()?.lock(), find()?)
        } else {
            (names, hit)
        };
        let dir = live_dir(parent)?;
        let state = self.state_of(&hit, &dir, &up, name)?;
        let inode = hit.inode;
        let anchor = self.name_removal.anchor(&inode, parent, name)?;
        inode.update_states(None, |file, _| {
            self.remove_name(&up, name, state)?;
            forget_name(file, parent, name, anchor)
        })?;
        inode.note_change();
        parent.note_change();
        self.name_removal.note_removed(&inode);
        Ok(())
    }

    /// Removes an empty directory.
    pub(crate) fn rmdir(&self, parent: &Arc<Inode>, name: &Name) -> Result<()> {
        let inode = self.names.lookup(parent, name)?.ok_or(Error::NOT_FOUND)?;
        let removed = inode.dir()?;
        self.cx.stack.upper()?;
        let (_, up) = self.copy_up.dir_up(parent)?;
        // Both: nothing can be created in a directory while it is removed.
        let _names = lock_both(parent, &inode)?;
        let dir = live_dir(parent)?;
        if !self.names.is_empty(&inode)? {
            return Err(Error::Errno(Errno::NOTEMPTY));
        }
        let state = self.upper_names.name_state(&dir, &up, name)?;
        let kept = match self.cx.stack.upper_dir(&removed) {
            Some(up) => Some((up, up.fd()?)),
            None => None,
        };
        inode.update_states(None, |dir, _| {
            let moving = kept.map(|(up, fd)| (up.moving(), fd));
            self.remove_name(&up, name, state)?;
            if let Some((moving, fd)) = moving {
                moving.gone(fd);
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

    /// Returns what the layers have under a name at which an object was just found. The caller must hold the
    /// directory's `names`.
    fn state_of(&self, hit: &Hit, dir: &DirState, up: &LayerDir, name: &Name) -> Result<NameState> {
        if up.layer().is_foreign() {
            // There may also be a marker.
            return self.upper_names.name_state(dir, up, name);
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

    fn remove_name(&self, up: &LayerDir, name: &Name, state: NameState) -> Result<()> {
        let fd = up.fd()?;
        let fd = (*fd).as_fd();
        let upper = self.cx.stack.upper()?;
        match plan::remove(state) {
            RemovePlan::Absent => Err(Error::NOT_FOUND),
            RemovePlan::Hide => upper.whiteout_new(fd, name),
            RemovePlan::ReplaceByWhiteout => {
                let whiteout = upper.stage_whiteout(fd)?;
                // An exchange replaces files and directories alike; the replaced object is removed with the
                // staged name.
                whiteout.commit(fd, name, RenameMode::Exchange)
            }
            RemovePlan::Remove => self.remove_in_upper(fd, name),
        }
    }

    fn remove_in_upper(&self, dir: BorrowedFd<'_>, name: &Name) -> Result<()> {
        match sys::node::unlink(dir, name) {
            Err(error) if matches!(error.errno(), Errno::ISDIR | Errno::PERM) => {}
            other => return other,
        }
        match sys::node::rmdir(dir, name) {
            // Only whiteouts can be left in it: it is moved to the work directory and removed there.
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

fn refuse_dir(inode: &Inode) -> Result<()> {
    if inode.is_dir() {
        return Err(Error::Errno(Errno::ISDIR));
    }
    Ok(())
}
