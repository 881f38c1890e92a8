//! Creates and recognizes character devices 0:0 that users create; see [`crate::format::zero_device`].

use std::os::fd::BorrowedFd;

use crate::error::Result;
use crate::format::zero_device::{NODE, NODES, NODES_WITH_OPAQUE};
use crate::format::{OPAQUE_XATTR_WHITEOUTS, XattrSpace};
use crate::sys;
use crate::sys::stat::{FileKind, Stat};

/// Whether a device that a user creates would be a whiteout on disk.
pub fn is_zero_device(kind: FileKind, rdev: u64) -> bool {
    kind == FileKind::CharDevice && rdev == 0
}

/// Whether an object on disk may represent such a device, judging by its attributes.
pub(super) fn may_be(kind: FileKind, size: u64) -> bool {
    kind == FileKind::Regular && size == 0
}

/// Returns the visible attributes of a device, computed from the attributes `stat` on disk.
pub fn device_stat(stat: Stat) -> Stat {
    Stat {
        mode: FileKind::CharDevice.mode_bits() | stat.perm(),
        rdev: 0,
        size: 0,
        blocks: 0,
        ..stat
    }
}

/// Whether the empty regular file `name` in `dir` represents a device.
pub(super) fn is_at(dir: BorrowedFd<'_>, name: &[u8], space: XattrSpace) -> Result<bool> {
    let xattr = sys::xattr::get_at(dir, name, space.node().as_bytes())?;
    Ok(xattr.is_some_and(|value| value == NODE))
}

/// Sets the xattrs that make the empty regular file `fd` represent a device.
pub fn mark_file(fd: BorrowedFd<'_>, space: XattrSpace) -> Result<()> {
    sys::xattr::set(fd, space.node().as_bytes(), NODE)?;
    sys::xattr::set(fd, space.escaped_whiteout().as_bytes(), b"")
}

/// Sets the xattrs of a directory that contains such a device.
///
/// To be called before the device is linked into the directory: listings check for devices only in directories with
/// these xattrs.
pub fn mark_dir(dir: BorrowedFd<'_>, space: XattrSpace) -> Result<()> {
    let nodes = space.nodes().as_bytes();
    if sys::xattr::get(dir, nodes)?.is_some() {
        return Ok(());
    }
    let opaque = space.escaped_opaque().as_bytes();
    if sys::xattr::get(dir, opaque)?.is_some() {
        return sys::xattr::set(dir, nodes, NODES);
    }
    sys::xattr::set(dir, nodes, NODES_WITH_OPAQUE)?;
    sys::xattr::set(dir, opaque, OPAQUE_XATTR_WHITEOUTS)
}

/// Records that a directory's escaped opaque xattr belongs to a user from now on, and is visible.
///
/// To be called after the user's value was set: if that fails, the value that cowl set must stay hidden.
pub fn give_opaque_to_user(dir: BorrowedFd<'_>, space: XattrSpace) -> Result<()> {
    let nodes = space.nodes().as_bytes();
    match sys::xattr::get(dir, nodes)? {
        Some(value) if value == NODES_WITH_OPAQUE => sys::xattr::set(dir, nodes, NODES),
        _ => Ok(()),
    }
}
