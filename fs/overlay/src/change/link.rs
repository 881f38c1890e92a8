//! Hard links.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::create::intent;
use super::dirs::{refuse_marker_name, require_live_dir};
use super::redirect::Redirects;
use super::upper_names::UpperNames;
use crate::copy_up::{CopyUp, prepare_dir_for};
use crate::inode::{Alias, Inode};
use crate::plan::UpperEntry;
use crate::reach::{Context, access_path};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::node::RenameMode;

/// Creation of hard links.
#[derive(Clone, Copy)]
pub(crate) struct Link<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) upper_names: UpperNames<'o>,
    pub(crate) copy_up: CopyUp<'o>,
    pub(crate) redirects: Redirects<'o>,
}

impl Link<'_> {
    /// Creates a hard link to a file.
    pub(crate) fn link(
        &self,
        inode: &Arc<Inode>,
        parent: &Arc<Inode>,
        name: &Name,
    ) -> Result<Arc<Inode>> {
        if inode.is_dir() {
            return Err(Error::Errno(Errno::PERM));
        }
        let is_copied = self.copy_up.is_in_upper(inode)? && self.copy_up.is_in_upper(parent)?;
        if is_copied {
            refuse_marker_name(&self.cx.stack.upper()?.layer, name)?;
        } else {
            self.upper_names.refuse_new_name(parent, name)?;
        }
        self.redirects.copy_up_file_with_redirect(inode)?;
        let (_, upper_dir) = self.copy_up.copy_up_dir(parent)?;
        let _names = parent.names()?.lock();
        let dir = require_live_dir(parent)?;
        let fd = upper_dir.fd()?;
        let fd = (*fd).as_fd();
        prepare_dir_for(self.cx, inode, fd)?;
        // Link from a descriptor, not from a name: the directory of that name is not locked, and a race with a
        // rename would link another file. If the file has no name left, linkat(2) returns ENOENT as usual.
        if let Some((made, _)) = self.upper_names.resumed(parent, name)? {
            self.upper_names.names.inodes.note_place(&made);
            return Ok(made);
        }
        let source = access_path(inode)?;
        let intent = intent(parent, name);
        let link_to =
            |dir: BorrowedFd<'_>, name: &[u8]| sys::node::link_fd(source.as_fd(), dir, name);
        match self.upper_names.upper_entry(&upper_dir, name)? {
            UpperEntry::Object => return Err(Error::Errno(Errno::EXIST)),
            UpperEntry::Nothing => {
                self.upper_names.require_free_below(&dir, name)?;
                self.cx.commit(&intent, || link_to(fd, name))?;
            }
            UpperEntry::Whiteout => {
                let work = &self.cx.stack.upper()?.work;
                let (staged, ()) = work.stage(|work, tmp| link_to(work, tmp))?;
                let order = self.cx.order()?;
                self.cx.commit(&intent, || {
                    staged.replace((fd, name), RenameMode::Replace, order)
                })?;
            }
        }
        inode.add_alias(Alias {
            parent: parent.clone(),
            name: name.clone(),
        });
        self.upper_names.names.inodes.note_place(inode);
        inode.note_change();
        parent.note_change();
        Ok(inode.clone())
    }
}
