//! Attributes and objects that the target of a copy cannot store, and whether the copy continues without them.
//!
//! What Linux can never store is omitted with a note from an archive of another system. What only this file system, or
//! a user without privileges, cannot store is omitted if the user requests that.

use std::os::fd::BorrowedFd;

use cowl_layers::error::Errno;
use cowl_layers::format::{ACL_ACCESS, ACL_DEFAULT, XattrSpace};
use cowl_layers::sys::stat::{self, FileKind};

use super::error::{ErrorKind, Result, TreeError};
use super::notes::Notes;
use super::xattr_values;

/// The treatment of attributes and objects that this file system or user cannot store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unsupported {
    /// They are errors.
    #[default]
    Refuse,
    /// They are omitted, with a note.
    Skip,
}

/// The omissions that an operation permits, and notes on those that occurred.
#[derive(Debug)]
pub(crate) struct Omissions {
    permitted: Permitted,
    /// Where attributes are recorded that the user cannot store.
    records: Option<XattrSpace>,
    /// Whether an object has a record.
    has_records: bool,
    owners: SourceOwners,
    /// Whether anything was omitted that another file system or user could store.
    is_incomplete: bool,
    pub(crate) notes: Notes,
}

/// The owners that a source reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum SourceOwners {
    /// Numbers, as in an archive.
    #[default]
    Exact,
    /// Those of a directory, in which the kernel reports 65534 for an id that the user namespace does not map.
    Mapped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Permitted {
    /// Nothing: the target must equal the source.
    None,
    /// Anything that Linux can never store, and with [`Unsupported::Skip`] anything that the target cannot store.
    Foreign(Unsupported),
}

impl Omissions {
    /// Permits no omission.
    pub(crate) fn none() -> Self {
        Self::new(Permitted::None)
    }

    /// Permits the omission of what Linux can never store.
    pub(crate) fn foreign(unsupported: Unsupported) -> Self {
        Self::new(Permitted::Foreign(unsupported))
    }

    fn new(permitted: Permitted) -> Self {
        Self {
            permitted,
            records: None,
            has_records: false,
            owners: SourceOwners::default(),
            is_incomplete: false,
            notes: Notes::default(),
        }
    }

    /// Records attributes that the user cannot store, if the target is a layer of a user without privileges.
    ///
    /// Attributes and devices that cannot be recorded either are omitted.
    #[must_use]
    pub(crate) fn with_records(self, space: XattrSpace, owners: SourceOwners) -> Self {
        Self {
            records: Some(space).filter(|space| *space == XattrSpace::User),
            owners,
            ..self
        }
    }

    /// Returns the namespace of the records, if attributes are recorded.
    pub(crate) fn record_space(&self) -> Option<XattrSpace> {
        self.records
    }

    /// Returns whether an object has a record.
    pub(crate) fn has_records(&self) -> bool {
        self.has_records
    }

    /// Notes that an object has a record.
    pub(crate) fn note_record(&mut self) {
        self.has_records = true;
    }

    /// Returns whether an id of the source is known.
    pub(crate) fn is_known(&self, id: u32) -> bool {
        self.owners == SourceOwners::Exact || id != OVERFLOW_ID
    }

    /// Omits a part of the object at a path that no Linux system can store, or returns the error.
    pub(crate) fn never_stored(
        &mut self,
        error: TreeError,
        reason: &'static str,
        path: &[u8],
        part: &[u8],
    ) -> Result<()> {
        if self.permitted == Permitted::None {
            return Err(error);
        }
        self.note(reason, path, part);
        Ok(())
    }

    /// Omits a part of the object at a path, or the object, if `error` means that the target cannot store it;
    /// otherwise returns the error.
    pub(crate) fn unsupported(
        &mut self,
        error: TreeError,
        reason: &'static str,
        path: &[u8],
        part: &[u8],
    ) -> Result<()> {
        let is_permitted = self.permitted == Permitted::Foreign(Unsupported::Skip)
            || self.records.is_some() && reason != OBJECT_UNSUPPORTED;
        if error.kind() != ErrorKind::Unsupported || !is_permitted {
            return Err(error);
        }
        self.is_incomplete = true;
        self.note(reason, path, part);
        Ok(())
    }

    /// Returns whether anything was omitted that another file system or user could store.
    pub(crate) fn is_incomplete(&self) -> bool {
        self.is_incomplete
    }

    fn note(&mut self, reason: &'static str, path: &[u8], part: &[u8]) {
        match part {
            b"" => self.notes.add(reason, path),
            part => self.notes.add_part(reason, path, part),
        }
    }
}

/// The id that the kernel reports for ids that it cannot represent (overflowuid).
const OVERFLOW_ID: u32 = 65534;

/// The reason why an xattr cannot be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum XattrProblem {
    /// No Linux system can store it.
    Never(&'static str),
    /// This file system, or this user, cannot store it.
    Here,
    /// The attempt failed for another reason.
    Other,
}

/// The reason of a note on an xattr that this file system or user cannot store.
pub(crate) const XATTR_UNSUPPORTED: &str =
    "skipped an xattr that this file system or user cannot store";

/// The reason of a note on an object that this file system or user cannot store.
pub(crate) const OBJECT_UNSUPPORTED: &str =
    "skipped an entry that this file system or user cannot store";

/// XATTR_NAME_MAX of Linux.
const XATTR_NAME_MAX: usize = 255;

/// XATTR_SIZE_MAX of Linux.
const XATTR_SIZE_MAX: usize = 64 << 10;

/// The namespaces of xattrs that Linux has: those of all file systems, and those of single ones.
const NAMESPACES: [&str; 10] = [
    "user.",
    "trusted.",
    "security.",
    "system.",
    "afs.",
    "btrfs.",
    "ceph.",
    "gnu.",
    "os2.",
    "osx.",
];

/// The minimum free space, in bytes, with which a lack of space is a limit of the file system on one xattr.
const SPACE_FOR_XATTRS: u64 = 1 << 20;

/// Determines why the xattr `name` of the object behind `fd` could not be set.
///
/// The errno alone does not tell: ENOSPC is a full disk or a value that exceeds the limit of ext4, and EPERM is a
/// missing privilege or a kind of file without `user.*` xattrs.
pub(crate) fn xattr_problem(
    fd: BorrowedFd<'_>,
    name: &[u8],
    value: &[u8],
    errno: Errno,
) -> XattrProblem {
    let Ok(stat) = stat::stat_fd(fd) else {
        return XattrProblem::Other;
    };
    let full = || match stat::statvfs(fd) {
        Ok(space) => space.f_bavail.saturating_mul(space.f_frsize) < SPACE_FOR_XATTRS,
        Err(_) => true,
    };
    match errno {
        Errno::NOTSUP
        | Errno::PERM
        | Errno::ACCESS
        | Errno::INVAL
        | Errno::RANGE
        | Errno::TOOBIG => {
            never_storable(stat.kind(), name, value).map_or(XattrProblem::Here, XattrProblem::Never)
        }
        Errno::NOSPC if !full() => XattrProblem::Here,
        _ => XattrProblem::Other,
    }
}

/// Returns why no file system of Linux stores an xattr with this name and value on any file, if that is so.
pub(crate) fn unstorable_xattr(name: &[u8], value: &[u8]) -> Option<&'static str> {
    let is_prefix = |space: &&str| name.starts_with(space.as_bytes());
    if value.len() > XATTR_SIZE_MAX {
        return Some("skipped an xattr of more than 64 KiB, which Linux cannot store");
    }
    match NAMESPACES.iter().find(|space| is_prefix(space)) {
        None => Some("skipped an xattr of another operating system"),
        Some(space) if space.len() == name.len() => Some("skipped an xattr without a name"),
        Some(_) if name.contains(&0) => Some("skipped an xattr with a NUL byte in its name"),
        Some(_) if name.len() > XATTR_NAME_MAX => {
            Some("skipped an xattr whose name has more than 255 bytes")
        }
        Some(_) => None,
    }
}

/// Returns why no file system of Linux stores such an xattr on this kind of file, if that is so.
pub(crate) fn never_storable(kind: FileKind, name: &[u8], value: &[u8]) -> Option<&'static str> {
    let is_acl = name == ACL_ACCESS || name == ACL_DEFAULT;
    if let Some(reason) = unstorable_xattr(name, value) {
        return Some(reason);
    }
    if let Some(reason) = xattr_values::invalid(name, value) {
        return Some(reason);
    }
    match kind {
        FileKind::Regular | FileKind::Directory => {}
        _ if name.starts_with(b"user.") => {
            return Some("skipped a user xattr, which Linux stores on files and directories only");
        }
        FileKind::Symlink if is_acl => {
            return Some("skipped an ACL of a symbolic link, which Linux does not support");
        }
        _ => {}
    }
    (name == ACL_DEFAULT && kind != FileKind::Directory)
        .then_some("skipped a default ACL, which only directories can have")
}

#[cfg(test)]
mod tests {
    use super::*;
    use cowl_layers::shown::Show as _;

    #[test]
    fn cause_of_a_failed_xattr_depends_on_the_object() {
        let (file, dir, link) = (FileKind::Regular, FileKind::Directory, FileKind::Symlink);
        let large = vec![0; XATTR_SIZE_MAX + 1];
        let long = [b"user.".as_slice(), &[b'n'; 251]].concat();
        let never = |kind, name: &[u8], value: &[u8]| never_storable(kind, name, value).is_some();
        for (kind, name, value, expected) in [
            (file, &b"com.apple.provenance"[..], &b""[..], true),
            (file, b"user", b"", true),
            (file, b"user.", b"", true),
            (file, b"user.x", b"", false),
            (file, b"user.x", &large, true),
            (file, &long, b"", true),
            (link, b"user.x", b"", true),
            (link, b"trusted.x", b"", false),
            (FileKind::Fifo, b"user.x", b"", true),
            (link, ACL_ACCESS, b"\x02\0\0\0", true),
            (file, ACL_ACCESS, b"\x02\0\0\0", false),
            (file, ACL_ACCESS, b"garbage", true),
            (file, ACL_DEFAULT, b"\x02\0\0\0", true),
            (dir, ACL_DEFAULT, b"\x02\0\0\0", false),
            (file, b"security.capability", b"garbage", true),
            (dir, b"btrfs.compression", b"zstd", false),
            (file, b"system.nfs4_acl", b"", false),
        ] {
            let shown = name.shown();
            assert_eq!(never(kind, name, value), expected, "{kind:?} {shown}");
        }
    }

    #[test]
    fn omissions_are_permitted_by_scope() {
        let error = |kind| TreeError::new(kind, "cannot create");
        let unsupported = || error(ErrorKind::Unsupported);
        for (mut omissions, never, here) in [
            (Omissions::none(), false, false),
            (Omissions::foreign(Unsupported::Refuse), true, false),
            (Omissions::foreign(Unsupported::Skip), true, true),
        ] {
            let stored = omissions.never_stored(error(ErrorKind::Io), "never", b"f", b"x");
            assert_eq!(stored.is_ok(), never);
            assert_eq!(
                omissions
                    .unsupported(unsupported(), "here", b"f", b"")
                    .is_ok(),
                here
            );
            let other = omissions.unsupported(error(ErrorKind::NoSpace), "here", b"f", b"");
            assert_eq!(other.unwrap_err().kind(), ErrorKind::NoSpace);
            assert_eq!(
                omissions.notes.lines().len(),
                usize::from(never) + usize::from(here)
            );
        }
    }
}
