//! Copy-up of character devices 0:0, which are marked regular files in a layer.

use std::os::fd::BorrowedFd;

use crate::inode::Inode;
use crate::reach::{Context, access_path};
use cowl_layers::error::Result;
use cowl_layers::layer::zero_device;
use cowl_layers::sys;
use cowl_layers::sys::stat::FileKind;

/// Prepares a directory of the upper layer for a new name of `inode`.
///
/// If the object is a device 0:0, marks the directory `dir` as one that contains such devices.
pub(crate) fn prepare_dir_for(cx: &Context<'_>, inode: &Inode, dir: BorrowedFd<'_>) -> Result<()> {
    if inode.kind() == FileKind::CharDevice
        && sys::stat::stat_fd(&*access_path(inode)?)?.kind() == FileKind::Regular
    {
        zero_device::mark_dir(dir, cx.stack.upper()?.layer.space())?;
    }
    Ok(())
}
