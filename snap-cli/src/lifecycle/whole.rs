//! A whole container in one archive, and back: the layers of what it is and of all its snapshots, once
//! each, and what its files say. What comes back shows the same and lists the same; only the ids of
//! the container and of the layers are new, because those are never used twice.
//!
//! How an archive looks is `archive::bundle`'s to know; what its manifest says is known here.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write;

use cowl_layers::format::XattrSpace;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::archive::Compression;
use crate::archive::bundle::{self, Part, Whole};
use crate::container::{durability, lxc};
use crate::error::{Error, Kind, Result};
use crate::recover;
use crate::snapshot::freeze;
use crate::store::bytes::Blob;
use crate::store::family;
use crate::store::making::Making;
use crate::store::manifest::{
    ContainerManifest, LayerId, LayerManifest, MarkerSpace, SnapshotId, SnapshotManifest,
};
use crate::store::name::{ContainerName, SnapshotName};
use crate::store::record::{Body, Record, RecordError};
use crate::store::{Store, disk};
use crate::tree::error::{OnProgress, Progress};

/// The manifest of an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WholeManifest {
    /// Where the marks of its layers lie.
    pub marks: MarkerSpace,
    /// The container's manifest. The head is not in the archive: it was empty.
    pub container: ContainerManifest,
    /// The snapshots' files.
    pub states: BTreeMap<SnapshotId, SnapshotManifest>,
    /// The layers, in the order in which they come.
    pub layers: Vec<LayerEntry>,
    /// About how many bytes they are, for a progress bar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// The config of the LXC container that it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<Blob>,
    /// What this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Body for WholeManifest {
    const TYPE_NAME: &'static str = "archive";
}

/// A layer of an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerEntry {
    /// Its id where it came from.
    pub id: LayerId,
    /// Its file.
    pub layer: LayerManifest,
}

impl WholeManifest {
    /// What must hold besides the fields' types; the text says what does not.
    fn check(&self) -> Result<(), String> {
        let container = &self.container;
        container.check()?;
        if container.below_head().is_empty() {
            return Err("its container has no layers".to_owned());
        }
        let mut there = HashSet::new();
        if !self.layers.iter().all(|entry| there.insert(entry.id)) {
            return Err("it names a layer twice".to_owned());
        }
        if there.contains(&container.head) {
            return Err("it brings a head".to_owned());
        }
        let mut used: HashSet<LayerId> = container.below_head().iter().copied().collect();
        let (mut ids, mut names) = (HashSet::new(), HashSet::new());
        for snapshot in &container.snapshots {
            if !ids.insert(snapshot.id) || !names.insert(&snapshot.name) {
                return Err(format!("it names the snapshot {} twice", snapshot.name));
            }
            let Some(state) = self.states.get(&snapshot.id) else {
                return Err(format!("it does not say what {} is", snapshot.name));
            };
            state.check()?;
            if state.stack.first() != Some(&snapshot.layer) {
                return Err(format!("it tells two stories of {}", snapshot.name));
            }
            used.extend(&state.stack);
        }
        if self.states.len() != ids.len() {
            return Err("it describes a snapshot that it does not name".to_owned());
        }
        if used != there {
            return Err("its stacks and its layers are not the same".to_owned());
        }
        Ok(())
    }
}

/// What is to be exported, kept from collection while this lives.
#[derive(Debug)]
pub struct Outgoing {
    manifest: Vec<u8>,
    parts: Vec<Part>,
    /// About how many bytes it has; `None` where some layer was never measured.
    pub total: Option<u64>,
    _reading: crate::store::lock::Lock,
}

impl Outgoing {
    /// Prepares the export of a container. What was written since the last snapshot is frozen first, as
    /// for a clone; the container is what it was.
    pub fn prepare(store: &Store, name: &ContainerName) -> Result<Self> {
        let mut container = recover::open(store, name)?;
        freeze::freeze(&mut container)?;
        let reading = store.lock_shared()?;
        let mut manifest = container.manifest().clone();
        let config = lxc::read_config_copy(&container);
        manifest.clear_machine_fields();
        keep_losses(&mut manifest, &durability::epoch(store)?);
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
            // What it takes is another disk's to say.
            let layer = LayerManifest {
                measured: None,
                looks: None,
                digest: None,
                unsynced: false,
                ..layer
            };
            layers.push(LayerEntry { id: *id, layer });
        }
        let opened = store.open_layers(&order)?;
        for (id, layer) in order.iter().zip(opened) {
            parts.push(Part {
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
            extra: Map::new(),
        };
        whole
            .check()
            .map_err(|why| Error::damaged(format!("{name} can't be exported: {why}")))?;
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

/// All layers of some stacks, what lies below before what lies above it where that can be.
fn bottom_up<'a>(stacks: impl Iterator<Item = &'a [LayerId]>) -> Vec<LayerId> {
    let mut order = Vec::new();
    let mut known = HashSet::new();
    for stack in stacks {
        for id in stack.iter().rev() {
            if known.insert(*id) {
                order.push(*id);
            }
        }
    }
    order
}

/// What came back.
#[derive(Debug)]
pub struct Incoming {
    /// The container's name.
    pub name: ContainerName,
    /// How many snapshots came with it.
    pub snapshots: usize,
    /// The config of the LXC container that it was.
    pub config: Option<Blob>,
}

/// Makes a container from an archive: under the name that it had, or under another one.
pub fn import(
    store: &Store,
    name: Option<&ContainerName>,
    archive: Whole<'_>,
    progress: OnProgress<'_>,
) -> Result<Incoming> {
    let manifest = read_manifest(archive.manifest())?;
    let name = name.unwrap_or(&manifest.container.name).clone();
    let snapshots = manifest.container.snapshots.len();
    let config = manifest.config.clone();
    let claim = family::claim(store, &name).map_err(|error| match error.kind {
        Kind::Failed => error.hint("give it another name: cowl import FILE NAME"),
        _ => error,
    })?;
    let made = import_claimed(store, &name, manifest, archive, progress);
    claim.remove()?;
    made?;
    Ok(Incoming {
        name,
        snapshots,
        config,
    })
}

fn read_manifest(bytes: &[u8]) -> Result<WholeManifest> {
    let refused = |error: RecordError| {
        let newer = matches!(error, RecordError::Newer { .. });
        let refused = Error::failed("cannot use the archive").because(error);
        refused.hint(match newer {
            true => "a newer cowl made it: install that version; nothing was changed",
            false => "it is damaged: fetch or make it anew; nothing was changed",
        })
    };
    let manifest = Record::<WholeManifest>::decode(bytes)
        .map_err(refused)?
        .body;
    match manifest.check() {
        Ok(()) => Ok(manifest),
        Err(why) => Err(refused(RecordError::Shape(why))),
    }
}

fn import_claimed(
    store: &Store,
    name: &ContainerName,
    manifest: WholeManifest,
    mut archive: Whole<'_>,
    progress: OnProgress<'_>,
) -> Result<()> {
    let from = match manifest.marks {
        MarkerSpace::Trusted => XattrSpace::Trusted,
        MarkerSpace::User => XattrSpace::User,
    };
    let mut making = Making::begin(store)?;
    let mut new = HashMap::new();
    let total = manifest.bytes;
    let mut progress = |done| progress(Progress { total, ..done });
    for LayerEntry { id, layer } in manifest.layers {
        let layer = LayerManifest {
            over: mapped(&layer.over, &new),
            stands_for: mapped(&layer.stands_for, &new),
            measured: None,
            looks: None,
            digest: None,
            unsynced: false,
            ..layer
        };
        let made = making.create_layer_from(layer)?;
        new.insert(id, made);
        let tree = store.paths().layer_tree(made);
        archive.layer(&id.to_string(), &tree, (from, store.space()), &mut progress)?;
    }
    archive.finish()?;
    let old = manifest.container;
    let below = mapped(old.below_head(), &new);
    // Each state must at least have a root that can be read, before anything names it.
    store.view(&below)?.root().map_err(unreadable)?;
    // A container must not be there before its data is.
    making.sync_content()?;
    let id = making.create_container()?;
    let mut container = ContainerManifest {
        name: name.clone(),
        origin: match old.origin.iter().all(|id| new.contains_key(id)) {
            true => mapped(&old.origin, &new),
            false => below.last().copied().into_iter().collect(),
        },
        ..old
    };
    container.clear_machine_fields();
    mark_losses(&mut container);
    for snapshot in &mut container.snapshots {
        let Some(state) = manifest.states.get(&snapshot.id) else {
            continue;
        };
        let stack = mapped(&state.stack, &new);
        store.view(&stack)?.root().map_err(unreadable)?;
        snapshot.layer = stack.first().copied().unwrap_or(snapshot.layer);
        let state = SnapshotManifest {
            stack,
            ..state.clone()
        };
        let path = store.paths().snapshot_file(id, snapshot.id);
        disk::write_new(&path, &Record::first(state))?;
        making.add_unsynced(path);
        let beyond = |prefix: &str| next_after(&snapshot.name, prefix);
        container.next_snap = container.next_snap.max(beyond("snap"));
        container.next_auto = container.next_auto.max(beyond("auto"));
    }
    making.add_unsynced(store.paths().snapshots_dir(id));
    let top = below.first().copied().unwrap_or(container.head);
    container.head = making.create_head(&below, &store.paths().layer_tree(top))?;
    container.stack = [&[container.head], below.as_slice()].concat();
    making.sync()?;
    match disk::replace(&store.paths().container_file(id), &Record::first(container)) {
        Ok(()) => making.finish(),
        Err(error) => {
            // It may be there already: only its name was not put on the disk for sure.
            making.abandon();
            Err(error)
        }
    }
}

/// What is only settling is whole in the archive; what lost something stays marked.
fn keep_losses(manifest: &mut ContainerManifest, epoch: &str) {
    let marks = manifest.snapshots.iter_mut().map(|s| &mut s.settling);
    for mark in marks.chain([&mut manifest.settling]) {
        if mark.as_ref().is_some_and(|mark| mark.is_pending(epoch)) {
            *mark = None;
        }
    }
}

/// The states that lost something before they were exported: by a crash of no boot of this machine.
fn mark_losses(manifest: &mut ContainerManifest) {
    let marks = manifest.snapshots.iter_mut().map(|s| &mut s.settling);
    for mark in marks.chain([&mut manifest.settling]).flatten() {
        mark.epoch = String::new();
    }
}

fn unreadable(error: cowl_layers::Error) -> Error {
    Error::failed("the archive's layers can't be read together").because(error)
}

/// The number after the one in the name, if a counter gave it: numbers are never given twice.
fn next_after(name: &SnapshotName, prefix: &str) -> u64 {
    let number = name.as_str().strip_prefix(prefix);
    number
        .and_then(|number| number.parse::<u64>().map_or(None, |n| n.checked_add(1)))
        .unwrap_or(0)
}

/// The new ids of layers; those that did not come along keep theirs, which names nothing.
fn mapped(ids: &[LayerId], new: &HashMap<LayerId, LayerId>) -> Vec<LayerId> {
    ids.iter().map(|id| *new.get(id).unwrap_or(id)).collect()
}
