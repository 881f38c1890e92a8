//! Creates a container from an archive.

use std::collections::HashSet;

use super::arrival::{self, Arrival};
use super::manifest::{WholeManifest, map_ids};
use super::merge;
use crate::archive::bundle::BundleReader;
use crate::error::{Error, Kind, Result};
use crate::store::bytes::Blob;
use crate::store::creation::Creation;
use crate::store::family;
use crate::store::manifest::{ContainerManifest, SnapshotManifest};
use crate::store::name::{ContainerName, SnapshotName};
use crate::store::outside::OwnFile;
use crate::store::record::Record;
use crate::store::{Store, disk, received};
use crate::tree::error::OnProgress;

/// The container in an archive.
#[derive(Debug)]
pub struct Incoming {
    /// The container's name.
    pub name: ContainerName,
    /// The number of its snapshots.
    pub snapshots: usize,
    /// The config of the exported LXC container.
    pub config: Option<Blob>,
    /// The files in its directory to which the config refers.
    pub files: Vec<OwnFile>,
    /// Notes on attributes that the user cannot store.
    pub notes: Vec<String>,
}

/// Describes the container in an archive.
pub fn describe(archive: &BundleReader<'_>) -> Result<Incoming> {
    let manifest = WholeManifest::decode(archive.manifest())?;
    Ok(Incoming {
        name: manifest.container.name,
        snapshots: manifest.container.snapshots.len(),
        config: manifest.config,
        files: manifest.files,
        notes: Vec::new(),
    })
}

/// Whether the LXC configs of the snapshots in an archive are used like those of this host's snapshots.
///
/// LXC runs the programs that a config names as root of the host. Without the user's consent, clones of a snapshot and
/// `cowl restore --with-config` must not use the config that another host has sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SentConfigs {
    /// The user registers the container with LXC, with the config that was sent.
    Trusted,
    /// They are stored, but not used.
    SetApart,
}

/// Creates a container from an archive, under its original name or another one.
pub fn import(
    store: &Store,
    (name, configs): (Option<&ContainerName>, SentConfigs),
    archive: BundleReader<'_>,
    progress: OnProgress<'_>,
) -> Result<Incoming> {
    let manifest = WholeManifest::decode(archive.manifest())?;
    if !manifest.base.is_empty() {
        return Err(Error::failed(
            "the archive contains only a part of the layers: `cowl send` wrote it",
        )
        .hint("receive it: cowl receive NAME < FILE"));
    }
    let name = name.unwrap_or(&manifest.container.name).clone();
    let hint = "import it under another name: cowl import FILE NAME";
    let (incoming, _) = create(store, (&name, configs), manifest, archive, (hint, progress))?;
    Ok(incoming)
}

/// Creates the container `name` from an archive; `hint` is that of the error for a name that is not free.
pub(super) fn create(
    store: &Store,
    (name, configs): (&ContainerName, SentConfigs),
    mut manifest: WholeManifest,
    archive: BundleReader<'_>,
    (hint, progress): (&str, OnProgress<'_>),
) -> Result<(Incoming, Arrival)> {
    if manifest.omits_removed {
        return Err(Error::failed(format!(
            "cannot create {name}: snapshots that were removed from the container that it was sent for are not in the stream"
        ))
        .hint("send it again without the list, or with that of: cowl receive --have (without a name)"));
    }
    let claim = family::claim(store, name).map_err(|error| match error.kind {
        Kind::Failed => error.hint(hint),
        _ => error,
    })?;
    let snapshots = manifest.container.snapshots.len();
    let (config, files) = (manifest.config.clone(), manifest.files.clone());
    if configs == SentConfigs::SetApart {
        let states = manifest.states.values_mut();
        states.for_each(SnapshotManifest::quarantine_config);
    }
    let made = create_claimed(store, name, manifest, archive, progress);
    claim.remove()?;
    let arrival = made?;
    let incoming = Incoming {
        name: name.clone(),
        snapshots,
        config,
        files,
        notes: arrival.notes.clone(),
    };
    Ok((incoming, arrival))
}

fn create_claimed(
    store: &Store,
    name: &ContainerName,
    manifest: WholeManifest,
    archive: BundleReader<'_>,
    progress: OnProgress<'_>,
) -> Result<Arrival> {
    let mut creation = Creation::begin_unlocked(store)?;
    let arrival = arrival::unpack(store, &mut creation, &manifest, archive, progress)?;
    creation.lock_store()?;
    let new = &arrival.ids;
    let id_map = manifest.id_map();
    let old = manifest.container;
    let below = map_ids(old.below_head(), new);
    // Check that each state has at least a readable root before a manifest references it.
    store.view(&below)?.root().map_err(unreadable_error)?;
    // The data must be durable before a container references it.
    creation.sync_content()?;
    let id = creation.create_container()?;
    let mut container = ContainerManifest {
        name: name.clone(),
        origin: match old.origin.iter().all(|id| new.contains_key(id)) {
            true => map_ids(&old.origin, new),
            false => below.last().copied().into_iter().collect(),
        },
        ..old
    };
    container.clear_machine_fields();
    container.id_map = id_map;
    clear_missing_parents(&mut container);
    mark_losses(&mut container);
    container.received = container.snapshots.iter().map(merge::record_of).collect();
    for snapshot in &mut container.snapshots {
        let Some(state) = manifest.states.get(&snapshot.id) else {
            continue;
        };
        let stack = map_ids(&state.stack, new);
        store.view(&stack)?.root().map_err(unreadable_error)?;
        snapshot.layer = stack.first().copied().unwrap_or(snapshot.layer);
        let state = SnapshotManifest {
            stack,
            ..state.clone()
        };
        let path = store.paths().snapshot_file(id, snapshot.id);
        disk::write_new(&path, &Record::first(state))?;
        creation.add_unsynced(path);
        let beyond = |prefix: &str| next_after(&snapshot.name, prefix);
        container.next_snap = container.next_snap.max(beyond("snap"));
        container.next_auto = container.next_auto.max(beyond("auto"));
    }
    creation.add_unsynced(store.paths().snapshots_dir(id));
    let top = below.first().copied().unwrap_or(container.head);
    container.head = creation.create_head(&below, &store.paths().layer_tree(top))?;
    container.stack = [&[container.head], below.as_slice()].concat();
    creation.sync()?;
    match disk::replace(&store.paths().container_file(id), &Record::first(container)) {
        Ok(()) => {
            creation.finish()?;
            received::release(store, &arrival.local());
            Ok(arrival)
        }
        Err(error) => {
            // The file may already exist, with a name that is not durable.
            creation.abandon();
            Err(error)
        }
    }
}

/// Clears references to snapshots that were not sent.
fn clear_missing_parents(manifest: &mut ContainerManifest) {
    let known: HashSet<_> = manifest.snapshots.iter().map(|s| s.id).collect();
    let parents = manifest.snapshots.iter_mut().map(|s| &mut s.parent);
    for parent in parents.chain([&mut manifest.parent, &mut manifest.undo]) {
        *parent = parent.filter(|id| known.contains(id));
    }
}

/// Marks the states that lost data before the export, independent of the boots of this machine.
pub(super) fn mark_losses(manifest: &mut ContainerManifest) {
    let markers = manifest.snapshots.iter_mut().map(|s| &mut s.settling);
    for marker in markers.chain([&mut manifest.settling]).flatten() {
        marker.epoch = String::new();
    }
}

pub(super) fn unreadable_error(error: cowl_layers::Error) -> Error {
    Error::failed("cannot read the archive's layers as one tree").because(error)
}

/// Returns the number after the one in an automatic name, because numbers are never reused; 0 if it has no number, or one
/// that is too large.
pub(super) fn next_after(name: &SnapshotName, prefix: &str) -> u64 {
    name.number(prefix).map_or(0, |number| number + 1)
}
