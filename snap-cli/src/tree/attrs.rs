//! The attributes of an object: owner, mode, times and extended attributes, set exactly.
//!
//! A failure is always an error: a tree that lacks an attribute is not the requested tree. Independent of the origin of
//! the attributes (an archive, a directory, a stack of layers).

use std::os::fd::BorrowedFd;

use cowl_layers::format::{ACL_ACCESS, ACL_DEFAULT, XattrSpace};
use cowl_layers::sys::attr::{self, SetTime};
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::sys::xattr;
use cowl_layers::view::{View, user_xattrs};

use super::error::{Context as _, ErrorKind, Result, TreeError};

pub(crate) use cowl_layers::view::Xattrs;

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

/// An object's attributes as a layer keeps them: what would be taken for a mark of the overlay there is
/// stored under its escaped name, as a mount stores it.
pub(crate) fn escaped(space: XattrSpace, xattrs: Xattrs) -> Xattrs {
    xattrs
        .into_iter()
        .map(|(name, value)| (space.to_disk(&name).into_owned(), value))
        .collect()
}

/// Returns the xattrs that an object shows, sorted by name. `space` is that of the layers if the object belongs to a
/// state: its markers are hidden.
pub(crate) fn shown(space: Option<XattrSpace>, on_disk: Xattrs) -> Xattrs {
    let mut shown = match space {
        Some(space) => user_xattrs(space, on_disk),
        None => on_disk,
    };
    shown.sort_unstable();
    shown
}

/// Returns the namespace of the marker xattrs of a state.
pub(crate) fn space_of(view: &View) -> Option<XattrSpace> {
    view.layers().first().map(|layer| layer.space())
}
