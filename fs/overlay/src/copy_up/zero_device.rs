//! Copy-up and the character device 0:0, which is a whiteout where it lies in a layer.

use std::os::fd::BorrowedFd;

use crate::inode::Inode;
use crate::reach::{Context, access_path};
use cowl_layers::error::Result;
use cowl_layers::layer::zero_device;
use cowl_layers::sys;
use cowl_layers::sys::stat::FileKind;

/// Prepares the directory `dir` of the upper for an object of the upper, or a copy of a lower one, that is
/// about to get a name in it.
pub(crate) fn prepare_dir_for(cx: &Context<'_>, inode: &Inode, dir: BorrowedFd<'_>) -> Result<()> {
    if inode.kind() == FileKind::CharDevice
        && sys::stat::stat_fd(&*access_path(inode)?)?.kind() == FileKind::Regular
    {
        zero_device::mark_folder(dir, cx.stack.upper()?.layer.space())?;
    }
    Ok(())
}
