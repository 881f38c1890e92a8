//! Making and ending a FUSE mount with the kernel's own calls, no helper program.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags,
};

use crate::error::Result;
use crate::sys::private::Through;
use crate::sys::users::Device;

/// Flags and strings of a mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// What stands as the source in the mount table.
    pub source: String,
    /// What stands behind `fuse.` in the mount table.
    pub subtype: String,
    /// No writes.
    pub read_only: bool,
    /// setuid and setgid bits have no effect.
    pub nosuid: bool,
    /// Devices can't be opened.
    pub nodev: bool,
    /// Nothing can be executed.
    pub noexec: bool,
    /// Reads don't move access times.
    pub noatime: bool,
    /// Users other than the mounting one may enter.
    pub allow_other: bool,
}

impl MountOptions {
    /// How the layer that is written is to be used: the daemon's reads are the users', and where theirs
    /// move no access time its own must not either.
    pub fn through(&self) -> Through {
        if self.noatime || self.read_only {
            Through::WritingNoAtime
        } else {
            Through::Writing
        }
    }
}

/// The /dev/fuse descriptor of a file system that is mounted nowhere yet.
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
    /// Makes the file system behind `device`. The kernel's INIT request waits to be read there;
    /// nothing shows in the mount table before [`PreparedMount::attach`].
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
        rustix::mount::fsconfig_create(context)?;
        let mount =
            rustix::mount::fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes(options))?;
        Ok(Self { mount })
    }

    /// Puts the mount at its place in the tree.
    pub fn attach(self, at: &Path) -> Result<()> {
        attach(self.mount, at)
    }

    /// Its device number, by which it is known again.
    pub fn device(&self) -> Result<Device> {
        Device::of_fd(&self.mount)
    }
}

fn attributes(options: &MountOptions) -> MountAttrFlags {
    let mut flags = MountAttrFlags::empty();
    for (wanted, flag) in [
        (options.read_only, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (options.nosuid, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (options.nodev, MountAttrFlags::MOUNT_ATTR_NODEV),
        (options.noexec, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (options.noatime, MountAttrFlags::MOUNT_ATTR_NOATIME),
    ] {
        if wanted {
            flags |= flag;
        }
    }
    flags
}

/// Has the kernel read ahead so many KiB in files of the file system with this device number. The protocol can
/// only lower what it begins with (128).
pub fn read_ahead(device: Device, kib: u32) -> std::io::Result<()> {
    let Device { major, minor } = device;
    let place = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    std::fs::write(place, kib.to_string())
}

/// Puts a detached mount, which is in no tree, at a place in the tree.
pub fn attach(mount: impl AsFd, at: &Path) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rustix::mount::move_mount(mount, "", CWD, at, flags)?)
}

/// Ends a mount; EBUSY when something in it is in use.
pub fn unmount(at: &Path) -> Result<()> {
    Ok(rustix::mount::unmount(at, UnmountFlags::NOFOLLOW)?)
}

/// Changes the flags of the mount at `at`, those of its file system too: EBUSY when it is to become
/// read-only and a file is open for writing.
pub fn remount(at: &Path, options: &MountOptions) -> Result<()> {
    let mut flags = MountFlags::empty();
    for (wanted, flag) in [
        (options.read_only, MountFlags::RDONLY),
        (options.nosuid, MountFlags::NOSUID),
        (options.nodev, MountFlags::NODEV),
        (options.noexec, MountFlags::NOEXEC),
        (options.noatime, MountFlags::NOATIME),
    ] {
        flags.set(flag, wanted);
    }
    Ok(rustix::mount::mount_remount(at, flags, "")?)
}

/// Takes a mount out of the tree at once; it ends when its last user is gone.
pub fn unmount_lazily(at: &Path) -> Result<()> {
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    Ok(rustix::mount::unmount(at, flags)?)
}
