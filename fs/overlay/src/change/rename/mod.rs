//! Renames: checks, copy-up of both sides, and dispatch to a plain rename or an exchange.

mod exchange;
mod replace;
mod side;
mod whiteout;

use std::sync::Arc;

use super::dirs::{lock_both, refuse_marker_name, require_live_dir};
use super::name_removal::NameRemoval;
use super::redirect::{Destination, Redirects};
use super::upper_names::UpperNames;
use super::zero_device::{commit_zero_device, stage_zero_device};
use crate::copy_up::{CopyUp, prepare_dir_for};
use crate::inode::{Inode, InodeTable};
use crate::ledger::Change;
use crate::names::{LinkIndex, Names};
use crate::reach::{Caller, Context};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::zero_device;
use cowl_layers::name::Name;

use exchange::exchange;
use replace::Replace;
use side::Side;

/// The flags of renameat2(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RenameFlags {
    /// Fail with EEXIST if the new name exists (RENAME_NOREPLACE).
    pub no_replace: bool,
    /// Exchange the two objects atomically (RENAME_EXCHANGE).
    pub exchange: bool,
    /// Leave a character device 0:0 at the old name (RENAME_WHITEOUT).
    pub whiteout: bool,
}

/// Execution of renames.
#[derive(Clone, Copy)]
pub(crate) struct Rename<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) inodes: &'o InodeTable,
    pub(crate) names: Names<'o>,
    pub(crate) upper_names: UpperNames<'o>,
    pub(crate) copy_up: CopyUp<'o>,
    pub(crate) redirects: Redirects<'o>,
    pub(crate) name_removal: NameRemoval<'o>,
    pub(crate) index: &'o LinkIndex,
}

impl Rename<'_> {
    /// Renames `name` in `parent` to `new_name` in `new_parent`.
    ///
    /// A lower directory gets a redirect and is moved without its content. Returns EXDEV only if the redirect does
    /// not fit.
    pub(crate) fn rename(
        &self,
        caller: Caller,
        (parent, name): (&Arc<Inode>, &Name),
        (new_parent, new_name): (&Arc<Inode>, &Name),
        flags: RenameFlags,
    ) -> Result<()> {
        let cx = self.cx;
        if self.was_renamed((parent, name), (new_parent, new_name), flags)? {
            if flags.whiteout && self.names.lookup(parent, name)?.is_none() {
                self.leave_device(caller, (parent, name))?;
            }
            return Ok(());
        }
        let upper = cx.stack.upper()?;
        let inode = self.names.lookup(parent, name)?.ok_or(Error::NOT_FOUND)?;
        let target = self.names.lookup(new_parent, new_name)?;
        self.check(&inode, target.as_ref(), new_parent, flags)?;
        if let Some(target) = &target
            && Arc::ptr_eq(target, &inode)
        {
            // POSIX: if both names are links to the same file, rename does nothing and succeeds.
            return Ok(());
        }
        // Before anything is copied up.
        refuse_marker_name(&upper.layer, new_name)?;
        for parent in [parent, new_parent] {
            require_live_dir(parent)?;
        }
        for parent in [parent, new_parent] {
            self.copy_up.copy_up_dir(parent)?;
        }
        let destination = if Arc::ptr_eq(parent, new_parent) {
            Destination::SameDir
        } else {
            Destination::OtherDir
        };
        self.redirects.copy_up_with_redirect(&inode, destination)?;
        match &target {
            Some(target) if flags.exchange => {
                self.redirects.copy_up_with_redirect(target, destination)?
            }
            Some(target) if !target.is_dir() => self.name_removal.copy_up_all_links(target)?,
            _ => {}
        }
        let _names = lock_both(parent, new_parent)?;
        let from = self.open_side(parent, name)?;
        let to = self.open_side(new_parent, new_name)?;
        prepare_dir_for(cx, &inode, to.fd())?;
        if flags.exchange {
            let target = target.ok_or(Error::NOT_FOUND)?;
            prepare_dir_for(cx, &target, from.fd())?;
            exchange(cx, (&from, &to), &inode, &target)?;
            self.inodes.note_place(&inode);
            self.inodes.note_place(&target);
            return Ok(());
        }
        let replace = Replace {
            cx,
            inodes: self.inodes,
            index: self.index,
            name_removal: self.name_removal,
        };
        if !flags.whiteout {
            return replace.replace((&from, &to), &inode, target.as_ref());
        }
        // Stage the device and mark the directory before the object is moved, because both can fail. Between the
        // rename and the commit of the device, the old name is absent: after a power cut there, the object is
        // moved but the old name is not hidden. The reverse order cannot do better.
        let device = stage_zero_device(cx, caller, &from.upper_dir, 0)?;
        let space = cx.stack.upper()?.layer.space();
        zero_device::mark_dir(from.fd(), space)?;
        replace.replace((&from, &to), &inode, target.as_ref())?;
        commit_zero_device(&self.upper_names, device, &from.upper_dir, name)
    }

    /// Whether a predecessor renamed the object in the request of this operation.
    fn was_renamed(
        &self,
        (parent, name): (&Arc<Inode>, &Name),
        (new_parent, new_name): (&Arc<Inode>, &Name),
        flags: RenameFlags,
    ) -> Result<bool> {
        let change = if flags.exchange {
            Change::Exchange
        } else {
            Change::Rename
        };
        if !self.cx.is_resumed(change) {
            return Ok(false);
        }
        let Some(found) = self.names.lookup(new_parent, new_name)? else {
            return Ok(false);
        };
        let was_renamed = self.cx.was_renamed(change, &found);
        if was_renamed {
            self.inodes.note_place(&found);
            if let Some(other) = self.names.lookup(parent, name)? {
                self.inodes.note_place(&other);
            }
        }
        Ok(was_renamed)
    }

    /// Creates the device 0:0 that a rename with RENAME_WHITEOUT leaves.
    fn leave_device(&self, caller: Caller, (parent, name): (&Arc<Inode>, &Name)) -> Result<()> {
        let _names = parent.names()?.lock();
        let from = self.open_side(parent, name)?;
        let device = stage_zero_device(self.cx, caller, &from.upper_dir, 0)?;
        zero_device::mark_dir(from.fd(), self.cx.stack.upper()?.layer.space())?;
        commit_zero_device(&self.upper_names, device, &from.upper_dir, name)
    }

    /// Returns the error that rename(2) defines for these objects and flags, if any.
    fn check(
        &self,
        inode: &Arc<Inode>,
        target: Option<&Arc<Inode>>,
        new_parent: &Arc<Inode>,
        flags: RenameFlags,
    ) -> Result<()> {
        if flags.exchange && (flags.no_replace || flags.whiteout) {
            return Err(Error::Errno(Errno::INVAL));
        }
        if inode.is_dir() && is_within(new_parent, inode)? {
            return Err(Error::Errno(Errno::INVAL));
        }
        let Some(target) = target else {
            return if flags.exchange {
                Err(Error::NOT_FOUND)
            } else {
                Ok(())
            };
        };
        if flags.no_replace {
            return Err(Error::Errno(Errno::EXIST));
        }
        if flags.exchange || Arc::ptr_eq(inode, target) {
            return Ok(());
        }
        match (inode.is_dir(), target.is_dir()) {
            (true, false) => Err(Error::Errno(Errno::NOTDIR)),
            (false, true) => Err(Error::Errno(Errno::ISDIR)),
            (true, true) if !self.names.is_empty(target)? => Err(Error::Errno(Errno::NOTEMPTY)),
            _ => Ok(()),
        }
    }

    /// Opens one side of the rename. The caller must hold the `names` of `parent`.
    fn open_side<'a>(&self, parent: &'a Arc<Inode>, name: &'a Name) -> Result<Side<'a>> {
        let dir = require_live_dir(parent)?;
        let upper_dir = self.cx.stack.upper_dir(&dir).cloned();
        let upper_dir = upper_dir.ok_or(Error::NOT_FOUND)?;
        let state = self.upper_names.name_state(&dir, &upper_dir, name)?;
        let fd = upper_dir.fd()?;
        Ok(Side {
            parent,
            name,
            dir,
            upper_dir,
            fd,
            state,
        })
    }
}

/// Whether `inode` is `ancestor` or a descendant of it.
fn is_within(inode: &Arc<Inode>, ancestor: &Arc<Inode>) -> Result<bool> {
    let mut next = Some(inode.clone());
    while let Some(inode) = next {
        if Arc::ptr_eq(&inode, ancestor) {
            return Ok(true);
        }
        next = inode.dir()?.alias.map(|alias| alias.parent);
    }
    Ok(false)
}
