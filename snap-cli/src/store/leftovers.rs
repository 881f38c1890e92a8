//! Leftovers: objects in a store that nothing references.

use std::collections::HashSet;
use std::path::PathBuf;

use super::deleted::{self, Deleted};
use super::lock::Lock;
use super::manifest::{ContainerId, LayerId};
use super::notes::{self, HELD};
use super::paths::LOCK;
use super::received::ReceivedLayer;
use super::survey::temporaries;
use super::transfers::Age;
use super::{Store, disk, layers, orphans, received, survey, transfers, trash};
use crate::error::Result;

/// The leftovers of a store.
#[derive(Debug, Default)]
pub struct Leftovers {
    /// Destroyed containers whose retention period is over.
    pub expired: Vec<Deleted>,
    /// Unreferenced layers.
    pub layers: Vec<LayerId>,
    /// Unreferenced layers that a mount holds: they are retained.
    pub held: Vec<LayerId>,
    /// Containers whose creation was interrupted.
    pub unfinished: Vec<ContainerId>,
    /// Temporary files, and files of snapshots that no container names.
    pub files: Vec<PathBuf>,
    /// Mount points, run directories and caches of containers that do not exist any more.
    pub dirs: Vec<PathBuf>,
    /// Interrupted downloads and uploads.
    pub transfers: Vec<PathBuf>,
    /// Stale lock files.
    pub locks: Vec<PathBuf>,
    /// Objects in the trash.
    pub trash: Vec<PathBuf>,
    /// Whether a change has been written and not committed yet.
    pub pending: bool,
}

impl Leftovers {
    /// Returns whether there is nothing to remove.
    pub fn is_empty(&self) -> bool {
        self.expired.is_empty()
            && self.layers.is_empty()
            && self.unfinished.is_empty()
            && self.files.is_empty()
            && self.dirs.is_empty()
            && self.transfers.is_empty()
            && self.locks.is_empty()
            && self.trash.is_empty()
    }
}

/// The treatment of objects before they expire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Destroyed containers.
    pub trash: Expiry,
    /// Layers and downloads of interrupted transfers.
    pub transfers: Expiry,
}

impl Retention {
    /// Everything is retained until it expires.
    pub const RESPECTED: Self = Self {
        trash: Expiry::Respected,
        transfers: Expiry::Respected,
    };
}

/// Whether objects are retained until they expire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// They are retained until they expire.
    Respected,
    /// All of them are leftovers.
    Ignored,
}

/// Returns whether there are probably leftovers. Cheap: reads no manifests.
pub(super) fn has_any(store: &Store) -> Result<bool> {
    // This releases the locks of the notes immediately. The sweep acquires them again under the exclusive lock.
    if !notes::lock_stale(store)?.is_empty() || !trash::list(store)?.is_empty() {
        return Ok(true);
    }
    if deleted::list(store)?.iter().any(Deleted::is_expired) {
        return Ok(true);
    }
    if !transfers::find(store, Age::Expired)?.is_empty() {
        return Ok(true);
    }
    if received::list(store)?.iter().any(ReceivedLayer::is_expired) {
        return Ok(true);
    }
    for (_, layer) in notes::list_held(store)? {
        if !layers::is_held(store, layer)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Finds the leftovers of a store.
///
/// The caller must hold the store's exclusive lock, because objects that a command is creating look like leftovers.
pub fn find(store: &Store, retention: Retention) -> Result<Leftovers> {
    let mut left = Leftovers {
        trash: trash::list(store)?,
        ..Leftovers::default()
    };
    let mut retained = Vec::new();
    for deleted in deleted::list(store)? {
        match retention.trash == Expiry::Ignored || deleted.is_expired() {
            true => left.expired.push(deleted),
            false => retained.push(deleted),
        }
    }
    let mut survey = survey::read(store, &retained)?;
    left.files = survey.files;
    for layer in received::list(store)? {
        match retention.transfers == Expiry::Ignored || layer.is_expired() {
            true => left.files.push(layer.file),
            false => {
                survey.used.insert(layer.id);
            }
        }
    }
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
            // Retain the layer until the error is fixed; collect the others.
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
    let age = match retention.transfers {
        Expiry::Respected => Age::Expired,
        Expiry::Ignored => Age::Any,
    };
    left.transfers = transfers::find(store, age)?;
    left.locks = stale_locks(store, &survey.used)?;
    Ok(left)
}

/// Returns the lock files of containers that do not exist any more, claims of names that no command holds, and notes on
/// layers that do not exist any more or that a manifest references now.
fn stale_locks(store: &Store, used: &HashSet<LayerId>) -> Result<Vec<PathBuf>> {
    let mut stale = Vec::new();
    for name in disk::names(&store.paths().locks())? {
        let path = store.paths().locks().join(&name);
        let own = name.strip_suffix(LOCK).unwrap_or(&name);
        let container = own.strip_prefix("container-").and_then(ContainerId::parse);
        let layer = own.strip_prefix(HELD).and_then(LayerId::parse);
        let is_stale = match (container, layer) {
            (Some(id), _) => !disk::exists(&store.paths().container_dir(id))?,
            // A layer of a transfer that was held before a container referenced it.
            (None, Some(id)) => used.contains(&id) || !disk::exists(&store.paths().layer_dir(id))?,
            (None, None) => {
                let is_temporary = own.starts_with("name-") || own.starts_with("settling-");
                is_temporary && !Lock::is_held(&path)?
            }
        };
        if is_stale {
            stale.push(path);
        }
    }
    Ok(stale)
}
