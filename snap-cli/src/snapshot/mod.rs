//! Snapshots as library calls: taking them, going back to them, comparing and merging states.
//!
//! A snapshot freezes the head: what the head's layer holds is named by the snapshot from then on, and a
//! new, empty layer becomes the head. Nothing is copied.

pub mod depth;
pub mod du;
pub mod flatten;
pub mod freeze;
pub mod keep;
pub mod line;
pub mod list;
pub mod lxc_import;
pub mod meta;
pub mod paths;
pub mod prune;
pub mod readers;
pub mod remove;
pub mod restore;
pub mod select;
pub mod take;
pub mod tree;
pub mod undo;

use crate::container::durability::epoch;
use crate::container::find_snapshot;
use crate::container::state::{self, Mounted};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::manifest::{
    ContainerId, ContainerManifest, LayerId, Settling, SnapshotManifest, SnapshotRef,
};
use crate::store::name::{Address, ContainerName};
use crate::store::outside::Moving;

/// A state that an address names.
#[derive(Clone, Debug)]
pub struct State {
    /// The container's id.
    pub container: ContainerId,
    /// The container's manifest.
    pub manifest: ContainerManifest,
    /// The snapshot; `None` for what the container is now.
    pub snapshot: Option<(SnapshotRef, SnapshotManifest)>,
    /// The layers, topmost first.
    pub stack: Vec<LayerId>,
}

/// Finds the state that an address names, without changing or locking anything.
pub fn resolve(store: &Store, address: &Address) -> Result<State> {
    let (container, record) = store.find(&address.container)?;
    let manifest = record.body;
    if matches!(manifest.moving, Some(Moving::Adopting | Moving::Releasing)) {
        // Its layers are about to come, or to go.
        return Err(Error::busy(format!(
            "{} is just being taken over, or given back",
            address.container
        ))
        .hint("try again when that is done"));
    }
    let snapshot = match &address.snapshot {
        Some(name) => Some(find_snapshot(store, container, &manifest, name)?),
        None => None,
    };
    let stack = snapshot.as_ref().map_or(&manifest.stack, |(_, s)| &s.stack);
    Ok(State {
        container,
        stack: stack.clone(),
        manifest,
        snapshot,
    })
}

impl State {
    /// What the state was made from: the snapshot taken or restored before it, else what its container
    /// began with.
    pub fn parent_stack(&self, store: &Store) -> Result<Vec<LayerId>> {
        let parent = match &self.snapshot {
            Some((snapshot, _)) => snapshot.parent,
            None => self.manifest.parent,
        };
        let known = |id| self.manifest.snapshots.iter().any(|s| s.id == id);
        match parent.filter(|id| known(*id)) {
            Some(parent) => Ok(store.snapshot(self.container, parent)?.stack),
            None => Ok(self.beginning()),
        }
    }

    /// What its container began with. Where that was merged into something else, all that is left to
    /// compare with is the layer at the bottom.
    pub fn beginning(&self) -> Vec<LayerId> {
        let origin = &self.manifest.origin;
        if !origin.is_empty() && self.stack.ends_with(origin) {
            return origin.clone();
        }
        self.stack.last().copied().into_iter().collect()
    }

    /// The mark that says that the state is not known to be durable; for what a container is now, that of
    /// the state that it stands on.
    pub fn settling(&self) -> Option<&Settling> {
        match &self.snapshot {
            Some((snapshot, _)) => snapshot.settling.as_ref(),
            None => self.manifest.settling.as_ref(),
        }
    }

    /// Says why a part of the state may be lost; `None` when it is not.
    pub fn loss(&self, store: &Store) -> Result<Option<String>> {
        let epoch = epoch(store)?;
        let name = &self.manifest.name;
        let address = match &self.snapshot {
            Some((snapshot, _)) => format!("{name}@{}", snapshot.name),
            None => name.to_string(),
        };
        Ok(loss(&address, self.settling(), &epoch))
    }

    /// Refuses a state of which a part may be lost, unless that is accepted.
    pub fn refuse_loss(&self, store: &Store, losses: Losses) -> Result<()> {
        match (self.loss(store)?, losses) {
            (Some(why), Losses::Refuse) => Err(refused_loss(why, &self.manifest.name)),
            (Some(_), Losses::Accept) | (None, _) => Ok(()),
        }
    }

    /// Has what programs wrote through the mount and the kernel still keeps written to the layers.
    /// Nothing for a snapshot, and for what is not mounted.
    pub fn flush(&self, store: &Store) -> Result<()> {
        if self.snapshot.is_some() {
            return Ok(());
        }
        match state::probe(store, self.container)? {
            Mounted::Alive(state) => state.flush(store, self.container),
            Mounted::No | Mounted::Dead(_) => Ok(()),
        }
    }
}

/// Whether a state of which a part may be lost is good enough to build on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Losses {
    /// It is not.
    Refuse,
    /// It is, as it is.
    Accept,
}

/// Says why a part of the state `address` with this mark may be lost; `None` when it is not.
pub fn loss(address: &str, mark: Option<&Settling>, epoch: &str) -> Option<String> {
    let mark = mark.filter(|mark| !mark.is_pending(epoch))?;
    let source = match &mark.source {
        Some(source) => format!(" (it was made from {})", source.escape_debug()),
        None => String::new(),
    };
    Some(match &mark.failed {
        Some(why) if mark.is_in_epoch(epoch) => {
            let why = why.escape_debug();
            format!("{address} is not durable, and a part of it may be lost{source}: {why}")
        }
        _ => format!(
            "{address} is incomplete{source}: the machine went down, or the disk was taken away, before \
             all of it was durable"
        ),
    })
}

fn refused_loss(why: String, container: &ContainerName) -> Error {
    Error::failed(why).hint(format!(
        "inspect it first (cowl mount, ls, diff); --force uses it as it is, and cowl check {container} \
         --repair accepts it"
    ))
}
