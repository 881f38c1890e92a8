//! The character device 0:0, which is a whiteout where it lies in a layer. Programs that keep layers of
//! their own on the mount make it: kernel overlayfs, podman, umoci. It is stored as
//! [`cowl_layers::format::zero_device`] says.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::create::{live, refuse_mark};
use super::plan::UpperHas;
use super::{Caller, Op};
use crate::inode::Inode;
use crate::reach;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::{LayerDir, Staged, zero_device};
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::node::RenameHow;
use cowl_layers::sys::stat::FileKind;

impl Op<'_> {
    /// Makes a device 0:0.
    pub(super) fn make_zero_device(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        mode: u32,
    ) -> Result<Arc<Inode>> {
        live(parent)?;
        let (_, up) = self.dir_up(parent)?;
        let _names = parent.names.lock();
        let dir = live(parent)?;
        refuse_mark(&up, name)?;
        self.must_be_free(&dir, &up, name)?;
        let staged = self.stage_zero_device(caller, &up, mode)?;
        self.commit_zero_device(staged, &up, name)?;
        parent.changed();
        self.take_new(parent, &up, name, true)
            .map(|(inode, _)| inode)
    }

    /// Makes one in the work folder, as the caller would make it in `up`.
    pub(super) fn stage_zero_device(
        &self,
        caller: Caller,
        up: &LayerDir,
        mode: u32,
    ) -> Result<Staged> {
        let staged = self.stage_in_twin(caller, (*up.fd()?).as_fd(), |twin| {
            sys::node::mknod(twin, b"new", FileKind::Regular, mode, 0)
        })?;
        zero_device::mark(
            staged.open_path()?.as_fd(),
            self.cx.stack.upper()?.layer.space(),
        )?;
        Ok(staged)
    }

    /// Gives it a name that is free, or a whiteout.
    pub(super) fn commit_zero_device(
        &self,
        staged: Staged,
        up: &LayerDir,
        name: &Name,
    ) -> Result<()> {
        let fd = up.fd()?;
        let fd = (*fd).as_fd();
        zero_device::mark_folder(fd, self.cx.stack.upper()?.layer.space())?;
        match self.upper_has(up, name)? {
            UpperHas::Object => Err(Error::Errno(Errno::EXIST)),
            UpperHas::Nothing => staged.commit(fd, name, RenameHow::NoReplace),
            UpperHas::Whiteout => staged.commit(fd, name, RenameHow::Replace),
        }
    }

    /// To be called before an object of the upper, or a copy of a lower one, gets a name in the folder
    /// `dir` of the upper.
    pub(super) fn ready_for(&self, inode: &Inode, dir: BorrowedFd<'_>) -> Result<()> {
        if inode.kind() == FileKind::CharDevice
            && sys::stat::stat_fd(&*reach::access_path(inode)?)?.kind() == FileKind::Regular
        {
            zero_device::mark_folder(dir, self.cx.stack.upper()?.layer.space())?;
        }
        Ok(())
    }
}
