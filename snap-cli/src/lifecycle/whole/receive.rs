//! Receives a container, or snapshots for a container that exists.

use std::collections::HashSet;

use super::arrival::{self, Arrival};
use super::claims::{self, ReceiveTarget};
use super::import;
use super::manifest::{WholeManifest, map_ids};
use super::merge::{self, AddedSnapshot};
use crate::archive::bundle::BundleReader;
use crate::container::{Container, Swap};
use crate::error::{Error, Result};
use crate::recover;
use crate::store::bytes::Blob;
use crate::store::creation::Creation;
use crate::store::manifest::{
    ContainerId, ContainerManifest, LayerId, SnapshotManifest, SnapshotRef,
};
use crate::store::name::ContainerName;
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
    /// The number of layers that were stored.
    pub layers: usize,
    /// The number of layers that the store had already.
    pub shared: usize,
    /// The config of the LXC container that was sent, if the container is new.
    pub config: Option<Blob>,
    /// Notes on attributes that the user cannot store, and on snapshots.
    pub notes: Vec<String>,
}

/// Receives a container, under its original name or another one.
pub fn receive(
    store: &Store,
    (name, target): (&ContainerName, ReceiveTarget),
    archive: BundleReader<'_>,
    progress: OnProgress<'_>,
) -> Result<Received> {
    let mut manifest = WholeManifest::decode(archive.manifest())?;
    claims::limit(&mut manifest, target)?;
    if target == ReceiveTarget::Existing {
        return extend(store, name, &manifest, archive, progress);
    }
    let added = manifest.container.snapshots.iter();
    let added = added.map(|snapshot| AddedSnapshot {
        sent_as: snapshot.name.clone(),
        name: snapshot.name.clone(),
    });
    let added = added.collect();
    let hint = "receive it under another name: cowl receive NAME";
    let (incoming, arrival) = import::create(store, name, manifest, archive, (hint, progress))?;
    Ok(Received {
        name: incoming.name,
        target,
        added,
        present: 0,
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
    manifest: &WholeManifest,
    archive: BundleReader<'_>,
    progress: OnProgress<'_>,
) -> Result<Received> {
    if manifest.container.snapshots.is_empty() {
        return Err(Error::failed(format!(
            "cannot add snapshots to {name}: none were sent"
        ))
        .hint("to receive the current state as a container of its own, add a name: cowl receive NAME"));
    }
    let id_map = manifest.id_map();
    let (id, before) = store.find(name)?;
    refuse_other_ids(name, &before.body.id_map, &id_map)?;
    // Before anything is received, because all of it would be useless.
    let own = all_layers(store, (id, &before.body))?;
    if !claims::has_layer_of(manifest, &identity::ids_across_stores(store, &own)) {
        return Err(unrelated_error(name));
    }
    let mut creation = Creation::begin(store)?;
    let arrival = arrival::unpack(store, &mut creation, manifest, archive, progress)?;
    creation.sync_content()?;
    let mut container = recover::open(store, name)?;
    if container.id() != id {
        return Err(Error::failed(format!(
            "cannot add snapshots to {name}: another command has replaced the container during the transfer"
        ))
        .hint("repeat the command, or receive it under another name: cowl receive NAME"));
    }
    refuse_other_ids(name, &container.manifest().id_map, &id_map)?;
    let own = all_layers(store, (id, container.manifest()))?;
    if !arrival.ids.values().any(|layer| own.contains(layer)) {
        return Err(unrelated_error(name));
    }
    let (sent, present) = missing_snapshots(store, &container, manifest, &arrival)?;
    // Layers of snapshots that the container had already may be unused.
    let stacks = sent
        .iter()
        .filter_map(|snapshot| manifest.states.get(&snapshot.id));
    let used: HashSet<LayerId> = stacks
        .flat_map(|state| map_ids(&state.stack, &arrival.ids))
        .collect();
    let unused = arrival.local().difference(&used).copied().collect();
    received::release(store, &unused);
    creation.request_sweep();
    let added = match sent.is_empty() {
        true => {
            creation.finish()?;
            Vec::new()
        }
        false => {
            let mut next = container.manifest().clone();
            let sent = write_states(store, &container, (sent, manifest), &mut creation, &arrival)?;
            let added = merge::add(&mut next, sent);
            claims::check_size(store, id, &next)?;
            container.commit(next, Some(creation), |_| Ok(Swap::Done))?;
            received::release(store, &used);
            added
        }
    };
    Ok(Received {
        name: name.clone(),
        target: ReceiveTarget::Existing,
        added,
        present,
        layers: arrival.created,
        shared: arrival.shared,
        config: None,
        notes: arrival.notes,
    })
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

/// Returns the sent snapshots that the container does not have, and the number of those that it has.
///
/// Fails if it has a snapshot with the same id and another content: it would be taken for a copy of the sent one.
fn missing_snapshots(
    store: &Store,
    container: &Container<'_>,
    manifest: &WholeManifest,
    arrival: &Arrival,
) -> Result<(Vec<SnapshotRef>, usize)> {
    let (mut missing, mut present) = (Vec::new(), 0);
    for snapshot in &manifest.container.snapshots {
        let own = container.manifest().snapshots.iter();
        let Some(own) = own.into_iter().find(|own| own.id == snapshot.id) else {
            missing.push(snapshot.clone());
            continue;
        };
        present += 1;
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
                 (cowl rm {name}@{own}) and repeat the transfer"
            )));
        }
    }
    Ok((missing, present))
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
        let state = SnapshotManifest {
            stack,
            // LXC runs programs of the config as root, and `cowl restore --with-config` would install it here.
            config: None,
            ..state.clone()
        };
        let path = store.paths().snapshot_file(container.id(), snapshot.id);
        // An interrupted attempt may have left the file, which no manifest lists.
        creation.add_file(path.clone());
        disk::replace(&path, &Record::first(state))?;
        entries.push(snapshot);
    }
    creation.add_unsynced(store.paths().snapshots_dir(container.id()));
    Ok(entries)
}
