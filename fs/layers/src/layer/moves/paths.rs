//! Paths in the layers between which files move. They are opened one component at a time, and symbolic links are not
//! resolved.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::MovedFile;
use crate::error::{Errno, Result};
use crate::name::{Name, split};
use crate::sys;

/// Opens the directory of a path, and returns it with the last name; `None` if it does not exist.
pub(super) fn parent(root: &OwnedFd, path: &[u8]) -> Result<Option<(OwnedFd, Name)>> {
    let (dir, last) = split(path);
    let last = Name::new(last)?;
    Ok(open_below(root, dir)?.map(|dir| (dir, last)))
}

/// Opens the directory at a path below `root`, one component at a time; `None` if it does not exist.
pub(super) fn open_below(root: &OwnedFd, path: &[u8]) -> Result<Option<OwnedFd>> {
    let mut dir = sys::dir::duplicate(root.as_fd())?;
    for part in path
        .split(|&byte| byte == b'/')
        .filter(|part| !part.is_empty())
    {
        dir = match sys::dir::open_dir(dir.as_fd(), &Name::new(part)?) {
            Ok(below) => below,
            Err(error) if error.is_absent() || error.errno() == Errno::LOOP => return Ok(None),
            Err(error) => return Err(error),
        };
    }
    Ok(Some(dir))
}

/// Returns whether the name refers to the file.
pub(super) fn is_file(dir: &OwnedFd, name: &Name, file: &MovedFile) -> Result<bool> {
    match sys::stat::stat_at(dir.as_fd(), name) {
        Ok(stat) => Ok(stat.ino == file.ino),
        Err(error) if error.is_absent() => Ok(false),
        Err(error) => Err(error),
    }
}

pub(super) fn is_absent(dir: &OwnedFd, name: &[u8]) -> Result<bool> {
    match sys::stat::stat_at(dir.as_fd(), name) {
        Ok(_) => Ok(false),
        Err(error) if error.is_absent() => Ok(true),
        Err(error) => Err(error),
    }
}

pub(super) fn unlink_if_exists(dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    match sys::node::unlink(dir, name) {
        Err(error) if !error.is_absent() => Err(error),
        _ => Ok(()),
    }
}
