//! Limits what the manifest of another host can claim about a container.
//!
//! Neither the settings nor the times and kinds of received snapshots may decide which snapshots of this host are pruned.

use std::collections::{BTreeMap, HashSet};
use std::io::ErrorKind;

use serde::Serialize;

use super::super::foreign;
use super::import::next_after;
use super::manifest::WholeManifest;
use crate::error::{Error, Result};
use crate::snapshot::prune;
use crate::store::Store;
use crate::store::manifest::{
    ContainerId, ContainerManifest, LayerId, SnapshotId, SnapshotManifest,
};
use crate::store::name::SnapshotName;
use crate::store::span;

/// The maximum size of a container's manifests together: half of what an archive can contain.
const MAX_MANIFESTS: u64 = 16 << 20;

/// The container that receives snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiveTarget {
    /// It is created.
    New,
    /// It exists. Its current state and its snapshots do not change.
    Existing,
}

/// Removes or corrects claims. Fails if a number cannot be corrected without another name.
pub(super) fn limit(manifest: &mut WholeManifest, target: ReceiveTarget) -> Result<()> {
    let container = &mut manifest.container;
    let states = manifest.states.values_mut();
    let settings = states.map(|state| &mut state.settings);
    for settings in settings.chain([&mut container.settings]) {
        prune::remove_rules(settings);
    }
    for snapshot in &mut container.snapshots {
        let is_numbered = ["snap", "auto"].map(|prefix| next_after(&snapshot.name, prefix) > 0);
        match target {
            ReceiveTarget::Existing => foreign::limit_claims(snapshot),
            ReceiveTarget::New if snapshot.name.is_reserved() && is_numbered == [false; 2] => {
                return Err(Error::failed(format!(
                    "cannot receive the snapshot {}: its number is larger than {}, or begins with 0",
                    snapshot.name,
                    SnapshotName::MAX_NUMBER
                ))
                .hint("the stream is damaged, or the sender is not cowl"));
            }
            ReceiveTarget::New => foreign::limit_texts(snapshot),
        }
    }
    container.created = span::claimed(Some(&container.created));
    for entry in &mut manifest.layers {
        // Nothing is selected by it. It is a part of the images of the layer, which must not depend on the clock here.
        let time = &mut entry.layer.created;
        *time = span::valid(time);
    }
    for counter in [&mut container.next_snap, &mut container.next_auto] {
        *counter = (*counter).min(SnapshotName::MAX_NUMBER);
    }
    Ok(())
}

/// Returns whether the archive mentions one of the layers, given by their ids across stores.
///
/// Without such an id, the store can share none of its layers with the archive.
pub(super) fn has_layer_of(manifest: &WholeManifest, own: &HashSet<LayerId>) -> bool {
    let base = manifest.base.iter().map(|entry| entry.identity.id);
    let layers = manifest.layers.iter();
    let sent = layers.map(|entry| entry.known_as.unwrap_or(entry.id));
    base.chain(sent).any(|id| own.contains(&id))
}

/// Refuses a container whose manifests would be too large to be exported or sent: comments and lists have no limit of their
/// own.
///
/// `sent` has the manifests of those that the store does not have yet.
pub(super) fn check_size(
    store: &Store,
    (id, next): (ContainerId, &ContainerManifest),
    sent: &BTreeMap<SnapshotId, SnapshotManifest>,
) -> Result<()> {
    let mut size = encoded_len(next)?;
    for snapshot in &next.snapshots {
        let path = store.paths().snapshot_file(id, snapshot.id);
        size += match (path.symlink_metadata(), sent.get(&snapshot.id)) {
            (Ok(file), _) => file.len(),
            (Err(error), Some(sent)) if error.kind() == ErrorKind::NotFound => encoded_len(sent)?,
            (Err(error), _) => return Err(Error::at("stat", &path, error)),
        };
    }
    if size <= MAX_MANIFESTS {
        return Ok(());
    }
    Err(Error::failed(format!(
        "cannot add snapshots to {}: its manifests would have {size} bytes, more than {}",
        next.name, MAX_MANIFESTS
    ))
    .hint(
        "remove snapshots that are not needed, or receive it under another name: cowl receive NAME",
    ))
}

fn encoded_len(manifest: &impl Serialize) -> Result<u64> {
    let encoded = serde_json::to_vec(manifest);
    let encoded =
        encoded.map_err(|error| Error::failed("cannot write the manifest").because(error))?;
    Ok(encoded.len() as u64)
}
