//! Exports a whole container, or sends a part of its snapshots.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write;
use std::sync::Arc;

use cowl_layers::format::XattrSpace;
use serde_json::Map;

use super::manifest::{BaseEntry, LayerEntry, SentManifest, WholeManifest};
use crate::archive::Compression;
use crate::archive::bundle::{self, BundleLayer, BundleLayers, DigestMember};
use crate::container::{Container, durability, find_snapshot_ref, lxc};
use crate::error::{Error, Result};
use crate::recover;
use crate::snapshot::freeze;
use crate::store::held::HeldLayers;
use crate::store::manifest::{
    ContainerManifest, LayerId, LayerIdentity, LayerManifest, MarkerSpace, SnapshotId,
    SnapshotManifest, SnapshotRef,
};
use crate::store::name::{ContainerName, SnapshotName};
use crate::store::record::{Body, Record};
use crate::store::{Store, disk, identity};
use crate::tree::PortableDigest;
use crate::tree::error::{OnProgress, Progress};

/// The states of a container that are sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// The current state and all snapshots.
    Everything,
    /// One snapshot.
    One(SnapshotName),
    /// The snapshots that are listed after the first one, which the receiver has, up to the second one.
    ///
    /// Without the first one, all snapshots up to the second one; without the second one, all that follow.
    Range(Option<SnapshotName>, Option<SnapshotName>),
}

/// The layers that a receiver has.
#[derive(Clone, Debug, Default)]
pub struct KnownToReceiver {
    layers: HashMap<LayerId, HashSet<PortableDigest>>,
    /// The snapshots that it has removed.
    removed: HashSet<SnapshotId>,
}

impl KnownToReceiver {
    /// Returns what a receiver claims to have, and to have removed.
    pub fn new(
        layers: impl IntoIterator<Item = LayerIdentity>,
        removed: impl IntoIterator<Item = SnapshotId>,
    ) -> Self {
        let mut known = Self {
            removed: removed.into_iter().collect(),
            ..Self::default()
        };
        for LayerIdentity { id, digest } in layers {
            known.layers.entry(id).or_default().insert(digest);
        }
        known
    }
}

/// A prepared export.
///
/// Its layers are not collected while this value exists.
#[derive(Debug)]
pub struct Outgoing {
    manifest: Vec<u8>,
    layers: BundleLayers,
    /// The approximate number of bytes; `None` if a layer was never measured.
    pub total: Option<u64>,
    /// The number of snapshots.
    pub snapshots: usize,
    /// The snapshots that are not sent, because the receiver has removed them.
    pub omitted: Vec<SnapshotName>,
    _held: HeldLayers,
}

/// The manifests of the states that are exported, and their layers, which are held.
#[derive(Debug)]
pub struct ChosenStates {
    manifest: ContainerManifest,
    states: BTreeMap<SnapshotId, SnapshotManifest>,
    config: (
        Option<crate::store::bytes::Blob>,
        Vec<crate::store::outside::OwnFile>,
    ),
    /// The layers of the state that the receiver has, according to the selection.
    from: HashSet<LayerId>,
    /// All layers, lower ones before upper ones where possible.
    order: Vec<LayerId>,
    /// The snapshots that were excluded.
    omitted: Vec<SnapshotName>,
    held: HeldLayers,
}

/// Freezes the current state, and returns whether it is neither a snapshot nor the state that the container was created
/// with.
pub fn needs_snapshot(store: &Store, name: &ContainerName) -> Result<bool> {
    let mut container = recover::open(store, name)?;
    let state = freeze::freeze(&mut container)?;
    let manifest = container.manifest();
    if state == manifest.origin {
        return Ok(false);
    }
    for snapshot in &manifest.snapshots {
        if store.snapshot(container.id(), snapshot.id)?.stack == state {
            return Ok(false);
        }
    }
    Ok(true)
}

impl ChosenStates {
    /// Reads the manifests of the selected states.
    pub fn read(store: &Store, name: &ContainerName, selection: &Selection) -> Result<Self> {
        let mut container = recover::open(store, name)?;
        if *selection == Selection::Everything {
            // As for a clone: the container's content does not change.
            freeze::freeze(&mut container)?;
        }
        let _reading = store.lock_shared()?;
        let mut manifest = container.manifest().clone();
        let (config, files) = lxc::read_plain_config(&container)?.unzip();
        let from = select(&container, &mut manifest, selection)?;
        manifest.clear_machine_fields();
        retain_losses(&mut manifest, &durability::epoch(store)?);
        let mut states = BTreeMap::new();
        for snapshot in &manifest.snapshots {
            states.insert(snapshot.id, store.snapshot(container.id(), snapshot.id)?);
        }
        let order = layers_of(&manifest, &states);
        // A transfer can take long, and does not prevent garbage collection.
        let mut held = HeldLayers::new();
        held.hold_all(store, &order)?;
        Ok(Self {
            manifest,
            states,
            config: (config, files.unwrap_or_default()),
            from: from.into_iter().collect(),
            order,
            omitted: Vec::new(),
            held,
        })
    }

    /// Excludes the snapshots that the receiver has removed. The last one that remains becomes the current state; without
    /// one, the lowest layer, by which the receiver recognizes the container. A receiver that has the container does not
    /// use the current state, and others refuse the archive.
    fn without(mut self, removed: &HashSet<SnapshotId>) -> Self {
        let (omitted, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.manifest.snapshots)
            .into_iter()
            .partition(|snapshot| removed.contains(&snapshot.id));
        self.manifest.snapshots = rest;
        if omitted.is_empty() {
            return self;
        }
        self.states.retain(|id, _| !removed.contains(id));
        let newest = self.manifest.snapshots.last();
        if let Some((newest, state)) = newest.and_then(|n| Some((n, self.states.get(&n.id)?))) {
            self.manifest.parent = Some(newest.id);
            self.manifest.settling.clone_from(&newest.settling);
            self.manifest.stack = [&[self.manifest.head], state.stack.as_slice()].concat();
        } else if let Some(lowest) = self.manifest.below_head().last().copied() {
            self.manifest.parent = None;
            self.manifest.stack = vec![self.manifest.head, lowest];
        }
        self.order = layers_of(&self.manifest, &self.states);
        self.omitted = omitted.into_iter().map(|snapshot| snapshot.name).collect();
        self
    }

    /// Returns the ids of the layers across stores.
    pub fn ids_across_stores(&self, store: &Store) -> Result<Vec<LayerId>> {
        let ids = self.order.iter();
        ids.map(|id| identity::id_across_stores(store, *id))
            .collect()
    }
}

/// Reduces the manifest to the selected snapshots, the last of which becomes the current state. Returns the layers that the
/// receiver has, according to the selection.
fn select(
    container: &Container<'_>,
    manifest: &mut ContainerManifest,
    selection: &Selection,
) -> Result<Vec<LayerId>> {
    let position = |name: &SnapshotName| -> Result<usize> {
        let found = find_snapshot_ref(container.manifest(), name)?.id;
        let snapshots = &container.manifest().snapshots;
        let at = snapshots.iter().position(|snapshot| snapshot.id == found);
        Ok(at.unwrap_or_default())
    };
    let (first, last, from) = match selection {
        Selection::Everything => return Ok(Vec::new()),
        Selection::One(name) => (position(name)?, position(name)?, Vec::new()),
        Selection::Range(from, to) => {
            let last = match to {
                Some(to) => position(to)?,
                None => manifest.snapshots.len().saturating_sub(1),
            };
            match from {
                None => (0, last, Vec::new()),
                Some(from) => {
                    let (_, state) = container.snapshot(from)?;
                    (position(from)? + 1, last, state.stack)
                }
            }
        }
    };
    let name = container.name();
    let Some(selected) = manifest
        .snapshots
        .get(first..=last)
        .filter(|s| !s.is_empty())
    else {
        return Err(Error::failed(format!(
            "there is nothing to send: the range contains no snapshot of {name}"
        ))
        .hint(format!(
            "`cowl list {name}` shows the order of its snapshots"
        )));
    };
    let selected: Vec<SnapshotRef> = selected.to_vec();
    if let Some(newest) = selected.last() {
        let state = container.store().snapshot(container.id(), newest.id)?;
        manifest.parent = Some(newest.id);
        manifest.settling.clone_from(&newest.settling);
        manifest.stack = [&[manifest.head], state.stack.as_slice()].concat();
        manifest.settings = state.settings;
    }
    let is_selected = |id: &SnapshotId| selected.iter().any(|snapshot| snapshot.id == *id);
    manifest.undo = manifest.undo.filter(is_selected);
    manifest.snapshots = selected;
    // The receiver counts from the numbers of these snapshots.
    (manifest.next_snap, manifest.next_auto) = (0, 0);
    Ok(from)
}

impl Outgoing {
    /// Prepares the export of a container for `cowl import`.
    ///
    /// Changes since the last snapshot are frozen first, as for a clone; the container's content does not
    /// change.
    pub fn prepare(store: &Store, name: &ContainerName) -> Result<Self> {
        let chosen = ChosenStates::read(store, name, &Selection::Everything)?;
        let mut plan = LayerPlan::default();
        for id in &chosen.order {
            plan.add_sent(store, *id, None)?;
        }
        Self::assemble(store, chosen, plan, encode)
    }

    /// Prepares the transfer of states to another store, without the layers that the receiver has.
    ///
    /// The states must be durable. Layers that were never sent may have to be read for a comparison.
    pub fn prepare_transfer(
        store: &Store,
        chosen: ChosenStates,
        known: &KnownToReceiver,
        progress: OnProgress<'_>,
    ) -> Result<Self> {
        let chosen = chosen.without(&known.removed);
        let mut plan = LayerPlan::default();
        for id in &chosen.order {
            if chosen.from.contains(id) {
                let identity = identity::of(store, *id, progress)?;
                plan.base.push(BaseEntry { id: *id, identity });
                continue;
            }
            let digests = known.layers.get(&identity::id_across_stores(store, *id)?);
            if let Some(digests) = digests {
                let identity = identity::of(store, *id, progress)?;
                if digests.contains(&identity.digest) {
                    plan.base.push(BaseEntry { id: *id, identity });
                    continue;
                }
            }
            let recorded = identity::recorded(store, *id)?;
            plan.add_sent(store, *id, Some(recorded))?;
        }
        Self::assemble(store, chosen, plan, |whole| encode(SentManifest(whole)))
    }

    fn assemble(
        store: &Store,
        chosen: ChosenStates,
        plan: LayerPlan,
        encode: impl FnOnce(WholeManifest) -> Result<Vec<u8>>,
    ) -> Result<Self> {
        let name = chosen.manifest.name.clone();
        let ids = |ids: &mut dyn Iterator<Item = LayerId>| -> Result<Vec<_>> {
            let ids: Vec<LayerId> = ids.collect();
            Ok(ids.iter().copied().zip(store.open_layers(&ids)?).collect())
        };
        let base: Vec<(LayerId, Arc<_>)> = ids(&mut plan.base.iter().map(|entry| entry.id))?;
        let sent: Vec<(LayerId, Arc<_>)> = ids(&mut plan.entries.iter().map(|entry| entry.id))?;
        let layers = BundleLayers {
            base: base
                .into_iter()
                .map(|(id, layer)| (id.to_string(), layer))
                .collect(),
            sent: sent
                .into_iter()
                .zip(plan.digests)
                .map(|((id, layer), digest)| BundleLayer {
                    name: id.to_string(),
                    layer,
                    digest,
                })
                .collect(),
        };
        let snapshots = chosen.manifest.snapshots.len();
        let (config, files) = chosen.config;
        let whole = WholeManifest {
            marks: match store.space() {
                XattrSpace::Trusted => MarkerSpace::Trusted,
                XattrSpace::User => MarkerSpace::User,
            },
            container: chosen.manifest,
            states: chosen.states,
            base: plan.base,
            layers: plan.entries,
            bytes: plan.total,
            omits_removed: !chosen.omitted.is_empty(),
            config,
            files,
            extra: Map::new(),
        };
        whole
            .check()
            .map_err(|reason| Error::damaged(format!("cannot export {name}: {reason}")))?;
        Ok(Self {
            manifest: encode(whole)?,
            layers,
            total: plan.total,
            snapshots,
            omitted: chosen.omitted,
            _held: chosen.held,
        })
    }

    /// Returns the number of layers that are sent, and the number of those that the receiver has.
    pub fn layer_counts(&self) -> (usize, usize) {
        (self.layers.sent.len(), self.layers.base.len())
    }

    /// Writes the archive, and records the digests that were computed.
    pub fn write(
        &self,
        store: &Store,
        output: impl Write,
        compression: Compression,
        progress: OnProgress<'_>,
    ) -> Result<Progress> {
        let report = bundle::write(&self.manifest, &self.layers, output, compression, progress)?;
        for (name, digest) in report.computed {
            if let Some(id) = LayerId::parse(&name) {
                identity::record_sent(store, id, digest);
            }
        }
        Ok(report.done)
    }
}

/// The layers of an export.
struct LayerPlan {
    base: Vec<BaseEntry>,
    entries: Vec<LayerEntry>,
    digests: Vec<DigestMember>,
    total: Option<u64>,
}

impl Default for LayerPlan {
    fn default() -> Self {
        Self {
            base: Vec::new(),
            entries: Vec::new(),
            digests: Vec::new(),
            total: Some(0),
        }
    }
}

impl LayerPlan {
    /// Adds a layer that the archive contains; with its digest, if `identity` is its recorded identity.
    fn add_sent(
        &mut self,
        store: &Store,
        id: LayerId,
        identity: Option<Option<LayerIdentity>>,
    ) -> Result<()> {
        let layer = disk::read::<LayerManifest>(&store.paths().layer_file(id))?.body;
        let bytes = layer.measured.map(|measured| measured.bytes);
        self.total = self.total.zip(bytes).map(|(total, bytes)| total + bytes);
        let known_as = identity.as_ref().and_then(|identity| {
            let id_across_stores = identity.as_ref()?.id;
            (id_across_stores != id).then_some(id_across_stores)
        });
        self.digests.push(match identity {
            None => DigestMember::Omitted,
            Some(None) => DigestMember::Computed,
            Some(Some(identity)) => DigestMember::Known(identity.digest),
        });
        let layer = layer.without_records();
        self.entries.push(LayerEntry {
            id,
            known_as,
            layer,
        });
        Ok(())
    }
}

fn encode<T: Body>(manifest: T) -> Result<Vec<u8>> {
    Record::first(manifest)
        .encode()
        .map_err(|error| Error::failed("cannot write the archive's manifest").because(error))
}

/// Returns the layers of a container's current state and of its snapshots, lower ones before upper ones where possible.
fn layers_of(
    manifest: &ContainerManifest,
    states: &BTreeMap<SnapshotId, SnapshotManifest>,
) -> Vec<LayerId> {
    let stacks = states.values().map(|state| state.stack.as_slice());
    bottom_up(stacks.chain([manifest.below_head()]))
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
