//! Receives a container, or snapshots for a container that exists.

use std::collections::{HashMap, HashSet};

use super::arrival::{self, Arrival};
use super::claims::{self, ReceiveTarget};
use super::import::{self, SentConfigs};
use super::manifest::{WholeManifest, map_ids};
use super::merge::{self, AddedSnapshot, ChangedSnapshot};
use crate::archive::bundle::BundleReader;
use crate::container::{Container, Swap};
use crate::error::{Error, Result};
use crate::recover;
use crate::store::bytes::Blob;
use crate::store::creation::Creation;
use crate::store::manifest::{
    ContainerId, ContainerManifest, LayerId, SnapshotId, SnapshotManifest, SnapshotRef,
};
use crate::store::name::{ContainerName, SnapshotName};
use crate::store::record::Record;
use crate::store::usage::head_layers;
use crate::store::{Store, disk, identity, received};
use crate::tree::digest;
use crate::tree::error::OnProgress;

/// The result of a transfer.
#[derive(Debug)]
pub struct Received {
    /// The container's name.
    pub name: ContainerName,
    /// Whether the container is new.
    pub target: ReceiveTarget,
    /// The snapshots that were added.
    pub added: Vec<AddedSnapshot>,
    /// The number of sent snapshots that the container had already.
    pub present: usize,
    /// Those of them whose properties were changed where they were sent from, whether or not the changes were applied.
    pub changed: Vec<ChangedSnapshot>,
    /// The sent snapshots that were not added, because they were removed here. The names are those that were sent.
    pub removed: Vec<SnapshotName>,
    /// The number of layers that were stored.
    pub layers: usize,
    /// The number of layers that the store had already.
    pub shared: usize,
    /// The config of the LXC container that was sent, if the container is new.
    pub config: Option<Blob>,
    /// Notes on attributes that the user cannot store, and on snapshots.
    pub notes: Vec<String>,
}

/// The treatment of snapshots that the container had received before, and that were removed since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemovedSnapshots {
    /// They are not added.
    Omitted,
    /// They are added again.
    AddedAgain,
}

/// The options of a receiver.
#[derive(Clone, Copy, Debug)]
pub struct ReceiveOptions {
    /// The snapshots that were removed here.
    pub removed: RemovedSnapshots,
    /// The LXC configs of the snapshots of a new container. Those for a container that exists are always set apart.
    pub configs: SentConfigs,
}

/// Returns the snapshots of a container that were received and removed since.
pub fn removed_snapshots(store: &Store, name: &ContainerName) -> Result<Vec<SnapshotId>> {
    Ok(merge::removed(&store.find(name)?.1.body))
}

/// Receives a container, under its original name or another one.
pub fn receive(
    store: &Store,
    (name, target): (&ContainerName, ReceiveTarget),
    options: ReceiveOptions,
    archive: BundleReader<'_>,
    progress: OnProgress<'_>,
) -> Result<Received> {
    let mut manifest = WholeManifest::decode(archive.manifest())?;
    claims::limit(&mut manifest, target)?;
    if target == ReceiveTarget::Existing {
        let from = (&manifest, archive);
        return extend(store, name, options.removed, from, progress);
    }
    let added = manifest.container.snapshots.iter();
    let added = added.map(|snapshot| AddedSnapshot {
        sent_as: snapshot.name.clone(),
        name: snapshot.name.clone(),
    });
    let added = added.collect();
    let hint = "repeat the command to add the snapshots to it, or receive it under another name: cowl receive NAME";
    let (incoming, arrival) = import::create(
        store,
        (name, options.configs),
        manifest,
        archive,
        (hint, progress),
    )?;
    Ok(Received {
        name: incoming.name,
        target,
        added,
        present: 0,
        changed: Vec::new(),
        removed: Vec::new(),
        layers: arrival.created,
        shared: arrival.shared,
        config: incoming.config,
        notes: incoming.notes,
    })
}

/// Adds the snapshots of an archive to a container.
fn extend(
    store: &Store,
    name: &ContainerName,
    removed: RemovedSnapshots,
    (manifest, archive): (&WholeManifest, BundleReader<'_>),
    progress: OnProgress<'_>,
) -> Result<Received> {
    // Before anything is received, because all of it would be useless.
    let id = check_target(store, name, manifest)?;
    let mut creation = Creation::begin_unlocked(store)?;
    let arrival = arrival::unpack(store, &mut creation, manifest, archive, progress)?;
    creation.sync_content()?;
    creation.lock_store()?;
    let mut container = recover::open(store, name)?;
    if container.id() != id {
        return Err(Error::failed(format!(
            "cannot add snapshots to {name}: another command has replaced the container during the transfer"
        ))
        .hint("repeat the command, or receive it under another name: cowl receive NAME"));
    }
    refuse_other_ids(name, &container.manifest().id_map, &manifest.id_map())?;
    let own = all_layers(store, (id, container.manifest()))?;
    if !arrival.ids.values().any(|layer| own.contains(layer)) {
        return Err(unrelated_error(name));
    }
    let missing = missing_snapshots(store, &container, (manifest, removed), &arrival)?;
    // Layers of snapshots that the container had already may be unused.
    let stacks = missing
        .snapshots
        .iter()
        .filter_map(|snapshot| manifest.states.get(&snapshot.id));
    let used: HashSet<LayerId> = stacks
        .flat_map(|state| map_ids(&state.stack, &arrival.ids))
        .collect();
    let unused = arrival.local().difference(&used).copied().collect();
    received::release(store, &unused);
    creation.request_sweep();
    let mut next = container.manifest().clone();
    let changed = merge::follow(&mut next, &manifest.container.snapshots);
    // Before a file is written for each of them.
    let mut larger = next.clone();
    larger.snapshots.extend(missing.snapshots.iter().cloned());
    claims::check_size(store, (id, &larger), &manifest.states)?;
    let from = (missing.snapshots, manifest);
    let sent = write_states(store, &container, from, &mut creation, &arrival)?;
    let added = merge::add(&mut next, sent);
    merge::limit_records(&mut next);
    match next == *container.manifest() {
        true => creation.finish()?,
        false => {
            claims::check_size(store, (id, &next), &manifest.states)?;
            container.commit(next, Some(creation), |_| Ok(Swap::Done))?;
            received::release(store, &used);
        }
    }
    Ok(Received {
        name: name.clone(),
        target: ReceiveTarget::Existing,
        added,
        present: missing.present,
        changed,
        removed: missing.removed,
        layers: arrival.created,
        shared: arrival.shared,
        config: None,
        notes: arrival.notes,
    })
}

/// Refuses an archive that cannot be a copy of the container `name`. Returns the container's id.
fn check_target(
    store: &Store,
    name: &ContainerName,
    manifest: &WholeManifest,
) -> Result<ContainerId> {
    let (id, record) = store.find(name)?;
    // The sender omits those that were removed here.
    if manifest.container.snapshots.is_empty() && merge::removed(&record.body).is_empty() {
        return Err(Error::failed(format!(
            "cannot add snapshots to {name}: none were sent"
        ))
        .hint("to receive the current state as a container of its own, add a name: cowl receive NAME"));
    }
    refuse_other_ids(name, &record.body.id_map, &manifest.id_map())?;
    let own = all_layers(store, (id, &record.body))?;
    match claims::has_layer_of(manifest, &identity::ids_across_stores(store, &own)) {
        true => Ok(id),
        false => Err(unrelated_error(name)),
    }
}

/// Refuses snapshots of a container whose files have other ids.
fn refuse_other_ids(name: &ContainerName, own: &[String], sent: &[String]) -> Result<()> {
    if own == sent {
        return Ok(());
    }
    Err(Error::failed(format!(
        "cannot add snapshots to {name}: the files of the container that was sent belong to other ids (lxc.idmap)"
    ))
    .hint("receive it under another name: cowl receive NAME"))
}

/// Returns the layers of a container's states.
fn all_layers(
    store: &Store,
    (id, manifest): (ContainerId, &ContainerManifest),
) -> Result<HashSet<LayerId>> {
    let mut own: HashSet<LayerId> = head_layers(manifest).into_iter().collect();
    for snapshot in &manifest.snapshots {
        own.extend(store.snapshot(id, snapshot.id)?.stack);
    }
    Ok(own)
}

fn unrelated_error(name: &ContainerName) -> Error {
    Error::failed(format!(
        "cannot add snapshots to {name}: the container that was sent is another one, without a layer in common"
    ))
    .hint("receive it under another name: cowl receive NAME")
}

/// The sent snapshots, compared with those of a container.
#[derive(Default)]
struct MissingSnapshots {
    /// Those that are added.
    snapshots: Vec<SnapshotRef>,
    /// The number of those that the container has.
    present: usize,
    /// Those that were removed from it.
    removed: Vec<SnapshotName>,
}

/// Compares the sent snapshots with those of a container.
///
/// Fails if it has a snapshot with the same id and another content: it would be taken for a copy of the sent one.
fn missing_snapshots(
    store: &Store,
    container: &Container<'_>,
    (manifest, removed): (&WholeManifest, RemovedSnapshots),
    arrival: &Arrival,
) -> Result<MissingSnapshots> {
    let mut missing = MissingSnapshots::default();
    let omitted: HashSet<SnapshotId> = match removed {
        RemovedSnapshots::Omitted => merge::removed(container.manifest()).into_iter().collect(),
        RemovedSnapshots::AddedAgain => HashSet::new(),
    };
    let own = container.manifest().snapshots.iter();
    let own: HashMap<SnapshotId, _> = own.map(|own| (own.id, own)).collect();
    for snapshot in &manifest.container.snapshots {
        if omitted.contains(&snapshot.id) {
            missing.removed.push(snapshot.name.clone());
            continue;
        }
        let Some(own) = own.get(&snapshot.id) else {
            missing.snapshots.push(snapshot.clone());
            continue;
        };
        missing.present += 1;
        let stack = store.snapshot(container.id(), own.id)?.stack;
        let Some(sent) = manifest.states.get(&snapshot.id) else {
            continue;
        };
        let sent = map_ids(&sent.stack, &arrival.ids);
        // The layers differ if one side has merged some of them.
        let of = |stack: &[LayerId]| -> Result<_> { Ok(digest(&store.view(stack)?, &mut |_| ())?) };
        if sent != stack && of(&sent)? != of(&stack)? {
            let (name, own) = (container.name(), &own.name);
            return Err(Error::failed(format!(
                "cannot receive the snapshot {}: {name}@{own} has the same id and another content",
                snapshot.name
            ))
            .hint(format!(
                "compare them under another name: cowl receive NAME; if {name}@{own} is the wrong one, remove it \
                 (cowl rm {name}@{own}) and repeat the transfer with --again"
            )));
        }
    }
    Ok(missing)
}

/// Writes the files of received snapshots, and returns their entries for the container's manifest.
fn write_states(
    store: &Store,
    container: &Container<'_>,
    (sent, manifest): (Vec<SnapshotRef>, &WholeManifest),
    creation: &mut Creation<'_>,
    arrival: &Arrival,
) -> Result<Vec<SnapshotRef>> {
    let mut entries = Vec::new();
    for mut snapshot in sent {
        let Some(state) = manifest.states.get(&snapshot.id) else {
            continue;
        };
        let stack = map_ids(&state.stack, &arrival.ids);
        store
            .view(&stack)?
            .root()
            .map_err(import::unreadable_error)?;
        snapshot.layer = stack.first().copied().unwrap_or(snapshot.layer);
        // A state that lost data remains marked, independent of the boots of this machine.
        if let Some(marker) = &mut snapshot.settling {
            marker.epoch = String::new();
        }
        let mut state = SnapshotManifest {
            stack,
            ..state.clone()
        };
        state.quarantine_config();
        let path = store.paths().snapshot_file(container.id(), snapshot.id);
        // An interrupted attempt may have left the file, which no manifest lists.
        creation.add_file(path.clone());
        disk::replace(&path, &Record::first(state))?;
        entries.push(snapshot);
    }
    creation.add_unsynced(store.paths().snapshots_dir(container.id()));
    Ok(entries)
}
