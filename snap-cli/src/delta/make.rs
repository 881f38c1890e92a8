//! Giving a new object its owner, mode, times and extended attributes, exactly.
//!
//! A failure is always an error: a tree that lacks an attribute is not the tree that was asked for.
//! Must not know where the attributes come from (an archive, a folder, a stack of layers).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::zero_device;
use cowl_layers::sys::attr::{self, SetTime};
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::sys::{dir, node, xattr};
use rustix::fs::OFlags;

use super::error::{Context as _, ErrorKind, Result, TreeError};

/// The name of the attribute that holds a folder's default ACL.
pub(crate) const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";
/// The name of the attribute that holds an access ACL.
pub(crate) const ACL_ACCESS: &[u8] = b"system.posix_acl_access";

/// The mode of directories that an archive names only in the paths of others.
pub(crate) const IMPLIED_PERM: u32 = 0o755;

/// Extended attributes: name and value.
pub(crate) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// What an object is given besides its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attrs {
    /// Permission bits with setuid, setgid and sticky.
    pub(crate) perm: u32,
    /// Owner.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// Last read.
    pub(crate) atime: SetTime,
    /// Last change of the content.
    pub(crate) mtime: SetTime,
    /// All extended attributes, ACLs and capabilities among them.
    pub(crate) xattrs: Xattrs,
}

impl Attrs {
    /// The attributes of an object that exists.
    pub(crate) fn of(stat: &Stat, xattrs: Xattrs) -> Self {
        Self {
            perm: stat.perm(),
            uid: stat.uid,
            gid: stat.gid,
            atime: SetTime::At(stat.atime),
            mtime: SetTime::At(stat.mtime),
            xattrs,
        }
    }
}

/// The attributes that [`apply_last`] sets besides ACLs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Last {
    /// `None` for a symbolic link, which has no mode.
    pub(crate) perm: Option<u32>,
    pub(crate) atime: SetTime,
    pub(crate) mtime: SetTime,
}

/// The name as a constant, if it is an ACL's.
pub(crate) fn acl_name(name: &[u8]) -> Option<&'static [u8]> {
    [ACL_ACCESS, ACL_DEFAULT]
        .into_iter()
        .find(|acl| *acl == name)
}

/// Gives the object behind `fd` (O_PATH will do) its attributes. The order matters: a change of
/// owner clears setuid bits and capabilities, user attributes need a writable file, the mode comes before
/// the ACL, and everything changes the times.
pub(crate) fn apply(fd: BorrowedFd<'_>, kind: FileKind, attrs: &Attrs, path: &[u8]) -> Result<()> {
    apply_first(fd, attrs, path)?;
    let xattrs = attrs.xattrs.iter();
    let acls = xattrs.filter_map(|(name, value)| Some((acl_name(name)?, value.as_slice())));
    let last = Last {
        perm: (kind != FileKind::Symlink).then_some(attrs.perm),
        atime: attrs.atime,
        mtime: attrs.mtime,
    };
    apply_last(fd, &last, acls, path)
}

/// The first part of [`apply`]: owner and extended attributes.
pub(crate) fn apply_first(fd: BorrowedFd<'_>, attrs: &Attrs, path: &[u8]) -> Result<()> {
    attr::chown(fd, Some(attrs.uid), Some(attrs.gid)).context("can't set the owner", path)?;
    for (name, value) in &attrs.xattrs {
        if acl_name(name).is_none() {
            set_xattr(fd, name, value, path)?;
        }
    }
    Ok(())
}

/// The second part of [`apply`]: mode, ACLs and times.
///
/// The ACL comes after the mode and has the last word, as with GNU tar: archivers store either the mask or the
/// rights of the owning group in the mode's group bits, and chmod(2) would set the mask to them.
pub(crate) fn apply_last<'a>(
    fd: BorrowedFd<'_>,
    last: &Last,
    acls: impl Iterator<Item = (&'static [u8], &'a [u8])>,
    path: &[u8],
) -> Result<()> {
    if let Some(perm) = last.perm {
        attr::chmod(fd, perm).context("can't set the mode", path)?;
    }
    for (name, value) in acls {
        set_xattr(fd, name, value, path)?;
    }
    attr::utimens(fd, last.atime, last.mtime).context("can't set the times", path)
}

fn set_xattr(fd: BorrowedFd<'_>, name: &[u8], value: &[u8], path: &[u8]) -> Result<()> {
    xattr::set(fd, name, value).map_err(|error| {
        let what = format!("can't set the attribute {}", name.escape_ascii());
        match Err::<(), _>(error).context(&what, path) {
            Err(error) => error,
            Ok(()) => TreeError::new(ErrorKind::Io, what),
        }
    })
}

/// Opens the directory above the one behind `fd`.
pub(crate) fn up(fd: impl AsFd) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(fd, "..", flags, rustix::fs::Mode::empty())
}

/// Makes an object that has no content of its own (anything but a regular file with data and a
/// folder) in a layer, and gives it its attributes.
pub(crate) fn special(
    parent: BorrowedFd<'_>,
    name: &[u8],
    (kind, rdev): (FileKind, u64),
    attrs: &Attrs,
    space: XattrSpace,
    path: &[u8],
) -> Result<()> {
    let what = "can't make";
    if zero_device::is_zero_device(kind, rdev) {
        zero_device::mark_folder(parent, space).context(what, path)?;
        node::mknod(parent, name, FileKind::Regular, 0o600, 0).context(what, path)?;
        let fd = dir::open_path(parent, name).context(what, path)?;
        zero_device::mark(fd.as_fd(), space).context(what, path)?;
    } else {
        node::mknod(parent, name, kind, 0o600, rdev).context(what, path)?;
    }
    apply_at(parent, name, kind, attrs, path)
}

/// Makes a device, fifo or socket as it is, and gives it its attributes.
pub(crate) fn node(
    parent: BorrowedFd<'_>,
    name: &[u8],
    (kind, rdev): (FileKind, u64),
    attrs: &Attrs,
    path: &[u8],
) -> Result<()> {
    node::mknod(parent, name, kind, 0o600, rdev).context("can't make", path)?;
    apply_at(parent, name, kind, attrs, path)
}

/// Makes a symbolic link and gives it its attributes.
pub(crate) fn symlink(
    parent: BorrowedFd<'_>,
    name: &[u8],
    target: &[u8],
    attrs: &Attrs,
    path: &[u8],
) -> Result<()> {
    node::symlink(parent, name, target).context("can't make the symbolic link", path)?;
    apply_at(parent, name, FileKind::Symlink, attrs, path)
}

fn apply_at(
    parent: BorrowedFd<'_>,
    name: &[u8],
    kind: FileKind,
    attrs: &Attrs,
    path: &[u8],
) -> Result<()> {
    let fd = dir::open_path(parent, name).context("can't open what was just made", path)?;
    apply(fd.as_fd(), kind, attrs, path)
}

/// Makes a new regular file, open for reading and writing; nobody else may read it yet.
pub(crate) fn file(parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<OwnedFd> {
    node::create(parent, name, 0o600, OFlags::RDWR).context("can't make the file", path)
}

/// Makes a folder that only its maker may enter, and opens it.
pub(crate) fn folder(parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<OwnedFd> {
    node::mkdir(parent, name, 0o700).context("can't make the folder", path)?;
    dir::open_dir(parent, name).context("can't open the folder", path)
}

/// Makes the root of a new tree ready: it must be empty, and a default ACL that it may have from
/// the folder above must not reach what is made in it.
pub(crate) fn ready_root(root: BorrowedFd<'_>) -> Result<()> {
    if !dir::entries(root)
        .context("can't read the target folder", b"")?
        .is_empty()
    {
        return Err(TreeError::new(
            ErrorKind::Refused,
            "the target folder is not empty",
        ));
    }
    if xattr::get(root, ACL_DEFAULT)
        .context("can't read the target folder", b"")?
        .is_some()
    {
        xattr::remove(root, ACL_DEFAULT).context("can't prepare the target folder", b"")?;
    }
    Ok(())
}

/// An object's attributes as a layer keeps them: what would be taken for a mark of the overlay there is
/// stored under its escaped name, as a mount stores it.
pub(crate) fn escaped(space: XattrSpace, xattrs: Xattrs) -> Xattrs {
    xattrs
        .into_iter()
        .map(|(name, value)| (space.to_disk(&name).into_owned(), value))
        .collect()
}

/// Gives the object behind `fd`, which lies in a layer, one more name there.
pub(crate) fn link(
    fd: BorrowedFd<'_>,
    parent: BorrowedFd<'_>,
    name: &[u8],
    space: XattrSpace,
    path: &[u8],
) -> Result<()> {
    let what = "can't make the hard link";
    let device = xattr::get(fd, space.node().as_bytes()).context(what, path)?;
    if device.is_some() {
        zero_device::mark_folder(parent, space).context(what, path)?;
    }
    node::link_fd(fd, parent, name).context(what, path)
}

/// `parent/name`, without a leading slash for what lies in the root.
pub(crate) fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(parent.len() + 1 + name.len());
    path.extend_from_slice(parent);
    if !parent.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

/// The folder part and the last name of a relative path.
pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(at) => (
            path.get(..at).unwrap_or_default(),
            path.get(at + 1..).unwrap_or_default(),
        ),
        None => (b"", path),
    }
}
