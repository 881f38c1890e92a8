//! Attributes of objects and file systems.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, StatxFlags};
use serde::{Deserialize, Serialize};

use crate::error::{Errno, Result};

/// A timestamp.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Time {
    /// Seconds since 1970-01-01 UTC; negative before.
    pub secs: i64,
    /// Nanoseconds, 0 to 999,999,999.
    pub nanos: u32,
}

/// The type of a file system object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A FIFO.
    Fifo,
    /// A Unix socket.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
}

impl FileKind {
    /// Returns the type that a mode contains. An unknown type becomes a regular file.
    pub fn from_mode(mode: u32) -> Self {
        match mode & 0o170_000 {
            0o040_000 => Self::Directory,
            0o120_000 => Self::Symlink,
            0o010_000 => Self::Fifo,
            0o140_000 => Self::Socket,
            0o020_000 => Self::CharDevice,
            0o060_000 => Self::BlockDevice,
            _ => Self::Regular,
        }
    }

    /// Returns the type bits of a mode (`S_IFMT`).
    pub fn mode_bits(self) -> u32 {
        match self {
            Self::Directory => 0o040_000,
            Self::Symlink => 0o120_000,
            Self::Fifo => 0o010_000,
            Self::Socket => 0o140_000,
            Self::CharDevice => 0o020_000,
            Self::BlockDevice => 0o060_000,
            Self::Regular => 0o100_000,
        }
    }
}

/// The attributes of an object (stat(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// Device number of the file system.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Type and permission bits.
    pub mode: u32,
    /// Number of hard links.
    pub nlink: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device node, in the C library's encoding.
    pub rdev: u64,
    /// Size in bytes.
    pub size: u64,
    /// Allocated blocks of 512 bytes.
    pub blocks: u64,
    /// Preferred size of an I/O operation.
    pub blksize: u32,
    /// Time of the last access.
    pub atime: Time,
    /// Time of the last change of the content.
    pub mtime: Time,
    /// Time of the last change of the inode.
    pub ctime: Time,
}

impl Stat {
    /// Returns the type of the object.
    pub fn kind(&self) -> FileKind {
        FileKind::from_mode(self.mode)
    }

    /// Returns the permission bits, including setuid, setgid and sticky.
    pub fn perm(&self) -> u32 {
        self.mode & 0o7777
    }

    /// Whether the object is a character device 0:0, overlayfs's whiteout.
    pub fn is_whiteout_device(&self) -> bool {
        self.kind() == FileKind::CharDevice && self.rdev == 0
    }
}

#[allow(clippy::cast_sign_loss, clippy::cast_possible_truncation)]
fn from_kernel(s: &rustix::fs::Stat) -> Stat {
    Stat {
        dev: s.st_dev,
        ino: s.st_ino,
        mode: s.st_mode,
        nlink: s.st_nlink,
        uid: s.st_uid,
        gid: s.st_gid,
        rdev: s.st_rdev,
        size: s.st_size as u64,
        blocks: s.st_blocks as u64,
        blksize: s.st_blksize as u32,
        atime: Time {
            secs: s.st_atime,
            nanos: s.st_atime_nsec as u32,
        },
        mtime: Time {
            secs: s.st_mtime,
            nanos: s.st_mtime_nsec as u32,
        },
        ctime: Time {
            secs: s.st_ctime,
            nanos: s.st_ctime_nsec as u32,
        },
    }
}

/// Returns the attributes of `name` in `dir`. Does not follow links.
pub fn stat_at(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Stat> {
    Ok(from_kernel(&rustix::fs::statat(
        dir,
        name,
        AtFlags::SYMLINK_NOFOLLOW,
    )?))
}

/// Returns the attributes of the object behind a descriptor, which may be O_PATH.
pub fn stat_fd(fd: impl AsFd) -> Result<Stat> {
    Ok(from_kernel(&rustix::fs::fstat(fd)?))
}

/// Returns the birth time of an object; `None` if the file system does not record it.
pub fn birth_time(fd: impl AsFd) -> Result<Option<Time>> {
    let got = match rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME) {
        Ok(got) => got,
        Err(Errno::NOSYS) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let known = got.stx_mask & StatxFlags::BTIME.bits() != 0;
    Ok(known.then_some(Time {
        secs: got.stx_btime.tv_sec,
        nanos: got.stx_btime.tv_nsec,
    }))
}

/// The first version of Linux with multigrain timestamps.
const FINE_TIMES: (u32, u32, u32) = (6, 13, 0);

/// Whether each change of a file on the file system of `fd` after a stat(2) results in another ctime.
///
/// Otherwise a ctime is the time of the last tick of the clock, so that a second change before the next tick does not
/// change it.
pub fn has_fine_times(fd: impl AsFd) -> bool {
    /// TMPFS_MAGIC.
    const TMPFS: u64 = 0x0102_1994;
    let kind = rustix::fs::fstatfs(fd).map(|found| u64::try_from(found.f_type).unwrap_or(0));
    let is_listed = matches!(
        kind,
        Ok(super::order::XFS | super::order::BTRFS | super::order::EXT4 | TMPFS)
    );
    is_listed && super::kernel::version() >= FINE_TIMES
}

/// Returns the time of the last tick of the clock, which the kernel uses for changes without a fine-grained time.
pub fn time_of_last_tick() -> Time {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
    Time {
        secs: now.tv_sec,
        nanos: u32::try_from(now.tv_nsec).unwrap_or(0),
    }
}

/// Whether the mount that `fd` was opened through is read-only; `false` if that is unknown.
pub fn is_read_only(fd: impl AsFd) -> bool {
    statvfs(fd).is_ok_and(|all| all.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

/// Whether `fd` is on kernel overlayfs, whose files are stored on another file system.
pub fn is_on_overlayfs(fd: impl AsFd) -> Result<bool> {
    // statfs(2): OVERLAYFS_SUPER_MAGIC.
    Ok(rustix::fs::fstatfs(fd)?.f_type == 0x794c_7630)
}

/// Returns the statistics of the file system that holds `fd`.
pub fn statvfs(fd: impl AsFd) -> Result<rustix::fs::StatVfs> {
    Ok(rustix::fs::fstatvfs(fd)?)
}
