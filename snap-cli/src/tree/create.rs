//! Creation of objects in a new tree, with their attributes.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use cowl_layers::format::{ACL_DEFAULT, XattrSpace};
use cowl_layers::layer::zero_device;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::{dir, node, xattr};
use rustix::fs::OFlags;

use super::attrs::{self, Attrs};
use super::error::{Context as _, ErrorKind, Result, TreeError};

/// The mode of directories that an archive has no entry for.
pub(crate) const IMPLIED_PERM: u32 = 0o755;

/// Creates a device, a FIFO or a socket in a layer, with its attributes.
///
/// A character device 0:0, which would be a whiteout in a layer, is represented by a marked empty file.
pub(crate) fn special(
    parent: BorrowedFd<'_>,
    name: &[u8],
    (kind, rdev): (FileKind, u64),
    attrs: &Attrs,
    space: XattrSpace,
    path: &[u8],
) -> Result<()> {
    let message = "cannot create";
    if zero_device::is_zero_device(kind, rdev) {
        zero_device::mark_dir(parent, space).context(message, path)?;
        node::mknod(parent, name, FileKind::Regular, 0o600, 0).context(message, path)?;
        let fd = dir::open_path(parent, name).context(message, path)?;
        zero_device::mark_file(fd.as_fd(), space).context(message, path)?;
    } else {
        node::mknod(parent, name, kind, 0o600, rdev).context(message, path)?;
    }
    apply_at(parent, name, kind, attrs, path)
}

/// Creates a device, a FIFO or a socket in a plain directory, with its attributes.
pub(crate) fn node(
    parent: BorrowedFd<'_>,
    name: &[u8],
    (kind, rdev): (FileKind, u64),
    attrs: &Attrs,
    path: &[u8],
) -> Result<()> {
    node::mknod(parent, name, kind, 0o600, rdev).context("cannot create", path)?;
    apply_at(parent, name, kind, attrs, path)
}

/// Creates a symbolic link with its attributes.
pub(crate) fn symlink(
    parent: BorrowedFd<'_>,
    name: &[u8],
    target: &[u8],
    attrs: &Attrs,
    path: &[u8],
) -> Result<()> {
    node::symlink(parent, name, target).context("cannot create the symbolic link", path)?;
    apply_at(parent, name, FileKind::Symlink, attrs, path)
}

/// Sets the attributes of a new object.
fn apply_at(
    parent: BorrowedFd<'_>,
    name: &[u8],
    kind: FileKind,
    attrs: &Attrs,
    path: &[u8],
) -> Result<()> {
    let fd = dir::open_path(parent, name).context("cannot open the new object", path)?;
    attrs::apply(fd.as_fd(), kind, attrs, path)
}

/// Creates a regular file with mode 0600, open for reading and writing.
pub(crate) fn file(parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<OwnedFd> {
    node::create(parent, name, 0o600, OFlags::RDWR).context("cannot create the file", path)
}

/// Creates a directory with mode 0700 and opens it.
pub(crate) fn dir(parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<OwnedFd> {
    node::mkdir(parent, name, 0o700).context("cannot create the directory", path)?;
    dir::open_dir(parent, name).context("cannot open the directory", path)
}

/// Prepares the root of a new tree: verifies that it is empty, and removes a default ACL that it inherited.
pub(crate) fn prepare_root(root: BorrowedFd<'_>) -> Result<()> {
    if !dir::entries(root)
        .context("cannot read the target directory", b"")?
        .is_empty()
    {
        return Err(TreeError::new(
            ErrorKind::Refused,
            "the target directory is not empty",
        ));
    }
    if xattr::get(root, ACL_DEFAULT)
        .context("cannot read the target directory", b"")?
        .is_some()
    {
        xattr::remove(root, ACL_DEFAULT).context("cannot prepare the target directory", b"")?;
    }
    Ok(())
}

/// Creates a hard link to the object behind `fd` in the same layer.
pub(crate) fn link(
    fd: BorrowedFd<'_>,
    parent: BorrowedFd<'_>,
    name: &[u8],
    space: XattrSpace,
    path: &[u8],
) -> Result<()> {
    let message = "cannot create the hard link";
    let device_marker = xattr::get(fd, space.node().as_bytes()).context(message, path)?;
    if device_marker.is_some() {
        zero_device::mark_dir(parent, space).context(message, path)?;
    }
    node::link_fd(fd, parent, name).context(message, path)
}
