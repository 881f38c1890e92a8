//! Creates, links, renames and removes directory entries.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};

use super::open;
use crate::error::Result;
use crate::sys::fault;
use crate::sys::stat::FileKind;

/// Creates a directory. The thread's umask applies.
pub fn mkdir(dir: BorrowedFd<'_>, name: &[u8], mode: u32) -> Result<()> {
    let _change = fault::begin()?;
    Ok(rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(mode))?)
}

/// Creates an empty regular file, a FIFO, a socket or a device. The thread's umask applies.
pub fn mknod(dir: BorrowedFd<'_>, name: &[u8], kind: FileKind, mode: u32, rdev: u64) -> Result<()> {
    let _change = fault::begin()?;
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

/// Creates and opens a regular file; fails with EEXIST if the name exists. The thread's umask applies.
pub fn create(dir: BorrowedFd<'_>, name: &[u8], mode: u32, access: OFlags) -> Result<OwnedFd> {
    let _change = fault::begin()?;
    let flags = access | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(open::openat(dir, name, flags, Mode::from_raw_mode(mode))?)
}

/// Creates a regular file without a name in the file system of a directory; [`link_fd`] can give it one.
pub fn create_nameless(dir: BorrowedFd<'_>, mode: u32) -> Result<OwnedFd> {
    let _change = fault::begin()?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(open::openat(dir, ".", flags, Mode::from_raw_mode(mode))?)
}

/// Creates a symbolic link.
pub fn symlink(dir: BorrowedFd<'_>, name: &[u8], target: &[u8]) -> Result<()> {
    let _change = fault::begin()?;
    Ok(rustix::fs::symlinkat(target, dir, name)?)
}

/// Creates a hard link to the object `from` in `from_dir`. Does not follow links.
pub fn link(from_dir: BorrowedFd<'_>, from: &[u8], dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    let _change = fault::begin()?;
    Ok(rustix::fs::linkat(
        from_dir,
        from,
        dir,
        name,
        AtFlags::empty(),
    )?)
}

/// Creates a hard link to the object behind a descriptor, which may be O_PATH. Its link count must not be 0, unless
/// [`create_nameless`] has created it.
pub fn link_fd(fd: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    let _change = fault::begin()?;
    let path = crate::sys::proc_path(fd);
    Ok(rustix::fs::linkat(
        CWD,
        path.as_slice(),
        dir,
        name,
        AtFlags::SYMLINK_FOLLOW,
    )?)
}

/// Removes a name of an object that is not a directory.
pub fn unlink(dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    let _change = fault::begin()?;
    Ok(rustix::fs::unlinkat(dir, name, AtFlags::empty())?)
}

/// Removes an empty directory.
pub fn rmdir(dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    let _change = fault::begin()?;
    Ok(rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)?)
}

/// The mode of a rename: its treatment of the target and the old name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    /// Replaces an existing target.
    Replace,
    /// Fails with EEXIST if the target exists (RENAME_NOREPLACE).
    NoReplace,
    /// Exchanges both objects (RENAME_EXCHANGE).
    Exchange,
    /// Replaces an existing target, and leaves a device 0:0 at the old name (RENAME_WHITEOUT).
    Whiteout,
}

/// Renames an object (renameat2(2)).
pub fn rename(
    from_dir: BorrowedFd<'_>,
    from: &[u8],
    to_dir: BorrowedFd<'_>,
    to: &[u8],
    how: RenameMode,
) -> Result<()> {
    let _change = fault::begin()?;
    if how == RenameMode::Whiteout {
        fault::device()?;
    }
    let flags = match how {
        RenameMode::Replace => RenameFlags::empty(),
        RenameMode::NoReplace => RenameFlags::NOREPLACE,
        RenameMode::Exchange => RenameFlags::EXCHANGE,
        RenameMode::Whiteout => RenameFlags::WHITEOUT,
    };
    Ok(rustix::fs::renameat_with(
        from_dir, from, to_dir, to, flags,
    )?)
}
