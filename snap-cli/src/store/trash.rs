//! The directory `trash`: what is in it was moved there when nothing named it any more, and is only removed.

use std::path::PathBuf;

use super::disk::remove_tree;
use super::lock::{Lock, Mode};
use super::{Store, disk};
use crate::error::{Error, Result};

/// Moves a directory to the trash.
pub fn put(store: &Store, path: PathBuf, name: &str) -> Result<()> {
    disk::rename(&path, &store.paths().trash().join(name))
}

/// Lists what is in the trash.
pub(super) fn list(store: &Store) -> Result<Vec<PathBuf>> {
    let trash = store.paths().trash();
    let names = disk::names(&trash)?;
    Ok(names.iter().map(|name| trash.join(name)).collect())
}

/// Removes what is in the trash. Nothing is done while another command does so.
pub(super) fn empty(store: &Store) -> Result<()> {
    let command = &store.session().command;
    let path = store.paths().lock_file("trash");
    // One is enough.
    let Some(_lock) = Lock::try_take(&path, Mode::Exclusive, command)? else {
        return Ok(());
    };
    let mut failed = None;
    for path in list(store)? {
        // One that cannot be removed keeps none of the others.
        if let Err(error) = remove_tree(&path) {
            retain_first(&mut failed, error);
        }
    }
    failed.map_or(Ok(()), Err)
}

/// Keeps the first of several errors to be returned; the others are reported at once.
pub(super) fn retain_first(first: &mut Option<Error>, error: Error) {
    match first {
        None => *first = Some(error),
        Some(_) => log::warn!("{error}"),
    }
}
