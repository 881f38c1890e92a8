//! Creation of objects in a new tree, with their attributes.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use cowl_layers::error::Errno;
use cowl_layers::format::{ACL_DEFAULT, XattrSpace};
use cowl_layers::layer::zero_device;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::{attr, dir, node, xattr};
use rustix::fs::OFlags;

use super::attrs::{self, Attrs};
use super::error::{Context as _, ErrorKind, Result, TreeError};
use super::omissions::Omissions;
use super::recording::{self, Recorded};

/// The mode of directories that an archive has no entry for.
pub(crate) const IMPLIED_PERM: u32 = 0o755;

/// Creates a device, a FIFO or a socket in a layer, with its attributes.
///
/// A character device 0:0, which would be a whiteout in a layer, is represented by a marked empty file.
pub(crate) fn special(
    parent: BorrowedFd<'_>,
    name: &[u8],
    (kind, rdev): (FileKind, u64),
    (attrs, omissions): (&Attrs, &mut Omissions),
    space: XattrSpace,
    path: &[u8],
) -> Result<()> {
    let message = "cannot create";
    if zero_device::is_zero_device(kind, rdev) {
        zero_device::mark_dir(parent, space).context(message, path)?;
        created(
            node::mknod(parent, name, FileKind::Regular, 0o600, 0),
            message,
            path,
        )?;
        let fd = dir::open_path(parent, name).context(message, path)?;
        zero_device::mark_file(fd.as_fd(), space).context(message, path)?;
        return apply_at(parent, name, kind, (attrs, omissions), path);
    }
    node(parent, name, (kind, rdev), (attrs, omissions), path)
}

/// Creates a device, a FIFO or a socket in a plain directory, with its attributes.
pub(crate) fn node(
    parent: BorrowedFd<'_>,
    name: &[u8],
    (kind, rdev): (FileKind, u64),
    (attrs, omissions): (&Attrs, &mut Omissions),
    path: &[u8],
) -> Result<()> {
    let made = node::mknod(parent, name, kind, 0o600, rdev);
    match created(made, "cannot create", path) {
        Err(error)
            if error.kind() == ErrorKind::Unsupported
                && matches!(kind, FileKind::CharDevice | FileKind::BlockDevice)
                && omissions.record_space().is_some() =>
        {
            return placeholder(parent, name, (kind, rdev), (attrs, omissions), path, error);
        }
        other => other?,
    }
    apply_at(parent, name, kind, (attrs, omissions), path)
}

/// Creates a symbolic link with its attributes.
pub(crate) fn symlink(
    parent: BorrowedFd<'_>,
    name: &[u8],
    target: &[u8],
    (attrs, omissions): (&Attrs, &mut Omissions),
    path: &[u8],
) -> Result<()> {
    let made = node::symlink(parent, name, target);
    created(made, "cannot create the symbolic link", path)?;
    apply_at(parent, name, FileKind::Symlink, (attrs, omissions), path)
}

const DEVICE_RECORDED: &str =
    "recorded a device that this user cannot create; it is an empty file in the container";
const DEVICE_UNSUPPORTED: &str = "skipped a device that this user cannot create";

/// Creates an empty file that only root can access in the place of a device, and records the device.
fn placeholder(
    parent: BorrowedFd<'_>,
    name: &[u8],
    (kind, rdev): (FileKind, u64),
    (attrs, omissions): (&Attrs, &mut Omissions),
    path: &[u8],
    error: TreeError,
) -> Result<()> {
    let message = "cannot create";
    let made = node::mknod(parent, name, FileKind::Regular, 0o600, 0);
    created(made, message, path)?;
    let fd = dir::open_path(parent, name).context(message, path)?;
    let fd = fd.as_fd();
    match attr::chown(fd, Some(attrs.uid), Some(attrs.gid)) {
        Err(error) if !matches!(error.errno(), Errno::PERM | Errno::INVAL | Errno::OVERFLOW) => {
            return Err(error).context("cannot set the owner", path);
        }
        Ok(()) | Err(_) => {}
    }
    attr::chmod(fd, 0).context("cannot set the mode", path)?;
    attr::utimens(fd, attrs.atime, attrs.mtime).context("cannot set the times", path)?;
    let record = attrs::device_record(fd, (kind, rdev), attrs, path, omissions)?;
    match recording::write(fd, record, path, omissions)? {
        Recorded::Yes | Recorded::Partly => {
            omissions.notes.add(DEVICE_RECORDED, path);
            Ok(())
        }
        Recorded::No => {
            remove_partial(parent, name, path)?;
            omissions.unsupported(error, DEVICE_UNSUPPORTED, path, b"")
        }
    }
}

/// Sets the attributes of a new object.
fn apply_at(
    parent: BorrowedFd<'_>,
    name: &[u8],
    kind: FileKind,
    (attrs, omissions): (&Attrs, &mut Omissions),
    path: &[u8],
) -> Result<()> {
    let fd = dir::open_path(parent, name).context("cannot open the new object", path)?;
    attrs::apply_except(fd.as_fd(), kind, attrs, path, omissions)
}

/// Adds a message and a path to the error of a system call that creates an object or its content.
///
/// The error is [`ErrorKind::Unsupported`] if the file system or the user cannot store such an object at all.
pub(crate) fn created<T>(made: cowl_layers::Result<T>, message: &str, path: &[u8]) -> Result<T> {
    made.map_err(|error| {
        let cannot_store = matches!(
            error.errno(),
            Errno::PERM
                | Errno::NOTSUP
                | Errno::INVAL
                | Errno::ILSEQ
                | Errno::NAMETOOLONG
                | Errno::MLINK
                | Errno::FBIG
                | Errno::OVERFLOW
        );
        let error = TreeError::from_layers(error, message).at(path);
        match cannot_store {
            true => error.of_kind(ErrorKind::Unsupported),
            false => error,
        }
    })
}

/// Creates a regular file with mode 0600, open for reading and writing.
pub(crate) fn file(parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<OwnedFd> {
    let made = node::create(parent, name, 0o600, OFlags::RDWR);
    created(made, "cannot create the file", path)
}

/// Creates a directory with mode 0700 and opens it.
pub(crate) fn dir(parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<OwnedFd> {
    let made = node::mkdir(parent, name, 0o700);
    created(made, "cannot create the directory", path)?;
    dir::open_dir(parent, name).context("cannot open the directory", path)
}

/// Removes what a failed creation left of an object that is not a directory.
pub(crate) fn remove_partial(parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<()> {
    match node::unlink(parent, name) {
        Err(error) if error.errno() != Errno::NOENT => Err(error).context("cannot remove", path),
        Ok(()) | Err(_) => Ok(()),
    }
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
    created(node::link_fd(fd, parent, name), message, path)
}
