//! Owner, mode, times and xattrs of an object, which are set exactly.
//!
//! A failure is an error, because a tree that lacks an attribute is not the requested tree, except for the omissions
//! that an import permits. The module does not depend on the origin of the attributes: an archive, a directory, or a
//! stack of layers.

use std::os::fd::BorrowedFd;

use cowl_layers::error::Errno;
use cowl_layers::format::{ACL_ACCESS, ACL_DEFAULT, XattrSpace};
use cowl_layers::layer::RecordedAttributes;
use cowl_layers::shown::Show as _;
use cowl_layers::sys::attr::{self, SetTime};
use cowl_layers::sys::stat::{self, FileKind, Stat};
use cowl_layers::sys::xattr;
use cowl_layers::view::{View, user_xattrs};

use super::error::{Context as _, ErrorKind, Result, TreeError};
use super::omissions::{self, Omissions, XATTR_UNSUPPORTED, XattrProblem};
use super::recording::{self, Recorded};
use super::xattr_values;

pub(crate) use cowl_layers::view::Xattrs;

/// The attributes of an object, including its xattrs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attrs {
    /// The permission bits with setuid, setgid and sticky.
    pub(crate) perm: u32,
    /// The owning user.
    pub(crate) uid: u32,
    /// The owning group.
    pub(crate) gid: u32,
    /// The access time.
    pub(crate) atime: SetTime,
    /// The modification time.
    pub(crate) mtime: SetTime,
    /// All xattrs, ACLs and capabilities included.
    pub(crate) xattrs: Xattrs,
}

impl Attrs {
    /// Creates the attributes of an existing object from its stat fields and xattrs.
    pub(crate) fn from_stat(stat: &Stat, xattrs: Xattrs) -> Self {
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
pub(crate) struct FinalAttrs {
    /// `None` for a symbolic link, which has no mode.
    pub(crate) perm: Option<u32>,
    pub(crate) atime: SetTime,
    pub(crate) mtime: SetTime,
}

/// Returns `name` as a constant if it is the name of an ACL.
pub(crate) fn acl_name(name: &[u8]) -> Option<&'static [u8]> {
    [ACL_ACCESS, ACL_DEFAULT]
        .into_iter()
        .find(|acl| *acl == name)
}

/// Sets the attributes of the object behind `fd`, for which O_PATH suffices.
///
/// The order matters: chown(2) clears setuid bits and capabilities, user xattrs require a writable file, the mode must
/// precede the ACL, and every step may change the times.
pub(crate) fn apply(fd: BorrowedFd<'_>, kind: FileKind, attrs: &Attrs, path: &[u8]) -> Result<()> {
    apply_except(fd, kind, attrs, path, &mut Omissions::none())
}

/// Sets the attributes like [`apply`], except for those that may be omitted.
pub(crate) fn apply_except(
    fd: BorrowedFd<'_>,
    kind: FileKind,
    attrs: &Attrs,
    path: &[u8],
    omissions: &mut Omissions,
) -> Result<()> {
    let perm = apply_first(fd, attrs, path, omissions)?;
    let xattrs = attrs.xattrs.iter();
    let acls = xattrs.filter_map(|(name, value)| Some((acl_name(name)?, value.as_slice())));
    let last = FinalAttrs {
        perm: (kind != FileKind::Symlink).then_some(perm),
        atime: attrs.atime,
        mtime: attrs.mtime,
    };
    apply_last(fd, &last, acls, path, omissions)
}

/// The permission bits that run a program with the privileges of its owner or group.
const SET_IDS: u32 = 0o6000;

/// Sets the owner and the xattrs that are not ACLs: the first part of [`apply_except`].
///
/// Returns the permissions to set afterwards. If the owner could not be set, they lack setuid and setgid: the bits
/// would grant the privileges of the caller.
pub(crate) fn apply_first(
    fd: BorrowedFd<'_>,
    attrs: &Attrs,
    path: &[u8],
    omissions: &mut Omissions,
) -> Result<u32> {
    recording::clear(fd, path, omissions)?;
    let mut perm = attrs.perm;
    if let Err(error) = attr::chown(fd, Some(attrs.uid), Some(attrs.gid)) {
        // EINVAL and EOVERFLOW: the user namespace does not map the id.
        let kind = match error.errno() {
            Errno::PERM | Errno::INVAL | Errno::OVERFLOW => Some(ErrorKind::Unsupported),
            _ => None,
        };
        let error = failed(error, kind, "cannot set the owner", path);
        perm &= !SET_IDS;
        omit_owner(fd, attrs, path, omissions, error)?;
    }
    for (name, value) in &attrs.xattrs {
        if acl_name(name).is_none() {
            store_xattr(fd, (name, value), Some(attrs.perm), path, omissions)?;
        }
    }
    Ok(perm)
}

const OWNER_UNSUPPORTED: &str = "skipped an owner that this user cannot set";
const OWNER_UNKNOWN: &str = "skipped an owner without an id in this user namespace";
const OWNER_RECORDED: &str = "recorded an owner that this user cannot set";
const XATTR_RECORDED: &str = "recorded an xattr that this user cannot set";

/// Records the owner of an object instead of setting it, or omits it.
fn omit_owner(
    fd: BorrowedFd<'_>,
    attrs: &Attrs,
    path: &[u8],
    omissions: &mut Omissions,
    error: TreeError,
) -> Result<()> {
    if error.kind() != ErrorKind::Unsupported || omissions.record_space().is_none() {
        return omissions.unsupported(error, OWNER_UNSUPPORTED, path, b"");
    }
    if !(omissions.is_known(attrs.uid) && omissions.is_known(attrs.gid)) {
        return omissions.unsupported(error, OWNER_UNKNOWN, path, b"");
    }
    let recorded = recording::update(fd, path, omissions, |record| {
        (record.uid, record.gid) = (attrs.uid, attrs.gid);
        set_perm(record, attrs.perm);
    })?;
    match recorded {
        Recorded::Yes | Recorded::Partly => omissions.notes.add(OWNER_RECORDED, path),
        Recorded::No => omissions.unsupported(error, OWNER_UNSUPPORTED, path, b"")?,
    }
    Ok(())
}

/// Sets the permission bits of a record.
fn set_perm(record: &mut RecordedAttributes, perm: u32) {
    record.mode = (record.mode & !0o7777) | perm;
}

/// Returns the error of a system call, with another kind than that of its errno if `kind` is given.
fn failed(
    error: cowl_layers::Error,
    kind: Option<ErrorKind>,
    message: &str,
    path: &[u8],
) -> TreeError {
    let error = TreeError::from_layers(error, message).at(path);
    match kind {
        Some(kind) => error.of_kind(kind),
        None => error,
    }
}

/// Sets the mode, the ACLs and the times: the second part of [`apply_except`].
///
/// The ACL comes after the mode and overrides it, as with GNU tar: archivers store either the mask or the rights of the
/// owning group in the mode's group bits, and chmod(2) would set the mask to them.
pub(crate) fn apply_last<'a>(
    fd: BorrowedFd<'_>,
    last: &FinalAttrs,
    acls: impl Iterator<Item = (&'static [u8], &'a [u8])>,
    path: &[u8],
    omissions: &mut Omissions,
) -> Result<()> {
    if let Some(perm) = last.perm {
        attr::chmod(fd, perm).context("cannot set the mode", path)?;
    }
    for (name, value) in acls {
        store_xattr(fd, (name, value), None, path, omissions)?;
    }
    attr::utimens(fd, last.atime, last.mtime).context("cannot set the times", path)?;
    recording::refresh(fd, path, omissions)
}

/// Sets one xattr of a complete object, or omits it.
pub(crate) fn set_xattr(
    fd: BorrowedFd<'_>,
    name: &[u8],
    value: &[u8],
    path: &[u8],
    omissions: &mut Omissions,
) -> Result<()> {
    store_xattr(fd, (name, value), None, path, omissions)?;
    recording::refresh(fd, path, omissions)
}

/// Sets one xattr, records it, or omits it. `perm` are the original permissions, if the object does not have them yet.
fn store_xattr(
    fd: BorrowedFd<'_>,
    (name, value): (&[u8], &[u8]),
    perm: Option<u32>,
    path: &[u8],
    omissions: &mut Omissions,
) -> Result<()> {
    let Err(error) = xattr::set(fd, name, value) else {
        return Ok(());
    };
    let problem = omissions::xattr_problem(fd, name, value, error.errno());
    let kind = match problem {
        XattrProblem::Never(_) | XattrProblem::Here => Some(ErrorKind::Unsupported),
        XattrProblem::Other => None,
    };
    let message = format!("cannot set the xattr {}", name.shown());
    let error = failed(error, kind, &message, path);
    match problem {
        XattrProblem::Never(reason) => omissions.never_stored(error, reason, path, name),
        XattrProblem::Here if record_xattr(fd, (name, value), perm, path, omissions)? => Ok(()),
        XattrProblem::Here | XattrProblem::Other => {
            omissions.unsupported(error, XATTR_UNSUPPORTED, path, name)
        }
    }
}

/// Returns the record of a device with these attributes, whose placeholder is behind `fd`.
pub(crate) fn device_record(
    fd: BorrowedFd<'_>,
    (kind, rdev): (FileKind, u64),
    attrs: &Attrs,
    path: &[u8],
    omissions: &mut Omissions,
) -> Result<RecordedAttributes> {
    let stat = stat::stat_fd(fd).context("cannot read", path)?;
    let mut record = RecordedAttributes {
        mode: kind.mode_bits() | attrs.perm,
        rdev,
        ..RecordedAttributes::of(&stat)
    };
    if omissions.is_known(attrs.uid) && omissions.is_known(attrs.gid) {
        (record.uid, record.gid) = (attrs.uid, attrs.gid);
    }
    for (name, value) in &attrs.xattrs {
        let Some(visible) = omissions
            .record_space()
            .and_then(|space| space.to_mount(name))
        else {
            continue;
        };
        if let Some(reason) = omissions::never_storable(kind, &visible, value) {
            omissions.notes.add_part(reason, path, name);
            continue;
        }
        record.set_xattr(&visible, value);
        if &*visible == ACL_ACCESS
            && let Some(acl) = xattr_values::acl_perms(value)
        {
            set_perm(&mut record, (attrs.perm & 0o7000) | acl.with_mask);
        }
    }
    Ok(record)
}

/// Records an xattr that cannot be stored, or omits it if it is too large, with a note. Returns whether the object can have
/// a record.
///
/// Without its access ACL, the object gets the rights of the owning group in the ACL, not the mask, which would grant more.
fn record_xattr(
    fd: BorrowedFd<'_>,
    (name, value): (&[u8], &[u8]),
    perm: Option<u32>,
    path: &[u8],
    omissions: &mut Omissions,
) -> Result<bool> {
    let Some(space) = omissions.record_space() else {
        return Ok(false);
    };
    // A marker of the layer, which is not an xattr of the object, must be stored.
    let Some(visible) = space.to_mount(name) else {
        return Ok(false);
    };
    let acl = match name {
        ACL_ACCESS => xattr_values::acl_perms(value),
        _ => None,
    };
    let recorded = recording::update(fd, path, omissions, |record| {
        record.set_xattr(&visible, value);
        if let Some(perm) = perm {
            set_perm(record, perm);
        }
        if let Some(acl) = acl {
            set_perm(record, (record.mode & 0o7000) | acl.with_mask);
        }
    })?;
    if recorded == Recorded::No {
        return Ok(false);
    }
    if recorded == Recorded::Yes {
        omissions.notes.add_part(XATTR_RECORDED, path, name);
    }
    if let Some(acl) = acl {
        let special = stat::stat_fd(fd).context("cannot read", path)?.perm() & 0o7000;
        attr::chmod(fd, special | acl.without_acl).context("cannot set the mode", path)?;
    }
    Ok(true)
}

/// Escapes xattr names that a layer would interpret as markers, as a mount does.
pub(crate) fn escape_markers(space: XattrSpace, xattrs: Xattrs) -> Xattrs {
    xattrs
        .into_iter()
        .map(|(name, value)| (space.to_disk(&name).into_owned(), value))
        .collect()
}

/// Returns the visible xattrs of an object, sorted by name.
///
/// `space` is the namespace of marker xattrs if the object belongs to a state, where markers are hidden.
pub(crate) fn visible_xattrs(space: Option<XattrSpace>, on_disk: Xattrs) -> Xattrs {
    let mut visible = match space {
        Some(space) => user_xattrs(space, on_disk),
        None => on_disk,
    };
    visible.sort_unstable();
    visible
}

/// Returns the xattrs in which two objects of states must be equal: the visible ones, and the record of attributes that
/// could not be stored.
pub(crate) fn compared_xattrs(space: Option<XattrSpace>, on_disk: Xattrs) -> Xattrs {
    let is_record = |name: &[u8]| space.is_some_and(|space| name == space.recorded().as_bytes());
    let record = on_disk.iter().find(|(name, _)| is_record(name)).cloned();
    let mut compared = visible_xattrs(space, on_disk);
    compared.extend(record);
    compared
}

/// Returns the namespace of the marker xattrs of a state; `None` if the state has no layers.
pub(crate) fn marker_space(view: &View) -> Option<XattrSpace> {
    view.layers().first().map(|layer| layer.space())
}
