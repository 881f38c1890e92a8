//! Interrupted transfers: blobs that were not downloaded completely, and images that were to be uploaded.
//!
//! A command locks the files and directories that it uses, whatever their age. A download is continued by the next command
//! that needs the blob, so it is retained for a day. The directory of a push that was killed serves no other command.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::lock::Lock;
use super::{Store, disk};
use crate::error::{Error, Result};

/// The time for which an interrupted download is retained after its last write.
const RETENTION: Duration = Duration::from_secs(24 * 3600);

/// The age of interrupted downloads that are to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Age {
    /// Those that were not continued for a day.
    Expired,
    /// All of them.
    Any,
}

/// Returns the interrupted transfers that are to be removed, and that no command uses.
pub(super) fn find(store: &Store, age: Age) -> Result<Vec<PathBuf>> {
    let dir = store.paths().transfers();
    let mut found = Vec::new();
    for name in disk::names(&dir)? {
        let path = dir.join(&name);
        if is_removable(&path, age)? {
            found.push(path);
        }
    }
    Ok(found)
}

fn is_removable(path: &Path, wanted: Age) -> Result<bool> {
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        // A race: its command has removed it.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::at("inspect", path, error)),
    };
    if !meta.is_dir() && !meta.is_file() {
        return Ok(true);
    }
    let modified = meta
        .modified()
        .map_err(|error| Error::at("inspect", path, error))?;
    // After a change of the clock, the age is unknown.
    let age = SystemTime::now()
        .duration_since(modified)
        .unwrap_or(RETENTION);
    let is_continued = meta.is_file() && wanted == Age::Expired && age < RETENTION;
    Ok(!is_continued && !is_used(path)?)
}

/// Returns whether a command uses a transfer; false if its command has removed it.
fn is_used(path: &Path) -> Result<bool> {
    match Lock::is_used(path) {
        Err(_) if !disk::exists(path)? => Ok(false),
        other => other,
    }
}

/// Removes an interrupted transfer, unless a command uses it by now.
pub(super) fn remove(path: &Path) -> Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(meta) if (meta.is_file() || meta.is_dir()) && is_used(path)? => Ok(()),
        Ok(meta) if meta.is_dir() => disk::remove_tree(path),
        Ok(_) => disk::remove_if_exists(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::at("inspect", path, error)),
    }
}

/// Returns the allocated size of interrupted transfers in bytes, and the number of their files and directories.
pub fn size(paths: &[PathBuf]) -> (u64, u64) {
    let mut todo = paths.to_vec();
    let (mut bytes, mut inodes) = (0, 0);
    while let Some(path) = todo.pop() {
        let Ok(meta) = std::fs::symlink_metadata(&path) else {
            continue;
        };
        bytes += meta.blocks() * 512;
        inodes += 1;
        if meta.is_dir()
            && let Ok(entries) = std::fs::read_dir(&path)
        {
            todo.extend(entries.flatten().map(|entry| entry.path()));
        }
    }
    (bytes, inodes)
}
