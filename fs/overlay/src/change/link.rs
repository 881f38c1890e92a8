//! Hard links.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::dirs::{live_dir, refuse_marker_name};
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
    /// Gives a file one more name.
    pub(crate) fn link(
        &self,
        inode: &Arc<Inode>,
        parent: &Arc<Inode>,
        name: &Name,
    ) -> Result<Arc<Inode>> {
        if inode.is_dir() {
            return Err(Error::Errno(Errno::PERM));
        }
        self.redirects.file_up(inode)?;
        let (_, up) = self.copy_up.dir_up(parent)?;
        let _names = parent.names()?.lock();
        let dir = live_dir(parent)?;
        let fd = up.fd()?;
        let fd = (*fd).as_fd();
        refuse_marker_name(&up, name)?;
        prepare_dir_for(self.cx, inode, fd)?;
        // Not by a name: the directory that has it is not locked, and it may be another file's by now. If no name
        // is left the kernel returns ENOENT, as for any file.
        let source = access_path(inode)?;
        let link_to =
            |dir: BorrowedFd<'_>, name: &[u8]| sys::node::link_fd(source.as_fd(), dir, name);
        match self.upper_names.upper_has(&up, name)? {
            UpperEntry::Object => return Err(Error::Errno(Errno::EXIST)),
            UpperEntry::Nothing => {
                self.upper_names.require_free_below(&dir, name)?;
                link_to(fd, name)?;
            }
            UpperEntry::Whiteout => {
                let work = &self.cx.stack.upper()?.work;
                let (staged, ()) = work.stage(|work, tmp| link_to(work, tmp))?;
                staged.commit(fd, name, RenameMode::Replace)?;
            }
        }
        inode.add_alias(Alias {
            parent: parent.clone(),
            name: name.clone(),
        });
        inode.note_change();
        parent.note_change();
        Ok(inode.clone())
    }
}
