//! Mounts and unmounts FUSE file systems with system calls, without fusermount.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatVfsMountFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags,
};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::sys::mountinfo::Mount;
use crate::sys::private::{AtimeMode, AtimeUpdates, Through};
use crate::sys::users::Device;

/// The options of a mount.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountOptions {
    /// The source in the mount table.
    pub source: String,
    /// The file system type in the mount table, after `fuse.`.
    pub subtype: String,
    /// Mounted read-only.
    pub read_only: bool,
    /// setuid and setgid bits have no effect.
    pub nosuid: bool,
    /// Devices cannot be opened.
    pub nodev: bool,
    /// Files cannot be executed.
    pub noexec: bool,
    /// Symbolic links are not followed.
    pub nosymfollow: bool,
    /// When reads update the atime.
    pub atime: AtimeUpdates,
    /// Every write is durable when it returns.
    pub sync: bool,
    /// Users other than the one who mounts have access.
    pub allow_other: bool,
}

impl MountOptions {
    /// Returns the kind of private mount for the upper layer.
    ///
    /// The daemon reads the layer on behalf of users, so the private mount must update atimes when the mount should.
    pub fn through(&self) -> Through {
        let mode = match self.read_only {
            true => AtimeMode::Never,
            false => self.atime.mode,
        };
        Through::Writing(AtimeUpdates { mode, ..self.atime })
    }
}

/// A FUSE file system that is not attached to the tree yet.
#[derive(Debug)]
pub struct PreparedMount {
    mount: OwnedFd,
}

/// Opens /dev/fuse.
pub fn open_device() -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, "/dev/fuse", flags, Mode::empty())?)
}

impl PreparedMount {
    /// Creates the file system that is served through `device`, a descriptor of /dev/fuse.
    ///
    /// The kernel queues the INIT request there. The mount table does not list the mount before
    /// [`PreparedMount::attach`].
    pub fn new(device: BorrowedFd<'_>, options: &MountOptions) -> Result<Self> {
        let context = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let context = context.as_fd();
        let set = |key: &str, value: &str| -> Result<()> {
            let value = CString::new(value).map_err(|_| crate::error::Errno::INVAL)?;
            Ok(rustix::mount::fsconfig_set_string(context, key, value)?)
        };
        set("source", &options.source)?;
        if !options.subtype.is_empty() {
            set("subtype", &options.subtype)?;
        }
        set("fd", &device.as_raw_fd().to_string())?;
        set("rootmode", "40000")?;
        set("user_id", &rustix::process::geteuid().as_raw().to_string())?;
        set("group_id", &rustix::process::getegid().as_raw().to_string())?;
        rustix::mount::fsconfig_set_flag(context, "default_permissions")?;
        if options.allow_other {
            rustix::mount::fsconfig_set_flag(context, "allow_other")?;
        }
        if options.sync {
            rustix::mount::fsconfig_set_flag(context, "sync")?;
        }
        rustix::mount::fsconfig_create(context)?;
        let mount =
            rustix::mount::fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes(options))?;
        Ok(Self { mount })
    }

    /// Attaches the mount at a path.
    pub fn attach(self, at: &Path) -> Result<()> {
        attach(self.mount, at)
    }

    /// Returns the device number, which identifies the file system.
    pub fn device(&self) -> Result<Device> {
        Device::from_fd(&self.mount)
    }
}

fn attributes(options: &MountOptions) -> MountAttrFlags {
    let mut flags = MountAttrFlags::empty();
    for (wanted, flag) in [
        (options.read_only, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (options.nosuid, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (options.nodev, MountAttrFlags::MOUNT_ATTR_NODEV),
        (options.noexec, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (options.nosymfollow, MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW),
        (
            options.atime.mode == AtimeMode::Never,
            MountAttrFlags::MOUNT_ATTR_NOATIME,
        ),
        (
            options.atime.mode == AtimeMode::Strict,
            MountAttrFlags::MOUNT_ATTR_STRICTATIME,
        ),
        (
            options.atime.nodiratime,
            MountAttrFlags::MOUNT_ATTR_NODIRATIME,
        ),
    ] {
        if wanted {
            flags |= flag;
        }
    }
    flags
}

/// Sets the kernel's read-ahead for a file system, in KiB.
///
/// It is set through sysfs, because the FUSE protocol can only lower the initial value (128).
pub fn read_ahead(device: Device, kib: u32) -> std::io::Result<()> {
    let Device { major, minor } = device;
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    std::fs::write(path, kib.to_string())
}

/// Attaches a detached mount at a path without symbolic links. Fails with ELOOP if there is one: another user may have
/// put it there since the path was checked.
pub fn attach(mount: impl AsFd, at: &Path) -> Result<()> {
    let target = super::open::exact_dir(at)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(mount, "", target, "", flags)?)
}

/// Unmounts the mount at a path; fails with EBUSY if it is in use.
pub fn unmount(at: &Path) -> Result<()> {
    Ok(rustix::mount::unmount(at, UnmountFlags::NOFOLLOW)?)
}

/// Unmounts a mount that was found earlier; fails with EBUSY if it is in use, and with EINVAL if another mount, or none, is
/// at its path now.
///
/// Its directory is opened without symbolic links, because another user may have replaced a part of the path. The mount
/// itself is not opened, because it would then be in use.
pub fn unmount_exactly(mount: &Mount) -> Result<()> {
    let (Some(dir), Some(name)) = (mount.at.parent(), mount.at.file_name()) else {
        return Err(Errno::INVAL.into());
    };
    let dir = super::open::exact_dir(dir)?;
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(&dir, name, flags, StatxFlags::MNT_ID)?;
    if stat.stx_mnt_id != mount.id {
        return Err(Errno::INVAL.into());
    }
    let at = Path::new("/proc/self/fd")
        .join(dir.as_raw_fd().to_string())
        .join(name);
    unmount(&at)
}

/// Changes the flags of the mount at `at`, including those of its superblock.
///
/// A change to read-only fails with EBUSY if a file is open for writing.
pub fn remount(at: &Path, options: &MountOptions) -> Result<()> {
    let mut flags = MountFlags::empty();
    for (wanted, flag) in [
        (options.read_only, MountFlags::RDONLY),
        (options.nosuid, MountFlags::NOSUID),
        (options.nodev, MountFlags::NODEV),
        (options.noexec, MountFlags::NOEXEC),
        (options.nosymfollow, MountFlags::NOSYMFOLLOW),
        (options.atime.mode == AtimeMode::Never, MountFlags::NOATIME),
        (
            options.atime.mode == AtimeMode::Strict,
            MountFlags::STRICTATIME,
        ),
        (options.atime.nodiratime, MountFlags::NODIRATIME),
        (options.sync, MountFlags::SYNCHRONOUS),
    ] {
        flags.set(flag, wanted);
    }
    Ok(rustix::mount::mount_remount(at, flags, "")?)
}

/// Whether the file system at `at` is mounted with `sync`.
pub fn is_sync(at: &Path) -> Result<bool> {
    let flags = rustix::fs::statvfs(at)?.f_flag;
    Ok(flags.contains(StatVfsMountFlags::SYNCHRONOUS))
}

/// Mounts the file system at `from` again where another mount of it was, with the restrictions of that mount. Fails with
/// ELOOP if a path contains a symbolic link.
pub fn bind_again(from: &Path, was: &Mount) -> Result<()> {
    let from = super::open::exact_dir(from)?;
    attach(
        super::private::clone_restricted(from.as_fd(), was)?,
        &was.at,
    )
}

/// Detaches the mount at a path from the tree. The kernel ends it when it is no longer in use.
pub fn unmount_lazily(at: &Path) -> Result<()> {
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    Ok(rustix::mount::unmount(at, flags)?)
}
