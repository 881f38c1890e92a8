//! Private mounts: detached copies of a mount that are not visible to any other process.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::mount::OpenTreeFlags;
use serde::{Deserialize, Serialize};

use super::mountinfo::Mount;
use crate::error::{Errno, Error, Result};

/// The kind of access through a private mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Through {
    /// Reads that do not update the atime.
    Reading,
    /// Reads and writes.
    Writing(AtimeUpdates),
}

/// When reads update the atime.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtimeUpdates {
    /// The mode for all objects.
    pub mode: AtimeMode,
    /// Reading a directory does not update its atime (`nodiratime`).
    pub nodiratime: bool,
}

/// The atime modes of a mount, which exclude each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum AtimeMode {
    /// The kernel's default, `relatime`. A private mount has the mode of the mount that it is a copy of.
    #[default]
    Default,
    /// Every read updates the atime (`strictatime`).
    Strict,
    /// No read updates the atime (`noatime`).
    Never,
}

impl Through {
    /// Reads and writes with the default mode.
    pub const WRITING: Self = Self::Writing(AtimeUpdates {
        mode: AtimeMode::Default,
        nodiratime: false,
    });
}

/// Opens the directory behind `dir` through a new private mount.
///
/// The descriptor keeps the file system alive, but unlike a descriptor of the original mount it does not make that
/// mount busy, so it can be unmounted from the tree. Mounts below the directory are not included. Devices cannot be
/// opened through the mount. Kernel overlayfs accesses its layers through such mounts as well.
///
/// Fails without the privilege to mount. In a user namespace, the atime and read-only flags of an inherited mount may
/// be locked; then as many flags are set as possible.
pub fn clone_mount(dir: BorrowedFd<'_>, through: Through) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    restrict(rustix::mount::open_tree(dir, "", flags)?, through)
}

/// Like [`clone_mount`] for reading, but if the mount of `dir` is idmapped, the private mount is not: it shows the ids of
/// the file system.
///
/// Needs Linux 6.15, and privilege over the file system.
pub fn clone_without_id_map(dir: BorrowedFd<'_>) -> Result<OwnedFd> {
    /// open_tree_attr(2), on all architectures.
    const OPEN_TREE_ATTR: libc::c_long = 467;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let wanted = libc::mount_attr {
        attr_set: 0,
        attr_clr: libc::MOUNT_ATTR_IDMAP,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the descriptor is open, the path is an empty NUL-terminated string, and `wanted` is a complete struct of
    // the size that is passed, which the kernel only reads.
    let fd = unsafe {
        libc::syscall(
            OPEN_TREE_ATTR,
            dir.as_raw_fd(),
            c"".as_ptr(),
            flags.bits(),
            &raw const wanted,
            size_of::<libc::mount_attr>(),
        )
    };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0);
    let fd = fd.ok_or_else(|| Error::from(nix::errno::Errno::last()))?;
    // SAFETY: the system call has just returned the descriptor, which no other code knows.
    restrict(unsafe { OwnedFd::from_raw_fd(fd) }, Through::Reading)
}

/// Sets the attributes of a new private mount.
fn restrict(mount: OwnedFd, through: Through) -> Result<OwnedFd> {
    let read_only = libc::MOUNT_ATTR_RDONLY;
    let noatime = libc::MOUNT_ATTR_NOATIME;
    // These can always be set. nodev does not prevent mknod, and devices that the overlay shows are opened through the
    // FUSE mount. noexec must not be set: a file that is mapped by passthrough belongs to this mount.
    let always = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;
    let candidates: &[u64] = match through {
        Through::Reading => &[read_only | noatime, read_only, 0],
        Through::Writing(updates) => &[updates.to_attributes(), 0],
    };
    let mut last = Err(Error::Errno(Errno::PERM));
    for flags in candidates {
        last = set(mount.as_fd(), *flags | always);
        if last.is_ok() {
            break;
        }
    }
    last.map(|()| mount)
}

impl AtimeUpdates {
    fn to_attributes(self) -> u64 {
        let mode = match self.mode {
            AtimeMode::Default => 0,
            AtimeMode::Strict => libc::MOUNT_ATTR_STRICTATIME,
            AtimeMode::Never => libc::MOUNT_ATTR_NOATIME,
        };
        let nodiratime = if self.nodiratime {
            libc::MOUNT_ATTR_NODIRATIME
        } else {
            0
        };
        mode | nodiratime
    }
}

/// Copies the mount of `dir`, without mounts below it, and adds the restrictions that another mount has: read-only, no effect
/// of set-user-ID bits, devices and programs, no symbolic links followed, and no access times.
pub(super) fn clone_restricted(dir: BorrowedFd<'_>, like: &Mount) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = rustix::mount::open_tree(dir, "", flags)?;
    let attributes = [
        ("ro", libc::MOUNT_ATTR_RDONLY),
        ("nosuid", libc::MOUNT_ATTR_NOSUID),
        ("nodev", libc::MOUNT_ATTR_NODEV),
        ("noexec", libc::MOUNT_ATTR_NOEXEC),
        ("nosymfollow", libc::MOUNT_ATTR_NOSYMFOLLOW),
        ("noatime", libc::MOUNT_ATTR_NOATIME),
    ];
    let wanted = attributes
        .into_iter()
        .filter(|(flag, _)| like.has_flag(flag));
    set(mount.as_fd(), wanted.map(|(_, attribute)| attribute).sum())?;
    Ok(mount)
}

/// Makes a mount, and those below it, read-only and without effect of set-user-ID bits, devices and programs.
pub fn restrict_tree(mount: BorrowedFd<'_>) -> Result<()> {
    let attributes = libc::MOUNT_ATTR_RDONLY
        | libc::MOUNT_ATTR_NOSUID
        | libc::MOUNT_ATTR_NODEV
        | libc::MOUNT_ATTR_NOEXEC;
    set_with(mount, attributes, libc::AT_EMPTY_PATH | libc::AT_RECURSIVE)
}

/// Sets attributes of a mount, and makes it private, so that mounts elsewhere do not propagate to it.
fn set(mount: BorrowedFd<'_>, attributes: u64) -> Result<()> {
    set_with(mount, attributes, libc::AT_EMPTY_PATH)
}

fn set_with(mount: BorrowedFd<'_>, attributes: u64, flags: libc::c_int) -> Result<()> {
    let has_mode = attributes & libc::MOUNT_ATTR__ATIME != 0;
    let wanted = libc::mount_attr {
        attr_set: attributes,
        // The atime modes are one field of several bits, which must be cleared before a mode is set.
        attr_clr: if has_mode { libc::MOUNT_ATTR__ATIME } else { 0 },
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the descriptor is open, the path is an empty NUL-terminated string, and `wanted` is a complete struct of
    // the size that is passed, which the kernel only reads.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const wanted,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(nix::errno::Errno::last().into())
    }
}
