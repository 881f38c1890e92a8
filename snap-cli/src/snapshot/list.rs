//! What there is: containers, the snapshots of one, and what each takes on the disk.

use std::collections::HashSet;

use crate::container::find_snapshot;
use crate::error::Result;
use crate::store::Store;
use crate::store::manifest::{
    ContainerId, ContainerManifest, LayerId, LayerKind, SnapshotId, SnapshotKind,
};

/// A snapshot in a list.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its id.
    pub id: SnapshotId,
    /// Its name.
    pub name: String,
    /// Who made it.
    pub kind: SnapshotKind,
    /// When.
    pub created: String,
    /// The remark.
    pub comment: String,
    /// The name of the snapshot that it was made from.
    pub parent: Option<String>,
    /// Bytes written since then: what its own layers take.
    pub bytes: u64,
}

/// The snapshots of a container, oldest first. Sizes are counted the first time, and kept. Hold a shared
/// lock of the store.
pub fn snapshots(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut counted: HashSet<LayerId> = manifest.origin.iter().copied().collect();
    let name_of = |id: SnapshotId| {
        let known = manifest.snapshots.iter().find(|s| s.id == id)?;
        Some(known.name.to_string())
    };
    for known in &manifest.snapshots {
        let (_, snapshot) = find_snapshot(store, id, manifest, &known.name)?;
        let mut bytes = 0;
        for layer in &snapshot.stack {
            // What an older one holds already was not written for this one.
            if counted.insert(*layer) {
                let (kind, measured) = store.measured(*layer)?;
                if kind != LayerKind::Base {
                    bytes += measured.bytes;
                }
            }
        }
        entries.push(Entry {
            id: known.id,
            name: known.name.to_string(),
            kind: snapshot.kind,
            created: snapshot.created,
            comment: snapshot.comment,
            parent: snapshot.parent.and_then(name_of),
            bytes,
        });
    }
    Ok(entries)
}
