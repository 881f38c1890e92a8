//! Adds the snapshots of an image to a container that has some of its states.

use std::collections::HashMap;

use super::foreign::{self, Names};
use super::image::{ImageOptions, Imported, LayerSnapshots, record_of};
use super::image_layers::Wanted;
use super::image_snapshots::{self, PlannedSnapshot};
use crate::archive::image_source::{Digest, Image, ImageSource};
use crate::archive::oci;
use crate::container::state::Mounted;
use crate::container::{Container, Swap, durability};
use crate::error::{Error, Result};
use crate::recover;
use crate::snapshot::restore::find_by_stack;
use crate::snapshot::{ResolvedState, resolve};
use crate::store::creation::Creation;
use crate::store::manifest::{ContainerId, ContainerManifest, LayerId, SnapshotId};
use crate::store::name::{Address, ContainerName, SnapshotName};
use crate::store::{Store, disk};
use crate::tree::error::OnProgress;

/// The current state of a container after an update.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Current {
    /// The image has no state that the container lacks.
    UpToDate,
    /// It is the last state of the image. The state before is this automatic snapshot, unless another snapshot has it.
    Replaced(Option<SnapshotName>),
    /// It was retained, for this reason; the state of this snapshot is the last one of the image.
    Retained(&'static str, SnapshotName),
}

/// Adds the snapshots of an image to the container `name`, on top of the last state that both have.
///
/// Snapshots of the container are never removed. Its current state is replaced only if nothing was written since the
/// common state, and if it is not mounted.
pub fn update(
    store: &Store,
    name: &ContainerName,
    source: &dyn ImageSource,
    options: &ImageOptions,
    progress: OnProgress<'_>,
) -> Result<(Imported, Current)> {
    let done = add_states(store, name, source, options, progress);
    if done.as_ref().map_or_else(Error::is_no_space, |_| true) {
        source.release();
    }
    done
}

fn add_states(
    store: &Store,
    name: &ContainerName,
    source: &dyn ImageSource,
    options: &ImageOptions,
    progress: OnProgress<'_>,
) -> Result<(Imported, Current)> {
    // Completes or rolls back an interrupted operation.
    drop(recover::open(store, name)?);
    let image = source.image(&options.platform)?;
    let common = {
        let _reading = store.lock_shared()?;
        find_common(store, name, &image, progress)?
    };
    let Some(common) = common else {
        return Err(Error::failed(format!(
            "cannot update {name}: it has no state in common with the image"
        ))
        .hint("create another container from the image: cowl pull REFERENCE NAME"));
    };
    if common.layers == image.layers.len() {
        return Ok((Imported::of(&image), Current::UpToDate));
    }
    refuse_depth(
        name,
        common.stack.len() + image.layers.len() - common.layers,
    )?;
    let wanted = Wanted {
        image: &image,
        source,
        first: common.layers,
        below: &common.stack,
        options: options.unpacking(),
    };
    wanted.prepare(store, progress)?;
    let mut creation = Creation::begin(store)?;
    for layer in &common.stack {
        if !disk::is_dir(&store.paths().layer_tree(*layer))? {
            return Err(Error::busy(format!(
                "another command has removed layers of {name} during the download"
            ))
            .hint("try again"));
        }
    }
    let obtained = wanted.obtain(store, &mut creation, progress)?;
    let mut imported = Imported::of(&image);
    imported.unpacked = obtained.unpacked;
    imported.notes = obtained.notes;
    let container = recover::open(store, name)?;
    if !common.is_state_of(&container)? {
        return Err(Error::busy(format!(
            "another command has replaced {name}, or removed the snapshot that it has in common with the image"
        ))
        .hint("try again"));
    }
    let stacks = image_snapshots::stacks(&common.stack, &obtained.layers);
    let new = NewStates {
        image,
        common,
        stacks,
    };
    let current = new.commit(container, creation, options.snapshots, &mut imported)?;
    Ok((imported, current))
}

/// The maximum number of layers that a mount has. The head needs one.
const MAX_LAYERS: usize = 500;

/// Refuses a state with more layers than can be mounted: those of the image, on top of those of the container.
fn refuse_depth(name: &ContainerName, layers: usize) -> Result<()> {
    match layers < MAX_LAYERS {
        true => Ok(()),
        false => Err(Error::failed(format!(
            "cannot update {name}: it would have {layers} layers; the limit is {}",
            MAX_LAYERS - 1
        ))
        .hint(format!("merge layers first: cowl flatten {name}"))),
    }
}

/// The last state that a container and an image have in common.
#[derive(Clone, Debug)]
struct Common {
    /// The container. During a download, another one can get its name.
    container: ContainerId,
    /// The number of layers of the image up to it.
    layers: usize,
    /// The layers of the container, topmost first.
    stack: Vec<LayerId>,
}

impl Common {
    /// Returns whether a container still has the state, as its current one, a snapshot, or below one of these.
    fn is_state_of(&self, container: &Container<'_>) -> Result<bool> {
        if container.id() != self.container {
            return Ok(false);
        }
        let manifest = container.manifest();
        if manifest.below_head().ends_with(&self.stack) {
            return Ok(true);
        }
        for snapshot in &manifest.snapshots {
            let body = container.store().snapshot(container.id(), snapshot.id)?;
            if body.stack.ends_with(&self.stack) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Compares all states of a container with those of an image. The caller must hold a shared lock of the store.
///
/// States are equal if their layers have the same digests when they are exported, or were unpacked from the same layers.
/// Names and times of snapshots are not compared, because an image may claim any.
fn find_common(
    store: &Store,
    name: &ContainerName,
    image: &Image,
    progress: OnProgress<'_>,
) -> Result<Option<Common>> {
    let address = |snapshot: Option<SnapshotName>| Address {
        container: name.clone(),
        snapshot,
    };
    let current = resolve(store, &address(None))?;
    let mut states = vec![None];
    let snapshots = current.manifest.snapshots.iter().rev();
    states.extend(snapshots.map(|snapshot| Some(snapshot.name.clone())));
    let mut digests = HashMap::new();
    let mut best: Option<Common> = None;
    for state in states {
        let state = match state {
            None => current.clone(),
            Some(_) => resolve(store, &address(state))?,
        };
        let found = common_with(store, &state, image, &mut digests, progress)?;
        if found.as_ref().map(|common| common.layers) > best.as_ref().map(|common| common.layers) {
            best = found;
        }
        if best
            .as_ref()
            .is_some_and(|common| common.layers == image.layers.len())
        {
            break;
        }
    }
    Ok(best)
}

/// The digests of layers in an export, by the stacks of the states before and after them.
type KnownDigests = HashMap<(Vec<LayerId>, Vec<LayerId>), Digest>;

fn common_with(
    store: &Store,
    state: &ResolvedState,
    image: &Image,
    known: &mut KnownDigests,
    progress: OnProgress<'_>,
) -> Result<Option<Common>> {
    let head = state.snapshot.is_none().then_some(state.manifest.head);
    let mut common = None;
    let mut before: Vec<LayerId> = Vec::new();
    for (at, step) in state.image_plan(store)?.steps.into_iter().enumerate() {
        let Some(layer) = image.layers.get(at) else {
            break;
        };
        // The head may change at any time.
        if head.is_some() && step.state.first() == head.as_ref() {
            break;
        }
        if step.unpacked_from.as_ref() != Some(&layer.diff_id) {
            let key = (before.clone(), step.state.clone());
            let own = match known.get(&key) {
                Some(digest) => digest.clone(),
                None => {
                    let old = match key.0.is_empty() {
                        true => None,
                        false => Some(store.view(&key.0)?),
                    };
                    let new = store.view(&key.1)?;
                    let digest = oci::diff_id(old.as_ref(), &new, progress)?;
                    known.insert(key, digest.clone());
                    digest
                }
            };
            if own != layer.diff_id {
                break;
            }
        }
        before.clone_from(&step.state);
        common = Some(Common {
            container: state.container,
            layers: at + 1,
            stack: step.state,
        });
    }
    Ok(common)
}

/// The states of an image that a container lacks.
struct NewStates {
    image: Image,
    common: Common,
    /// The stack of each, topmost first.
    stacks: Vec<Vec<LayerId>>,
}

impl NewStates {
    /// Plans the snapshots: at least one for the last state.
    fn plan(&self, snapshots: LayerSnapshots, names: &mut Names) -> Vec<PlannedSnapshot> {
        let mut planned =
            image_snapshots::plan((&self.image, self.common.layers), snapshots, names);
        let last = self.stacks.len().saturating_sub(1);
        if planned.last().is_none_or(|planned| planned.layer != last) {
            planned.push(PlannedSnapshot::of_image(last, &self.image, names));
        }
        planned
    }

    fn commit(
        self,
        mut container: Container<'_>,
        mut creation: Creation<'_>,
        snapshots: LayerSnapshots,
        imported: &mut Imported,
    ) -> Result<Current> {
        let store = container.store();
        let place = (store, container.id());
        let mut next = container.manifest().clone();
        let before = next.parent;
        let mut common = find_by_stack(&container, &self.common.stack)?;
        let retained = self.reason_to_retain(&container)?;
        let mut names = Names::of(&next);
        next.parent = common;
        let (mut auto, mut new) = (None, Vec::new());
        if retained.is_none() && common.is_none() {
            let planned = PlannedSnapshot::before_update(&mut names);
            let stack = self.common.stack.as_slice();
            let settling = durability::settling_for(&container, stack)?;
            next.parent = before;
            let snapshot = planned.write(place, &next, stack, settling)?;
            creation.add_unsynced(store.paths().snapshot_file(container.id(), snapshot.id));
            common = Some(snapshot.id);
            next.parent = common;
            new.push(snapshot);
            auto = Some(planned.name().clone());
        }
        let mut last = None;
        for planned in self.plan(snapshots, &mut names) {
            let stack = self
                .stacks
                .get(planned.layer)
                .map_or(&[][..], Vec::as_slice);
            let settling = durability::settling_for(&container, stack)?;
            let snapshot = planned.write(place, &next, stack, settling)?;
            creation.add_unsynced(store.paths().snapshot_file(container.id(), snapshot.id));
            next.parent = Some(snapshot.id);
            imported.snapshots.push(snapshot.name.clone());
            last = Some((snapshot.name.clone(), snapshot.settling.clone()));
            new.push(snapshot);
        }
        creation.add_unsynced(store.paths().snapshots_dir(container.id()));
        (next.next_snap, next.next_auto) = names.counters();
        let (Some(stack), Some((name, settling))) = (self.stacks.last(), last) else {
            return Err(Error::damaged("an update has no new state"));
        };
        let current = match retained {
            Some(reason) => {
                next.parent = before;
                Current::Retained(reason, name)
            }
            None => {
                let like = stack.first().unwrap_or(&next.head);
                next.head = creation.create_head(stack, &store.paths().layer_tree(*like))?;
                next.stack = vec![next.head];
                next.stack.extend_from_slice(stack);
                next.undo = common.or(next.undo);
                next.settling = settling;
                if next.image.is_some() {
                    next.image = Some(Box::new(record_of(self.image)));
                }
                // The replaced head has no changes.
                creation.request_sweep();
                Current::Replaced(auto)
            }
        };
        let ids: Vec<SnapshotId> = new.iter().map(|snapshot| snapshot.id).collect();
        foreign::insert(&mut next, new);
        let done = container.commit(next, Some(creation), |_| Ok(Swap::Done));
        remove_unlisted(&container, &ids)?;
        done.map(|()| current)
    }

    /// Returns the reason for which the current state of the container is not replaced, if there is one.
    fn reason_to_retain(&self, container: &Container<'_>) -> Result<Option<&'static str>> {
        let manifest: &ContainerManifest = container.manifest();
        if container.mounted()? != Mounted::No {
            return Ok(Some("it is mounted"));
        }
        if manifest.below_head() != self.common.stack.as_slice() {
            return Ok(Some("it has states of its own since"));
        }
        let is_untouched = match self.common.stack.first() {
            Some(top) => container.store().is_untouched(manifest.head, *top)?,
            None => false,
        };
        Ok((!is_untouched).then_some("it was changed since"))
    }
}

/// Removes the files of new snapshots that the container's manifest does not list because the commit failed.
fn remove_unlisted(container: &Container<'_>, new: &[SnapshotId]) -> Result<()> {
    let store = container.store();
    if disk::exists(&store.paths().pending_file(container.id()))? {
        return Ok(());
    }
    for id in new {
        if !container
            .manifest()
            .snapshots
            .iter()
            .any(|listed| listed.id == *id)
        {
            disk::remove_if_exists(&store.paths().snapshot_file(container.id(), *id))?;
        }
    }
    Ok(())
}
