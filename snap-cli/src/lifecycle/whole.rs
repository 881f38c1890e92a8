//! Exports a whole container to one archive, and imports it.
//!
//! The archive has the layers of the current state and of all snapshots, each once, and the manifests. The
//! imported container has the same content and the same list of snapshots. Only the ids of the container and of
//! its layers are new, because ids are never reused. `archive::bundle` defines the format of the archive; this
//! module defines its manifest.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write;

use cowl_layers::format::XattrSpace;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::archive::Compression;
use crate::archive::bundle::{self, BundleLayer, BundleReader};
use crate::container::{durability, lxc};
use crate::error::{Error, Kind, Result};
use crate::lxc::config::IdMap;
use crate::lxc::own_files;
use crate::recover;
use crate::snapshot::freeze;
use crate::store::bytes::Blob;
use crate::store::creation::Creation;
use crate::store::family;
use crate::store::manifest::{
    ContainerManifest, LayerId, LayerManifest, MarkerSpace, SnapshotId, SnapshotManifest,
};
use crate::store::name::{ContainerName, SnapshotName};
use crate::store::outside::OwnFile;
use crate::store::record::{Body, Record, RecordError};
use crate::store::{Store, disk};
use crate::tree::error::{OnProgress, Progress};

/// The manifest of an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WholeManifest {
    /// The xattr namespace of the markers in its layers.
    pub marks: MarkerSpace,
    /// The container's manifest. The archive does not contain the head, which was empty.
    pub container: ContainerManifest,
    /// The manifests of the snapshots.
    pub states: BTreeMap<SnapshotId, SnapshotManifest>,
    /// The layers, in the order of the archive.
    pub layers: Vec<LayerEntry>,
    /// The approximate number of bytes in the layers, for a progress bar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// The config of the exported LXC container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<Blob>,
    /// The files in its directory to which the config refers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<OwnFile>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Body for WholeManifest {
    const TYPE_NAME: &'static str = "archive";
}

/// A layer of an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerEntry {
    /// Its id in the original store.
    pub id: LayerId,
    /// Its manifest.
    pub layer: LayerManifest,
}

impl WholeManifest {
    /// Checks the invariants that types do not express.
    ///
    /// The error is the text of a message.
    fn check(&self) -> Result<(), String> {
        let container = &self.container;
        container.check()?;
        if container.below_head().is_empty() {
            return Err("its container has no layers".to_owned());
        }
        let mut listed = HashSet::new();
        if !self.layers.iter().all(|entry| listed.insert(entry.id)) {
            return Err("it lists a layer twice".to_owned());
        }
        if listed.contains(&container.head) {
            return Err("it contains a layer for the head".to_owned());
        }
        let mut used: HashSet<LayerId> = container.below_head().iter().copied().collect();
        let (mut ids, mut names) = (HashSet::new(), HashSet::new());
        for snapshot in &container.snapshots {
            if !ids.insert(snapshot.id) || !names.insert(&snapshot.name) {
                return Err(format!("it lists the snapshot {} twice", snapshot.name));
            }
            let Some(state) = self.states.get(&snapshot.id) else {
                return Err(format!(
                    "the manifest of the snapshot {} is missing",
                    snapshot.name
                ));
            };
            state.check()?;
            if state.stack.first() != Some(&snapshot.layer) {
                return Err(format!(
                    "the top layer of the snapshot {} is inconsistent",
                    snapshot.name
                ));
            }
            used.extend(&state.stack);
        }
        if !self.files.iter().all(|file| own_files::is_own(&file.path)) {
            return Err("a file of the config is not in the container's directory".to_owned());
        }
        if self.states.len() != ids.len() {
            return Err("it has a manifest of an unlisted snapshot".to_owned());
        }
        if used != listed {
            return Err("its layers are not those of its stacks".to_owned());
        }
        Ok(())
    }
}

/// A prepared export.
///
/// Its layers are not collected while this value exists.
#[derive(Debug)]
pub struct Outgoing {
    manifest: Vec<u8>,
    parts: Vec<BundleLayer>,
    /// The approximate number of bytes; `None` if a layer was never measured.
    pub total: Option<u64>,
    _reading: crate::store::lock::Lock,
}

impl Outgoing {
    /// Prepares the export of a container.
    ///
    /// Changes since the last snapshot are frozen first, as for a clone; the container's content does not
    /// change.
    pub fn prepare(store: &Store, name: &ContainerName) -> Result<Self> {
        let mut container = recover::open(store, name)?;
        freeze::freeze(&mut container)?;
        let reading = store.lock_shared()?;
        let mut manifest = container.manifest().clone();
        let (config, files) = lxc::read_plain_config(&container)?.unzip();
        manifest.clear_machine_fields();
        retain_losses(&mut manifest, &durability::epoch(store)?);
        let mut states = BTreeMap::new();
        for snapshot in &manifest.snapshots {
            states.insert(snapshot.id, store.snapshot(container.id(), snapshot.id)?);
        }
        drop(container);
        let stacks = states.values().map(|state| state.stack.as_slice());
        let order = bottom_up(stacks.chain([manifest.below_head()]));
        let (mut layers, mut parts) = (Vec::new(), Vec::new());
        let mut total = Some(0);
        for id in &order {
            let layer = disk::read::<LayerManifest>(&store.paths().layer_file(*id))?.body;
            let bytes = layer.measured.map(|measured| measured.bytes);
            total = total.zip(bytes).map(|(total, bytes)| total + bytes);
            // Sizes depend on the file system, so they are not exported.
            let layer = LayerManifest {
                measured: None,
                looks: None,
                digest: None,
                image: None,
                unsynced: false,
                ..layer
            };
            layers.push(LayerEntry { id: *id, layer });
        }
        let opened = store.open_layers(&order)?;
        for (id, layer) in order.iter().zip(opened) {
            parts.push(BundleLayer {
                name: id.to_string(),
                layer,
            });
        }
        let whole = WholeManifest {
            marks: match store.space() {
                XattrSpace::Trusted => MarkerSpace::Trusted,
                XattrSpace::User => MarkerSpace::User,
            },
            container: manifest,
            states,
            layers,
            bytes: total,
            config,
            files: files.unwrap_or_default(),
            extra: Map::new(),
        };
        whole
            .check()
            .map_err(|reason| Error::damaged(format!("cannot export {name}: {reason}")))?;
        let manifest = Record::first(whole)
            .encode()
            .map_err(|error| Error::failed("cannot write the archive's manifest").because(error))?;
        Ok(Self {
            manifest,
            parts,
            total,
            _reading: reading,
        })
    }

    /// Writes the archive.
    pub fn write(
        &self,
        output: impl Write,
        compression: Compression,
        progress: OnProgress<'_>,
    ) -> Result<Progress> {
        let done = bundle::write(&self.manifest, &self.parts, output, compression, progress)?;
        Ok(done.done)
    }
}

/// Returns all layers of some stacks, lower ones before upper ones where possible.
fn bottom_up<'a>(stacks: impl Iterator<Item = &'a [LayerId]>) -> Vec<LayerId> {
    let mut order = Vec::new();
    let mut seen = HashSet::new();
    for stack in stacks {
        for id in stack.iter().rev() {
            if seen.insert(*id) {
                order.push(*id);
            }
        }
    }
    order
}

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
    let manifest = read_manifest(archive.manifest())?;
    Ok(Incoming {
        name: manifest.container.name,
        snapshots: manifest.container.snapshots.len(),
        config: manifest.config,
        files: manifest.files,
        notes: Vec::new(),
    })
}

/// Creates a container from an archive, under its original name or another one.
pub fn import(
    store: &Store,
    name: Option<&ContainerName>,
    archive: BundleReader<'_>,
    progress: OnProgress<'_>,
) -> Result<Incoming> {
    let manifest = read_manifest(archive.manifest())?;
    let name = name.unwrap_or(&manifest.container.name).clone();
    let snapshots = manifest.container.snapshots.len();
    let (config, files) = (manifest.config.clone(), manifest.files.clone());
    let claim = family::claim(store, &name).map_err(|error| match error.kind {
        Kind::Failed => error.hint("import it under another name: cowl import FILE NAME"),
        _ => error,
    })?;
    let made = import_claimed(store, &name, manifest, archive, progress);
    claim.remove()?;
    Ok(Incoming {
        name,
        snapshots,
        config,
        files,
        notes: made?,
    })
}

fn read_manifest(bytes: &[u8]) -> Result<WholeManifest> {
    let refused = |error: RecordError| {
        let newer = matches!(error, RecordError::Newer { .. });
        let refused = Error::failed("cannot use the archive").because(error);
        refused.hint(match newer {
            true => "a newer version of cowl created it: install that version",
            false => "it is damaged: copy or create it again",
        })
    };
    let manifest = Record::<WholeManifest>::decode(bytes)
        .map_err(refused)?
        .body;
    match manifest.check() {
        Ok(()) => Ok(manifest),
        Err(reason) => Err(refused(RecordError::Shape(reason))),
    }
}

fn import_claimed(
    store: &Store,
    name: &ContainerName,
    manifest: WholeManifest,
    mut archive: BundleReader<'_>,
    progress: OnProgress<'_>,
) -> Result<Vec<String>> {
    let from = match manifest.marks {
        MarkerSpace::Trusted => XattrSpace::Trusted,
        MarkerSpace::User => XattrSpace::User,
    };
    let mut creation = Creation::begin(store)?;
    let mut new = HashMap::new();
    let total = manifest.bytes;
    let mut progress = |done| progress(Progress { total, ..done });
    for LayerEntry { id, layer } in manifest.layers {
        let layer = LayerManifest {
            over: map_ids(&layer.over, &new),
            stands_for: map_ids(&layer.stands_for, &new),
            measured: None,
            looks: None,
            digest: None,
            // The digest would be a claim of the archive, and other containers would share the layer.
            image: None,
            unsynced: false,
            ..layer
        };
        let made = creation.create_layer_from(layer)?;
        new.insert(id, made);
        let tree = store.paths().layer_tree(made);
        archive.read_layer(&id.to_string(), &tree, (from, store.space()), &mut progress)?;
    }
    let notes = archive.finish()?.notes.lines();
    let old = manifest.container;
    let below = map_ids(old.below_head(), &new);
    // Check that each state has at least a readable root before a manifest references it.
    store.view(&below)?.root().map_err(unreadable_error)?;
    // The data must be durable before a container references it.
    creation.sync_content()?;
    let id = creation.create_container()?;
    let mut container = ContainerManifest {
        name: name.clone(),
        origin: match old.origin.iter().all(|id| new.contains_key(id)) {
            true => map_ids(&old.origin, &new),
            false => below.last().copied().into_iter().collect(),
        },
        ..old
    };
    container.clear_machine_fields();
    if let (true, Some(Blob(text))) = (container.id_map.is_empty(), &manifest.config) {
        // An older version has exported it.
        container.id_map = IdMap::of(text).values().collect();
    }
    mark_losses(&mut container);
    for snapshot in &mut container.snapshots {
        let Some(state) = manifest.states.get(&snapshot.id) else {
            continue;
        };
        let stack = map_ids(&state.stack, &new);
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
        Ok(()) => creation.finish().map(|()| notes),
        Err(error) => {
            // The file may already exist, with a name that is not durable.
            creation.abandon();
            Err(error)
        }
    }
}

/// Clears the markers of states that are not durable yet, because they are complete in the archive.
///
/// States that lost data retain their markers.
fn retain_losses(manifest: &mut ContainerManifest, epoch: &str) {
    let markers = manifest.snapshots.iter_mut().map(|s| &mut s.settling);
    for marker in markers.chain([&mut manifest.settling]) {
        if marker
            .as_ref()
            .is_some_and(|marker| marker.is_pending(epoch))
        {
            *marker = None;
        }
    }
}

/// Marks the states that lost data before the export, independent of the boots of this machine.
fn mark_losses(manifest: &mut ContainerManifest) {
    let markers = manifest.snapshots.iter_mut().map(|s| &mut s.settling);
    for marker in markers.chain([&mut manifest.settling]).flatten() {
        marker.epoch = String::new();
    }
}

fn unreadable_error(error: cowl_layers::Error) -> Error {
    Error::failed("cannot read the archive's layers as one tree").because(error)
}

/// Returns the number after the one in an automatic name, because numbers are never reused.
fn next_after(name: &SnapshotName, prefix: &str) -> u64 {
    let number = name.as_str().strip_prefix(prefix);
    number
        .and_then(|number| number.parse::<u64>().map_or(None, |n| n.checked_add(1)))
        .unwrap_or(0)
}

/// Maps layer ids to the new ones.
///
/// A layer that is not in the archive keeps its id, which refers to nothing.
fn map_ids(ids: &[LayerId], new: &HashMap<LayerId, LayerId>) -> Vec<LayerId> {
    ids.iter().map(|id| *new.get(id).unwrap_or(id)).collect()
}
