//! Renames.

mod exchange;
mod replace;
mod side;
mod whiteout;

use std::sync::Arc;

use super::dirs::{live_dir, lock_both, refuse_marker_name};
use super::name_removal::NameRemoval;
use super::redirect::{Destination, Redirects};
use super::upper_names::UpperNames;
use super::zero_device::{commit_zero_device, stage_zero_device};
use crate::copy_up::{CopyUp, prepare_dir_for};
use crate::inode::{Inode, InodeTable};
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
    /// EEXIST if the new name is taken.
    pub no_replace: bool,
    /// Exchange the two.
    pub exchange: bool,
    /// Leave a character device 0:0 at the old name.
    pub whiteout: bool,
}

/// Renames.
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
    /// Gives the object `name` in `parent` the name `new_name` in `new_parent`. EXDEV only if a redirect does not
    /// fit: a directory from below gets a redirect and is moved without its content.
    pub(crate) fn rename(
        &self,
        caller: Caller,
        (parent, name): (&Arc<Inode>, &Name),
        (new_parent, new_name): (&Arc<Inode>, &Name),
        flags: RenameFlags,
    ) -> Result<()> {
        let cx = self.cx;
        let inode = self.names.lookup(parent, name)?.ok_or(Error::NOT_FOUND)?;
        let target = self.names.lookup(new_parent, new_name)?;
        self.check(&inode, target.as_ref(), new_parent, flags)?;
        if let Some(target) = &target
            && Arc::ptr_eq(target, &inode)
        {
            // Two names of one file, or the same name: POSIX demands that nothing happens.
            return Ok(());
        }
        cx.stack.upper()?;
        for parent in [parent, new_parent] {
            live_dir(parent)?;
            self.copy_up.dir_up(parent)?;
        }
        let destination = if Arc::ptr_eq(parent, new_parent) {
            Destination::SameDir
        } else {
            Destination::OtherDir
        };
        self.redirects.any_up(&inode, destination)?;
        match &target {
            Some(target) if flags.exchange => self.redirects.any_up(target, destination)?,
            Some(target) if !target.is_dir() => self.name_removal.gather_links(target)?,
            _ => {}
        }
        let _names = lock_both(parent, new_parent)?;
        let from = self.side(parent, name)?;
        let to = self.side(new_parent, new_name)?;
        refuse_marker_name(&to.up, new_name)?;
        prepare_dir_for(cx, &inode, to.fd())?;
        if flags.exchange {
            let target = target.ok_or(Error::NOT_FOUND)?;
            prepare_dir_for(cx, &target, from.fd())?;
            return exchange(cx, (&from, &to), &inode, &target);
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
        // Staged before the object is moved, because it may fail, and so may marking the directory. Between
        // the two steps the old name is absent: a power cut there leaves a file that was moved and a name that
        // is not hidden, and no order of the steps leaves less.
        let device = stage_zero_device(cx, caller, &from.up, 0)?;
        let space = cx.stack.upper()?.layer.space();
        zero_device::mark_folder(from.fd(), space)?;
        replace.replace((&from, &to), &inode, target.as_ref())?;
        commit_zero_device(&self.upper_names, device, &from.up, name)
    }

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

    fn side<'a>(&self, parent: &'a Arc<Inode>, name: &'a Name) -> Result<Side<'a>> {
        let dir = live_dir(parent)?;
        let up = self.cx.stack.upper_dir(&dir).cloned();
        let up = up.ok_or(Error::NOT_FOUND)?;
        let state = self.upper_names.name_state(&dir, &up, name)?;
        let fd = up.fd()?;
        Ok(Side {
            parent,
            name,
            dir,
            up,
            fd,
            state,
        })
    }
}

/// Whether `inode` is `ancestor` or lies below it.
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
