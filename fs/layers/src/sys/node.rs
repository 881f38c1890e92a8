//! Making, linking, moving and removing names.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};

use crate::error::Result;
use crate::sys::fault;
use crate::sys::stat::FileKind;

/// Makes a folder; the thread's umask applies.
pub fn mkdir(dir: BorrowedFd<'_>, name: &[u8], mode: u32) -> Result<()> {
    fault::hit()?;
    Ok(rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(mode))?)
}

/// Makes an empty regular file, a fifo, a socket or a device; the thread's umask applies.
pub fn mknod(dir: BorrowedFd<'_>, name: &[u8], kind: FileKind, mode: u32, rdev: u64) -> Result<()> {
    fault::hit()?;
    if matches!(kind, FileKind::CharDevice | FileKind::BlockDevice) {
        fault::device()?;
    }
    let kind = FileType::from_raw_mode(kind.mode_bits());
    Ok(rustix::fs::mknodat(
        dir,
        name,
        kind,
        Mode::from_raw_mode(mode),
        rdev,
    )?)
}

/// Makes and opens a new regular file; EEXIST when the name is taken by anything.
pub fn create(dir: BorrowedFd<'_>, name: &[u8], mode: u32, access: OFlags) -> Result<OwnedFd> {
    fault::hit()?;
    let flags = access | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(
        dir,
        name,
        flags,
        Mode::from_raw_mode(mode),
    )?)
}

/// Makes a symbolic link.
pub fn symlink(dir: BorrowedFd<'_>, name: &[u8], target: &[u8]) -> Result<()> {
    fault::hit()?;
    Ok(rustix::fs::symlinkat(target, dir, name)?)
}

/// Gives the object `from` in `from_dir` another name; follows no link.
pub fn link(from_dir: BorrowedFd<'_>, from: &[u8], dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    fault::hit()?;
    Ok(rustix::fs::linkat(
        from_dir,
        from,
        dir,
        name,
        AtFlags::empty(),
    )?)
}

/// Gives an open object (O_PATH will do) another name. The object must still have a name.
pub fn link_fd(fd: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    fault::hit()?;
    let path = crate::sys::proc_path(fd);
    Ok(rustix::fs::linkat(
        CWD,
        path.as_slice(),
        dir,
        name,
        AtFlags::SYMLINK_FOLLOW,
    )?)
}

/// Removes a name that is no folder.
pub fn unlink(dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    fault::hit()?;
    Ok(rustix::fs::unlinkat(dir, name, AtFlags::empty())?)
}

/// Removes an empty folder.
pub fn rmdir(dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    fault::hit()?;
    Ok(rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)?)
}

/// How a rename treats what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameHow {
    /// Replace the target when there is one.
    Replace,
    /// EEXIST when there is a target.
    NoReplace,
    /// Swap the two.
    Exchange,
    /// Replace, and leave a 0:0 device at the old name.
    Whiteout,
}

/// renameat2.
pub fn rename(
    from_dir: BorrowedFd<'_>,
    from: &[u8],
    to_dir: BorrowedFd<'_>,
    to: &[u8],
    how: RenameHow,
) -> Result<()> {
    fault::hit()?;
    if how == RenameHow::Whiteout {
        fault::device()?;
    }
    let flags = match how {
        RenameHow::Replace => RenameFlags::empty(),
        RenameHow::NoReplace => RenameFlags::NOREPLACE,
        RenameHow::Exchange => RenameFlags::EXCHANGE,
        RenameHow::Whiteout => RenameFlags::WHITEOUT,
    };
    Ok(rustix::fs::renameat_with(
        from_dir, from, to_dir, to, flags,
    )?)
}
