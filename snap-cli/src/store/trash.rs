//! The directory `trash`: unreferenced objects are moved to it with one rename, and then removed.

use std::path::PathBuf;

use super::disk::remove_tree;
use super::lock::{Lock, Mode};
use super::{Store, disk};
use crate::error::{Error, Result};

/// Moves a directory to the trash.
pub fn put(store: &Store, path: PathBuf, name: &str) -> Result<()> {
    disk::rename(&path, &store.paths().trash().join(name))
}

/// Returns the paths of the objects in the trash.
pub(super) fn list(store: &Store) -> Result<Vec<PathBuf>> {
    let trash = store.paths().trash();
    let names = disk::names(&trash)?;
    Ok(names.iter().map(|name| trash.join(name)).collect())
}

/// Removes the objects in the trash. Does nothing while another command empties the trash.
pub(super) fn empty(store: &Store) -> Result<()> {
    let command = &store.session().command;
    let path = store.paths().lock_file("trash");
    let Some(_lock) = Lock::try_take(&path, Mode::Exclusive, command)? else {
        return Ok(());
    };
    let mut failed = None;
    for path in list(store)? {
        // Continue with the other objects after a failure.
        if let Err(error) = remove_tree(&path) {
            retain_first(&mut failed, error);
        }
    }
    failed.map_or(Ok(()), Err)
}

/// Stores the first of several errors, for the caller to return; logs the others.
pub(super) fn retain_first(first: &mut Option<Error>, error: Error) {
    match first {
        None => *first = Some(error),
        Some(_) => log::warn!("{error}"),
    }
}
