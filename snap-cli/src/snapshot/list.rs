//! What there is: the snapshots of a container, and what was written for each.

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
pub struct Entry {
    /// What its container says of it.
    pub snapshot: SnapshotRef,
    /// The name of the snapshot that it was made from.
    pub parent: Option<String>,
    /// Bytes written since then: what its own layer takes.
    pub bytes: u64,
    /// How much of it a power cut can take.
    pub durability: Durability,
}

/// The snapshots of a container, oldest first. Sizes are counted the first time, and kept. Hold a shared
/// lock of the store.
pub fn snapshots(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
) -> Result<Vec<Entry>> {
    let epoch = epoch(store)?;
    let mut sizes = Sizes::read(store, id);
    // What an older one holds already was not written for this one.
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
        entries.push(Entry {
            durability: Durability::from_settling(snapshot.settling.as_ref(), &epoch),
            snapshot: snapshot.clone(),
            parent: parent.map(|name| name.to_string()),
            bytes,
        });
    }
    sizes.save();
    Ok(entries)
}
