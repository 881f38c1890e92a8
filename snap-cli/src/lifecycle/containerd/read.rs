//! Reads containerd's snapshots, and measures them.

use std::collections::HashSet;

use crate::error::{Error, Result};
use crate::recover;
use crate::store::containerd::{ContainerdKind, ContainerdRecord, is_reserved};
use crate::store::manifest::{ContainerId, ContainerManifest, LayerId, Measured};
use crate::store::name::ContainerName;
use crate::store::{Store, disk, measure};

/// A snapshot of a store.
#[derive(Clone, Debug)]
pub struct LoadedSnapshot {
    /// Its container.
    pub id: ContainerId,
    /// The name of the container.
    pub name: ContainerName,
    /// The record.
    pub record: ContainerdRecord,
}

/// The snapshots of a store that can be read.
#[derive(Debug)]
pub struct Loaded {
    /// The snapshots.
    pub snapshots: Vec<LoadedSnapshot>,
    /// Whether there may be others, whose manifests cannot be read. A new key could be one of theirs.
    pub incomplete: bool,
}

/// Returns the snapshots of a store. Completes or rolls back interrupted operations on them.
///
/// Manifests that cannot be read are logged.
pub fn load(store: &Store) -> Result<Loaded> {
    let mut loaded = Loaded {
        snapshots: Vec::new(),
        incomplete: false,
    };
    for (id, read) in store.containers()? {
        match read.and_then(|record| load_one(store, id, &record.body)) {
            Ok(found) => loaded.snapshots.extend(found),
            Err(error) => {
                log::error!("{error}");
                loaded.incomplete |= may_be_snapshot(store, id);
            }
        }
    }
    Ok(loaded)
}

/// Completes interrupted operations on a container, and returns the snapshot that it is.
fn load_one(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
) -> Result<Option<LoadedSnapshot>> {
    if manifest.containerd.is_none() {
        return Ok(None);
    }
    if disk::exists(&store.paths().pending_file(id))? {
        // Dropping the container releases its lock.
        drop(recover::open_for_containerd(store, id)?);
    }
    reload(store, id)
}

/// Returns whether a container whose manifest cannot be read may belong to containerd: its name is unknown, or has the
/// prefix of containerd's.
fn may_be_snapshot(store: &Store, id: ContainerId) -> bool {
    match store.name_of(id) {
        Ok(Some(name)) => is_reserved(&name),
        Ok(None) | Err(_) => true,
    }
}

/// Returns a snapshot of a store; `None` if it does not exist any more.
pub fn reload(store: &Store, id: ContainerId) -> Result<Option<LoadedSnapshot>> {
    let Some(found) = store.container(id)? else {
        return Ok(None);
    };
    let ContainerManifest {
        name, containerd, ..
    } = found.body;
    Ok(containerd.map(|record| LoadedSnapshot {
        id,
        name,
        record: *record,
    }))
}

/// Returns the size of the layers of a snapshot that its parent does not have.
///
/// The recorded size of a frozen layer is used; only the first call measures it. The head of an active snapshot is
/// measured each time.
pub fn usage(store: &Store, id: ContainerId, parent: Option<ContainerId>) -> Result<Measured> {
    let _reading = store.lock_shared()?;
    let read = |id: ContainerId| -> Result<ContainerManifest> {
        let found = store.container(id)?.map(|record| record.body);
        found.ok_or_else(|| Error::not_found(format!("the snapshot {id} does not exist any more")))
    };
    let manifest = read(id)?;
    let below: HashSet<_> = match parent {
        Some(parent) => read(parent)?.stack.into_iter().collect(),
        // The empty layer that each snapshot without a parent has.
        None => manifest.stack.last().copied().into_iter().collect(),
    };
    let mut total = Measured {
        bytes: 0,
        files: 0,
        inodes: 0,
    };
    let is_view = manifest
        .containerd
        .as_deref()
        .is_some_and(|record| record.kind == ContainerdKind::View);
    let own = manifest.stack.iter().filter(|layer| !below.contains(layer));
    for layer in own {
        let measured = match manifest.written_head() == Some(*layer) {
            // Nothing is written to it.
            true if is_view => continue,
            true => measure_head(store, *layer)?,
            false => measure::measured(store, *layer)?.1,
        };
        total.bytes += measured.bytes;
        total.files += measured.files;
        total.inodes += measured.inodes;
    }
    Ok(total)
}

/// Measures a layer that programs write to. A race: a file that is removed in the meantime is an error of the walk.
fn measure_head(store: &Store, head: LayerId) -> Result<Measured> {
    const ATTEMPTS: usize = 5;
    for _ in 1..ATTEMPTS {
        match measure::measure(store, head) {
            Ok((measured, _)) => return Ok(measured),
            Err(error) => log::debug!("{error}; retrying"),
        }
    }
    Ok(measure::measure(store, head)?.0)
}
