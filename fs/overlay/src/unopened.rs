//! Mounts on which the kernel opens and closes files without a request (docs/decisions/0044).

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::content::{FileHandle, Opened};
use crate::inode::{Inode, OpenOptions, Unlocated};
use crate::op::Op;
use crate::overlay::Overlay;
use cowl_layers::error::Result;
use cowl_layers::sys::users::Device;

/// Records that the kernel opens files without a request from now on.
pub fn set_opens_unknown(overlay: &Overlay) {
    overlay.opens.set_unknown();
}

/// Records the device number of the mount, by which the open files of a process are recognized.
pub fn set_device(overlay: &Overlay, device: Device) {
    overlay.opens.set_device(device);
}

/// Returns a handle for one request. It need not be closed.
///
/// Nothing is opened or copied up before the handle is used.
pub fn file_for_request(
    op: &Op<'_>,
    inode: &Arc<Inode>,
    options: OpenOptions,
) -> Result<Arc<FileHandle>> {
    op.services().content().for_request(inode, options)
}

/// Closes the handle of a file that was created, and caches its descriptor for the requests that follow.
pub fn close_created(overlay: &Overlay, created: Opened) {
    let Opened { handle, descriptor } = created;
    overlay.close(&handle);
    if let Some(descriptor) = descriptor
        && handle.is_writable()
    {
        overlay.descriptors.keep_created(&handle, descriptor);
    }
}

/// Returns a descriptor of a file that was truncated, if it is in the upper layer. It is not cached.
pub fn truncated_descriptor(overlay: &Overlay, ino: u64) -> Result<Option<Arc<OwnedFd>>> {
    let op = overlay.begin();
    let inode = op.inode(ino)?;
    let file = file_for_request(&op, &inode, OpenOptions::default())?;
    let content = op.services().content();
    let is_rewritten = inode.flags().is_truncated() && content.is_in_upper(&file)?;
    let found = is_rewritten
        .then(|| content.open_descriptor(&file))
        .transpose();
    drop(file);
    drop(op);
    // The kernel may have forgotten the inode by now.
    overlay.inodes().release(vec![inode]);
    found
}

/// Returns the node ids of the files that processes may have written to through mappings.
pub fn possibly_mapped(overlay: &Overlay) -> Vec<u64> {
    let inodes = overlay.inodes();
    // Objects that are not located yet may be of any kind. They come first: one that is located in the meantime is then
    // found twice.
    let mut found = match overlay.opens.are_unknown() {
        true => Unlocated::of(inodes).numbers(),
        false => Vec::new(),
    };
    found.extend(inodes.numbers_of(|inode| overlay.opens.may_have_writers(inode)));
    found
}
