//! What is in a store and needed by nothing.

use std::path::PathBuf;

use super::deleted::{self, Deleted};
use super::lock::Lock;
use super::manifest::{ContainerId, LayerId};
use super::notes::{self, HELD};
use super::paths::LOCK;
use super::survey::temporaries;
use super::{Store, disk, layers, orphans, survey, trash};
use crate::error::Result;

/// What lies about that nothing needs.
#[derive(Debug, Default)]
pub struct Leftovers {
    /// Destroyed containers whose time is over.
    pub expired: Vec<Deleted>,
    /// Layers that nothing names.
    pub layers: Vec<LayerId>,
    /// Layers that nothing names, but that some mount holds: they stay.
    pub held: Vec<LayerId>,
    /// Containers whose making was cut off.
    pub unfinished: Vec<ContainerId>,
    /// Temporary files, and files of snapshots that no container names.
    pub files: Vec<PathBuf>,
    /// Mount points, run dirs and caches of containers that are gone.
    pub dirs: Vec<PathBuf>,
    /// Locks that nobody needs any more.
    pub locks: Vec<PathBuf>,
    /// What is on its way out already.
    pub trash: Vec<PathBuf>,
    /// Some change waits for its commit.
    pub pending: bool,
}

impl Leftovers {
    /// Whether there is nothing to remove.
    pub fn is_empty(&self) -> bool {
        self.expired.is_empty()
            && self.layers.is_empty()
            && self.unfinished.is_empty()
            && self.files.is_empty()
            && self.dirs.is_empty()
            && self.locks.is_empty()
            && self.trash.is_empty()
    }
}

/// Whether destroyed containers stay for the time for which they can be brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// They stay.
    Respected,
    /// They are leftovers, whatever their time.
    Ignored,
}

/// Returns whether there is a sign of any leftover: cheap, as it reads no manifest.
pub(super) fn has_any(store: &Store) -> Result<bool> {
    // Lets go of the notes again at once: the sweep takes them when it is alone.
    if !notes::lock_stale(store)?.is_empty() || !trash::list(store)?.is_empty() {
        return Ok(true);
    }
    if deleted::list(store)?.iter().any(Deleted::is_expired) {
        return Ok(true);
    }
    for (_, layer) in notes::list_held(store)? {
        if !layers::is_held(store, layer)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Finds what nothing needs. The caller holds the store's exclusive lock: what a command is just making looks like a
/// leftover.
pub fn find(store: &Store, expiry: Expiry) -> Result<Leftovers> {
    let mut left = Leftovers {
        trash: trash::list(store)?,
        ..Leftovers::default()
    };
    let mut kept = Vec::new();
    for deleted in deleted::list(store)? {
        match expiry == Expiry::Ignored || deleted.is_expired() {
            true => left.expired.push(deleted),
            false => kept.push(deleted),
        }
    }
    let survey = survey::read(store, &kept)?;
    left.files = survey.files;
    left.pending = survey.pending;
    for id in store.layer_ids()? {
        if survey.used.contains(&id) {
            match temporaries(&store.paths().layer_dir(id)) {
                Ok(files) => left.files.extend(files),
                Err(error) => log::warn!("{error}"),
            }
            continue;
        }
        match layers::is_held(store, id) {
            Ok(true) => left.held.push(id),
            Ok(false) => left.layers.push(id),
            // It stays until that is put in order; the others go.
            Err(error) => log::warn!("{error}"),
        }
    }
    for name in disk::names(&store.paths().containers())? {
        if let Some(id) = ContainerId::parse(&name)
            && !disk::exists(&store.paths().container_file(id))?
        {
            left.unfinished.push(id);
        }
    }
    left.files.extend(temporaries(&store.paths().caches())?);
    left.dirs = orphans::list(store)?;
    left.locks = stale_locks(store)?;
    Ok(left)
}

/// Locks of containers that are gone, claims of names that nobody holds, and notes on layers that are
/// gone.
fn stale_locks(store: &Store) -> Result<Vec<PathBuf>> {
    let mut stale = Vec::new();
    for name in disk::names(&store.paths().locks())? {
        let path = store.paths().locks().join(&name);
        let own = name.strip_suffix(LOCK).unwrap_or(&name);
        let container = own.strip_prefix("container-").and_then(ContainerId::parse);
        let layer = own.strip_prefix(HELD).and_then(LayerId::parse);
        let gone = match (container, layer) {
            (Some(id), _) => !disk::exists(&store.paths().container_dir(id))?,
            (None, Some(id)) => !disk::exists(&store.paths().layer_dir(id))?,
            (None, None) => {
                let passing = own.starts_with("name-") || own.starts_with("settling-");
                passing && !Lock::is_held(&path)?
            }
        };
        if gone {
            stale.push(path);
        }
    }
    Ok(stale)
}
