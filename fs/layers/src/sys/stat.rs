//! What the kernel says of an object, in plain numbers.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, StatxFlags};

use crate::error::{Errno, Result};

/// A moment: seconds since 1970 (negative before) and nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time {
    /// Seconds since 1970-01-01 UTC.
    pub secs: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

/// The type of a file system object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A folder.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A socket's name.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
}

impl FileKind {
    /// The kind that a mode's type bits name; an unknown type reads as a regular file.
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

    /// The type bits of a mode (`S_IFMT`).
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

/// What stat(2) says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// Device that holds the object.
    pub dev: u64,
    /// Inode number there.
    pub ino: u64,
    /// Type and permission bits.
    pub mode: u32,
    /// Hard links.
    pub nlink: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device node, in the C library's encoding.
    pub rdev: u64,
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes.
    pub blocks: u64,
    /// Preferred size of a transfer.
    pub blksize: u32,
    /// Last read.
    pub atime: Time,
    /// Last change of the content.
    pub mtime: Time,
    /// Last change of the attributes.
    pub ctime: Time,
}

impl Stat {
    /// The object's type.
    pub fn kind(&self) -> FileKind {
        FileKind::from_mode(self.mode)
    }

    /// Permission bits with setuid, setgid and sticky.
    pub fn perm(&self) -> u32 {
        self.mode & 0o7777
    }

    /// Whether this is a character device 0:0, overlayfs's whiteout.
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

/// lstat of a name in a folder.
pub fn stat_at(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Stat> {
    Ok(from_kernel(&rustix::fs::statat(
        dir,
        name,
        AtFlags::SYMLINK_NOFOLLOW,
    )?))
}

/// stat of an open object (an O_PATH descriptor will do).
pub fn stat_fd(fd: impl AsFd) -> Result<Stat> {
    Ok(from_kernel(&rustix::fs::fstat(fd)?))
}

/// Birth time where the file system keeps one.
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

/// Whether nothing can be written through the mount that `fd` was opened by.
pub fn is_read_only(fd: impl AsFd) -> bool {
    // One that can't be asked counts as one that can be written.
    statvfs(fd).is_ok_and(|all| all.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

/// Whether `fd` lies on overlayfs of the kernel, whose files lie on another file system in turn.
pub fn is_on_overlayfs(fd: impl AsFd) -> Result<bool> {
    // statfs(2): OVERLAYFS_SUPER_MAGIC.
    Ok(rustix::fs::fstatfs(fd)?.f_type == 0x794c_7630)
}

/// What statvfs says of the file system that holds `fd`.
pub fn statvfs(fd: impl AsFd) -> Result<rustix::fs::StatVfs> {
    Ok(rustix::fs::fstatvfs(fd)?)
}
