//! Lists the snapshots of a container, each with the number of bytes written for it.

use std::collections::{HashMap, HashSet};

use crate::container::durability::epoch;
use crate::error::Result;
use crate::store::Store;
use crate::store::manifest::{
    ContainerId, ContainerManifest, Durability, LayerId, LayerKind, SnapshotRef,
};
use crate::store::sizes::Sizes;

/// A snapshot in a list.
#[derive(Clone, Debug)]
pub struct SnapshotEntry {
    /// The snapshot as its container's manifest lists it.
    pub snapshot: SnapshotRef,
    /// The name of the parent snapshot.
    pub parent: Option<String>,
    /// The number of bytes written since the parent: the size of the snapshot's own layer.
    pub bytes: u64,
    /// Whether a power cut can lose a part of the snapshot.
    pub durability: Durability,
}

/// Returns the snapshots of a container, oldest first.
///
/// Layers are measured once, and their sizes are stored. The caller must hold a shared lock of the store.
pub fn list_snapshots(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
) -> Result<Vec<SnapshotEntry>> {
    let epoch = epoch(store)?;
    let mut sizes = Sizes::read(store, id);
    // A layer that an older state contains was not written for this snapshot.
    let mut counted: HashSet<LayerId> = manifest.origin.iter().copied().collect();
    let names: HashMap<_, _> = manifest.snapshots.iter().map(|s| (s.id, &s.name)).collect();
    let mut entries = Vec::with_capacity(manifest.snapshots.len());
    for snapshot in &manifest.snapshots {
        let bytes = match counted.insert(snapshot.layer) {
            true => match sizes.measured(snapshot.layer)? {
                (LayerKind::Base, _) => 0,
                (_, measured) => measured.bytes,
            },
            false => 0,
        };
        let parent = snapshot.parent.and_then(|id| names.get(&id));
        entries.push(SnapshotEntry {
            durability: Durability::from_settling(snapshot.settling.as_ref(), &epoch),
            snapshot: snapshot.clone(),
            parent: parent.map(|name| name.to_string()),
            bytes,
        });
    }
    sizes.save();
    Ok(entries)
}
