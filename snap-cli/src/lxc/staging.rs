//! Staging directories, in which restores are prepared, and their locks.
//!
//! A staging directory is next to the one that it will replace. A locked one is in use by a command; an
//! unlocked one was left by a command that was killed.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowl_layers::shown::Show as _;
use cowl_layers::sys::dir;

use super::command::LxcContainer;
use super::layout::{self, Rootfs};
use crate::error::{Error, Result};
use crate::host::files;
use crate::store::disk;
use crate::store::disk::remove_tree;

/// The prefix of staging directories.
const STAGING: &str = ".cowl-restore.";

/// Returns the path of the staging directory for `path`.
pub(super) fn staging_path(path: &Path) -> Option<PathBuf> {
    let mut name = OsString::from(STAGING);
    name.push(path.file_name()?);
    Some(path.with_file_name(name))
}

/// Returns the location of the container's files and its upper directory, with symbolic links resolved if it exists.
pub(super) fn live_top(container: &LxcContainer) -> Result<Option<(Rootfs, PathBuf)>> {
    let file = container.config();
    let text = files::read(&file)?;
    let Some(rootfs) = layout::rootfs(&text) else {
        return Ok(None);
    };
    let Some(top) = rootfs.top() else {
        return Ok(None);
    };
    let top = match std::fs::canonicalize(top) {
        Ok(real) => real,
        Err(error) if error.kind() == ErrorKind::NotFound => top.to_path_buf(),
        Err(error) => return Err(Error::at("inspect", top, error)),
    };
    Ok(Some((rootfs, top)))
}

/// Removes the remains of interrupted restores: incomplete copies, and files that were replaced.
pub(super) fn remove_staging(container: &LxcContainer, patience: Duration) -> Result<()> {
    let found = live_top(container)?;
    if let Some(left) = found.and_then(|(_, top)| staging_path(&top)) {
        remove_tree(&left)?;
    }
    let lxcpath = &container.lxcpath;
    let _lock = lock_dir(lxcpath, patience)?;
    for name in disk::names(lxcpath)? {
        let left = lxcpath.join(&name);
        if name.starts_with(STAGING) && left != container.dir() && is_abandoned(&left)? {
            remove_tree(&left)?;
        }
    }
    Ok(())
}

/// Locks a directory exclusively, for as long as the returned value exists.
pub(super) fn lock_dir(dir: &Path, patience: Duration) -> Result<OwnedFd> {
    const PAUSE: Duration = Duration::from_millis(20);
    let at = |error: cowl_layers::Error| Error::at("lock", dir, error);
    let until = Instant::now() + patience;
    let opened = dir::open_root(dir).map_err(at)?;
    loop {
        if let Some(lock) = dir::lock_exclusive(opened.as_fd()).map_err(at)? {
            return Ok(lock);
        }
        if Instant::now() >= until {
            return Err(Error::busy(format!(
                "cannot lock {}: another command held it for {} s",
                dir.shown(),
                patience.as_secs()
            ))
            .hint("retry when that command has finished"));
        }
        std::thread::sleep(PAUSE);
    }
}

/// Creates a directory with the mode that LXC's tools use.
pub(super) fn make_dir(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .mode(0o770)
        .create(path)
        .map_err(|error| Error::at("create the directory", path, error))
}

/// Returns whether no command works in the staging directory any more.
fn is_abandoned(path: &Path) -> Result<bool> {
    let locked = dir::open_root(path).and_then(|opened| dir::lock_exclusive(opened.as_fd()));
    match locked {
        Ok(lock) => Ok(lock.is_some()),
        Err(error) if error.is_absent() => Ok(false),
        Err(error) => Err(Error::at("lock", path, error)),
    }
}

/// Creates and locks a staging directory.
pub(super) fn create_locked(path: &Path, name: &str, patience: Duration) -> Result<OwnedFd> {
    let _lock = lock_dir(path.parent().unwrap_or(path), patience)?;
    if disk::exists(path)? {
        if !is_abandoned(path)? {
            return Err(Error::busy(format!("another command is creating {name}"))
                .hint("retry when that command has finished"));
        }
        remove_tree(path)?;
    }
    make_dir(path)?;
    lock_dir(path, patience)
}
