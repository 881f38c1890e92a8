//! The active snapshot of a commit that containerd has not recorded.

use cowl_layers::points::point;
use serde_json::Map;

use super::committed;
use crate::error::{Error, Result};
use crate::lifecycle::create::create_over_layers_with;
use crate::store::containerd::ContainerdRecord;
use crate::store::creation::Creation;
use crate::store::manifest::{ContainerId, ContainerManifest};
use crate::store::name::ContainerName;
use crate::store::record::Record;
use crate::store::{Store, disk};

/// Recreates the active snapshot that a committed one was before its commit, with the same content. Returns its
/// container and its record. The snapshots that commands had taken of it exist in both.
///
/// The committed snapshot remains. The new container shares its layers, and gets a head of its own: the recorded
/// properties of a frozen layer, such as its size or its durability, would no longer be true if it were written to
/// again.
pub fn uncommit(
    store: &Store,
    id: ContainerId,
    name: &ContainerName,
) -> Result<(ContainerId, ContainerdRecord)> {
    // From here on, the layers are not collected.
    let creation = Creation::begin(store)?;
    let before = committed(store, id)?;
    let record = before.containerd.as_deref();
    let record = record.and_then(ContainerdRecord::before_commit);
    let record = record.ok_or_else(|| {
        Error::failed(format!(
            "{} does not name the snapshot before its commit",
            before.name
        ))
    })?;
    let boxed = Some(Box::new(record.clone()));
    let stack = before.stack.clone();
    let body = (name, stack.as_slice(), Map::new());
    let active = create_over_layers_with(store, creation, body, |active, manifest| {
        copy_snapshots(store, &before, id, active)?;
        // The origin, the counters and everything else are as before the commit.
        *manifest = ContainerManifest {
            name: manifest.name.clone(),
            head: manifest.head,
            stack: manifest.stack.clone(),
            containerd: boxed,
            ..before
        };
        Ok(())
    })?;
    point("commit undone");
    Ok((active, record))
}

/// Copies the files of the snapshots in `manifest` from one container to a new one, durably.
fn copy_snapshots(
    store: &Store,
    manifest: &ContainerManifest,
    from: ContainerId,
    to: ContainerId,
) -> Result<()> {
    for snapshot in &manifest.snapshots {
        let path = store.paths().snapshot_file(to, snapshot.id);
        let body = store.snapshot(from, snapshot.id)?;
        disk::write_new(&path, &Record::first(body))?;
        disk::sync_file(&path)?;
    }
    disk::sync_file(&store.paths().snapshots_dir(to))
}
