//! Renames to a free name, and renames that replace an object.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;

use super::side::{Side, intent, own_location, record_move};
use super::whiteout::leave_whiteout;
use crate::change::name_removal::{NameRemoval, forget_name};
use crate::copy_up::{set_opaque, stage_dir};
use crate::inode::{Identity, Inode, InodeState, InodeTable, NumberStorage, PLAIN_DATA};
use crate::ledger::Change;
use crate::names::LinkIndex;
use crate::plan::{self, MovedObject, RenamePlan, UpperEntry};
use crate::reach::{Context, open_content};
use cowl_layers::error::{Error, Result};
use cowl_layers::layer::LayerDir;
use cowl_layers::shown::Show as _;
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::node::RenameMode;
use cowl_layers::sys::stat::{FileKind, Time};

/// The final step of a rename that is not an exchange.
#[derive(Clone, Copy)]
pub(super) struct Replace<'o> {
    pub(super) cx: &'o Context<'o>,
    pub(super) inodes: &'o InodeTable,
    pub(super) index: &'o LinkIndex,
    pub(super) name_removal: NameRemoval<'o>,
}

impl Replace<'_> {
    /// Moves an object of the upper layer, and replaces `target` if there is one.
    pub(super) fn replace(
        &self,
        (from, to): (&Side<'_>, &Side<'_>),
        inode: &Arc<Inode>,
        target: Option<&Arc<Inode>>,
    ) -> Result<()> {
        if from.state.upper != UpperEntry::Object {
            return Err(Error::NOT_FOUND);
        }
        let stack = &self.cx.stack;
        let plan = plan::rename(from.state, to.state, moved_object(inode)?);
        if plan.make_opaque {
            set_opaque(self.cx, (*inode.dir()?.top()?.fd()?).as_fd())?;
        }
        let target_fd = self.prepare_target(to, target)?;
        let moved_dir = own_location(stack, inode)?;
        let target_dir = match target {
            Some(target) => own_location(stack, target)?,
            None => None,
        };
        if plan.mode == RenameMode::Exchange && !plan.drop_whiteout {
            // The exchange moves the whiteout at the new name to the directory of the old name.
            stack
                .upper()?
                .ready_for_whiteout(from.fd(), to.fd(), to.name)?;
        }
        if let Some(target) = target
            // Where the rename itself replaces a target in the upper layer, the file system below starts the
            // writeback.
            && (to.state.upper != UpperEntry::Object || plan.mode == RenameMode::Exchange)
        {
            self.write_back_before_replacing(inode, target)?;
        }
        if to.state.upper == UpperEntry::Whiteout {
            self.cx.order()?.before_replacing(from.fd())?;
        }
        if let Some(target) = target {
            self.name_removal
                .prepare(target, (to.parent, to.name), target_fd.as_ref());
        }
        let changed_dir = dir_changed_by_exchange(plan, moved_dir.as_deref())?;
        inode.update_states(target.map(|target| &**target), |state, others| {
            let moving = moved_dir.as_ref().map(|dir| dir.moving());
            let removing = target_dir.as_ref().map(|dir| dir.moving());
            let intent = intent(Change::Rename, inode, from, to);
            self.cx
                .commit(&intent, || self.rename_in_upper(plan, from, to))?;
            if let Some((dir, mtime)) = &changed_dir
                && let Err(error) =
                    sys::attr::utimens((**dir).as_fd(), SetTime::Keep, SetTime::At(*mtime))
            {
                // Not an error: the rename is complete.
                let name = to.name.shown();
                log::warn!("cannot restore the mtime of the directory {name}: {error}");
            }
            if let (Some(removing), Some(fd)) = (removing, &target_fd) {
                removing.set_removed(fd.clone());
            }
            match others {
                Some(state @ InodeState::Dir(_)) => state.set_removed(),
                Some(state) => forget_name(state, to.parent, to.name, target_fd)?,
                None => {}
            }
            record_move(state, moving, from, to);
            Ok(())
        })?;
        self.inodes.note_place(inode);
        // Whether a file is a library depends on its name.
        inode.facts().forget(PLAIN_DATA);
        for changed in [inode, from.parent, to.parent].into_iter().chain(target) {
            changed.note_change();
        }
        if let Some(target) = target {
            self.index.forget_moved(target);
            self.name_removal.note_removed(target);
        }
        Ok(())
    }

    /// Executes the system calls of `plan`.
    fn rename_in_upper(&self, plan: RenamePlan, from: &Side<'_>, to: &Side<'_>) -> Result<()> {
        if plan.mode == RenameMode::Whiteout {
            return leave_whiteout(self.cx, from, to);
        }
        sys::node::rename(from.fd(), from.name, to.fd(), to.name, plan.mode)?;
        if plan.drop_whiteout
            && let Err(error) = sys::node::unlink(from.fd(), from.name)
        {
            // Not an error: the rename is complete, and the leftover whiteout hides nothing.
            log::warn!("cannot remove the whiteout {}: {error}", from.name.shown());
        }
        Ok(())
    }

    /// Starts writeback of a file that is about to replace another one.
    ///
    /// The underlying file system starts it for a rename over an existing file (ext4's auto_da_alloc). Here it gets an
    /// exchange or a rename to a free name instead.
    fn write_back_before_replacing(&self, moved: &Inode, target: &Inode) -> Result<()> {
        let regular = |inode: &Inode| inode.kind() == FileKind::Regular;
        if !self.cx.early()?.on_replace || !regular(moved) || !regular(target) {
            return Ok(());
        }
        let file = moved.file()?;
        if file.data.is_some() {
            // A metacopy: its content is in a lower layer.
            return Ok(());
        }
        match open_content(moved, OFlags::RDONLY) {
            Ok(content) => sys::early::start(content),
            Err(error) => log::debug!("cannot start writeback before a rename: {error}"),
        }
        Ok(())
    }

    /// Prepares an object for its replacement, and returns a descriptor of it.
    ///
    /// A directory must be empty on disk, not only in the merged view. One with whiteouts is exchanged for an empty
    /// opaque one, which looks the same in the merged view.
    fn prepare_target(
        &self,
        to: &Side<'_>,
        target: Option<&Arc<Inode>>,
    ) -> Result<Option<Arc<OwnedFd>>> {
        let Some(target) = target else {
            return Ok(None);
        };
        if !target.is_dir() {
            return self.name_removal.open_anchor(target, to.parent, to.name);
        }
        let dir = target.dir()?;
        let Some(upper_dir) = self.cx.stack.upper_dir(&dir) else {
            return Ok(None);
        };
        let fd = upper_dir.fd()?;
        if sys::dir::entries((*fd).as_fd())?.is_empty() {
            return Ok(Some(fd));
        }
        let (empty, stat) = stage_dir(self.cx, upper_dir)?;
        let empty_fd = empty.open_path()?;
        set_opaque(self.cx, empty_fd.as_fd())?;
        let order = self.cx.order()?;
        empty.replace((to.fd(), to.name), RenameMode::Exchange, order)?;
        // Record the exchange now, because the rename that follows may fail.
        let location = LayerDir::child(&to.upper_dir, to.name.clone(), stat.ino);
        let identity = Identity::from_stat(&stat);
        self.inodes
            .relocate(target, identity, NumberStorage::OnDisk, || {
                target.update_dir(|dir| {
                    dir.locs = Arc::from([location]);
                    dir.redirect = None;
                    dir.identity = identity;
                })
            })?;
        Ok(Some(Arc::new(empty_fd)))
    }
}

/// Returns the directory that moves, and its mtime, if the rename is an exchange: XFS changes the mtime of a directory
/// that is exchanged between directories, unlike that of one that is renamed.
fn dir_changed_by_exchange(
    plan: RenamePlan,
    moved: Option<&LayerDir>,
) -> Result<Option<(Arc<OwnedFd>, Time)>> {
    let Some(dir) = moved.filter(|_| plan.mode == RenameMode::Exchange) else {
        return Ok(None);
    };
    let fd = dir.fd()?;
    let mtime = sys::stat::stat_fd(&*fd)?.mtime;
    Ok(Some((fd, mtime)))
}

/// Returns the type of a moved object, for the plan of the rename.
fn moved_object(inode: &Inode) -> Result<MovedObject> {
    Ok(if !inode.is_dir() {
        MovedObject::NotDirectory
    } else if inode.dir()?.locs.len() > 1 {
        MovedObject::MergedDirectory
    } else {
        MovedObject::Directory
    })
}
