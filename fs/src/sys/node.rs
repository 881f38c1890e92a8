//! Making, linking, moving and removing names.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};

use crate::error::{Errno, Result};
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

/// A folder that is being emptied: it, the names left in it, its own name.
type Level = (OwnedFd, Vec<Box<[u8]>>, Box<[u8]>);

/// Removes `name` in `dir` with everything below it. Absent is fine.
pub fn remove_tree(dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    match unlink(dir, name) {
        Ok(()) => return Ok(()),
        Err(error) if error.is_absent() => return Ok(()),
        Err(error) if matches!(error.errno(), Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error),
    }
    // One level per turn of the loop, so that the depth of a tree is no depth of the stack.
    let mut open: Vec<Level> = Vec::new();
    let first = crate::sys::dir::open_dir(dir, name)?;
    let names = names_of(&first)?;
    open.push((first, names, name.into()));
    while let Some((fd, names, own)) = open.last_mut() {
        let Some(next) = names.pop() else {
            let own = std::mem::take(own);
            open.pop();
            let parent = open.last().map_or(dir, |(fd, _, _)| fd.as_fd());
            rmdir(parent, &own)?;
            continue;
        };
        match unlink(fd.as_fd(), &next) {
            Ok(()) => {}
            Err(error) if error.is_absent() => {}
            Err(error) if matches!(error.errno(), Errno::ISDIR | Errno::PERM) => {
                let inner = crate::sys::dir::open_dir(fd.as_fd(), &next)?;
                let inside = names_of(&inner)?;
                open.push((inner, inside, next));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn names_of(dir: &OwnedFd) -> Result<Vec<Box<[u8]>>> {
    let entries = crate::sys::dir::entries(dir.as_fd())?;
    Ok(entries.into_iter().map(|entry| entry.name).collect())
}
