//! Making and knowing a character device 0:0 that a user made; see [`crate::format::zero_device`].

use std::os::fd::BorrowedFd;

use crate::error::Result;
use crate::format::zero_device::{NODE, NODES, NODES_WITH_OPAQUE};
use crate::format::{OPAQUE_XATTR_WHITEOUTS, XattrSpace};
use crate::sys;
use crate::sys::stat::{FileKind, Stat};

/// Whether a user who makes this would make what is a whiteout on disk.
pub fn is_zero_device(kind: FileKind, rdev: u64) -> bool {
    kind == FileKind::CharDevice && rdev == 0
}

/// Whether an object could be such a device as it lies on disk.
pub(super) fn may_be(kind: FileKind, size: u64) -> bool {
    kind == FileKind::Regular && size == 0
}

/// What the device shows where `stat` is what lies on disk.
pub fn shown(stat: Stat) -> Stat {
    Stat {
        mode: FileKind::CharDevice.mode_bits() | stat.perm(),
        rdev: 0,
        size: 0,
        blocks: 0,
        ..stat
    }
}

/// Whether the empty regular file `name` in `dir` shows as a device.
pub(super) fn is_at(dir: BorrowedFd<'_>, name: &[u8], space: XattrSpace) -> Result<bool> {
    let mark = sys::xattr::get_at(dir, name, space.node().as_bytes())?;
    Ok(mark.is_some_and(|value| value == NODE))
}

/// Makes the empty regular file `fd` one that shows as a device.
pub fn mark(fd: BorrowedFd<'_>, space: XattrSpace) -> Result<()> {
    sys::xattr::set(fd, space.node().as_bytes(), NODE)?;
    sys::xattr::set(fd, space.escaped_whiteout().as_bytes(), b"")
}

/// Tells the folder that it holds such a device. To be done before the device gets its name in it: a
/// listing looks for devices only where this is said.
pub fn mark_folder(dir: BorrowedFd<'_>, space: XattrSpace) -> Result<()> {
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

/// Told before a user sets the escaped opaque mark of a folder: from here on it is the user's.
pub fn opaque_is_a_users(dir: BorrowedFd<'_>, space: XattrSpace) -> Result<()> {
    let nodes = space.nodes().as_bytes();
    match sys::xattr::get(dir, nodes)? {
        Some(value) if value == NODES_WITH_OPAQUE => sys::xattr::set(dir, nodes, NODES),
        _ => Ok(()),
    }
}
