//! Creation of the character device 0:0.
//!
//! Programs that store layers on the mount create such devices: kernel overlayfs, podman, umoci. In a layer of this
//! overlay a device 0:0 would be a whiteout, so it is stored as described in [`cowl_layers::format::zero_device`].

use std::os::fd::AsFd;

use super::upper_names::UpperNames;
use crate::copy_up::stage_in_temp_dir;
use crate::plan::UpperEntry;
use crate::reach::{Caller, Context};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::{LayerDir, Staged, zero_device};
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::node::RenameMode;
use cowl_layers::sys::stat::FileKind;

/// Stages a device 0:0 with the owner and mode that it would get if the caller created it in `upper_dir`.
pub(super) fn stage_zero_device(
    cx: &Context<'_>,
    caller: Caller,
    upper_dir: &LayerDir,
    mode: u32,
) -> Result<Staged> {
    let parent = upper_dir.fd()?;
    let staged = stage_in_temp_dir(cx, caller, (*parent).as_fd(), mode, |temp_dir, mode| {
        sys::node::mknod(temp_dir, b"new", FileKind::Regular, mode, 0)
    })?;
    let space = cx.stack.upper()?.layer.space();
    zero_device::mark_file(staged.open_path()?.as_fd(), space)?;
    Ok(staged)
}

/// Renames a staged device to a name that is free or a whiteout; EEXIST otherwise.
pub(super) fn commit_zero_device(
    upper_names: &UpperNames<'_>,
    staged: Staged,
    upper_dir: &LayerDir,
    name: &Name,
) -> Result<()> {
    let fd = upper_dir.fd()?;
    let fd = (*fd).as_fd();
    let space = upper_names.cx.stack.upper()?.layer.space();
    zero_device::mark_dir(fd, space)?;
    match upper_names.upper_entry(upper_dir, name)? {
        UpperEntry::Object => Err(Error::Errno(Errno::EXIST)),
        UpperEntry::Nothing => staged.commit(fd, name),
        UpperEntry::Whiteout => {
            let order = upper_names.cx.order()?;
            staged.replace((fd, name), RenameMode::Replace, order)
        }
    }
}
