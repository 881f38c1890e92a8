//! Operations on the snapshots of an open container: take, restore, undo, list, prune, flatten.
//!
//! A snapshot freezes the head: from then on the snapshot references the head's layer, and a new, empty layer
//! becomes the head. Nothing is copied.

pub mod ancestry;
pub mod depth;
pub mod du;
pub mod flatten;
pub mod freeze;
pub mod image_plan;
pub mod list;
pub mod lxc_import;
pub mod meta;
pub mod paths;
pub mod prune;
pub mod readers;
pub mod remove;
pub mod restore;
pub mod retain;
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

/// The current state or a snapshot of a container, found by [`resolve`].
#[derive(Clone, Debug)]
pub struct ResolvedState {
    /// The container's id.
    pub container: ContainerId,
    /// The container's manifest.
    pub manifest: ContainerManifest,
    /// The snapshot; `None` for the container's current state.
    pub snapshot: Option<(SnapshotRef, SnapshotManifest)>,
    /// The layers, topmost first.
    pub stack: Vec<LayerId>,
}

/// Finds the state that an address refers to, without changing or locking anything.
///
/// Fails with `Busy` while the container is being adopted or released.
pub fn resolve(store: &Store, address: &Address) -> Result<ResolvedState> {
    let (container, record) = store.find(&address.container)?;
    let manifest = record.body;
    if matches!(manifest.moving, Some(Moving::Adopting | Moving::Releasing)) {
        // Its layers are being moved into or out of the store.
        return Err(Error::busy(format!(
            "{} is being adopted or released",
            address.container
        ))
        .hint("retry when that command has finished"));
    }
    let snapshot = match &address.snapshot {
        Some(name) => Some(find_snapshot(store, container, &manifest, name)?),
        None => None,
    };
    let stack = snapshot.as_ref().map_or(&manifest.stack, |(_, s)| &s.stack);
    Ok(ResolvedState {
        container,
        stack: stack.clone(),
        manifest,
        snapshot,
    })
}

impl ResolvedState {
    /// Returns the stack of the parent: the snapshot that was taken or restored before this state, or else the
    /// container's origin.
    pub fn parent_stack(&self, store: &Store) -> Result<Vec<LayerId>> {
        let parent = match &self.snapshot {
            Some((snapshot, _)) => snapshot.parent,
            None => self.manifest.parent,
        };
        let is_listed = |id| self.manifest.snapshots.iter().any(|s| s.id == id);
        match parent.filter(|id| is_listed(*id)) {
            Some(parent) => Ok(store.snapshot(self.container, parent)?.stack),
            None => Ok(self.origin_stack()),
        }
    }

    /// Returns the stack that the container was created with.
    ///
    /// After a merge of origin and later layers the origin no longer exists in this stack. Then only the bottom
    /// layer is left to compare with.
    pub fn origin_stack(&self) -> Vec<LayerId> {
        let origin = &self.manifest.origin;
        if !origin.is_empty() && self.stack.ends_with(origin) {
            return origin.clone();
        }
        self.stack.last().copied().into_iter().collect()
    }

    /// Returns the marker of a state that is not known to be durable.
    ///
    /// For the current state it is the marker of the state that the container was last taken from or restored
    /// to.
    pub fn settling(&self) -> Option<&Settling> {
        match &self.snapshot {
            Some((snapshot, _)) => snapshot.settling.as_ref(),
            None => self.manifest.settling.as_ref(),
        }
    }

    /// Returns a message if part of the state may be lost, and `None` otherwise.
    pub fn describe_loss(&self, store: &Store) -> Result<Option<String>> {
        let epoch = epoch(store)?;
        let name = &self.manifest.name;
        let address = match &self.snapshot {
            Some((snapshot, _)) => format!("{name}@{}", snapshot.name),
            None => name.to_string(),
        };
        Ok(describe_loss(&address, self.settling(), &epoch))
    }

    /// Fails if part of the state may be lost, unless `losses` accepts that.
    pub fn refuse_loss(&self, store: &Store, losses: Losses) -> Result<()> {
        match (self.describe_loss(store)?, losses) {
            (Some(message), Losses::Refuse) => Err(loss_error(message, &self.manifest.name)),
            (Some(_), Losses::Accept) | (None, _) => Ok(()),
        }
    }

    /// Flushes writes that are still cached by the kernel from the mount to the layers.
    ///
    /// Does nothing for a snapshot or a container that is not mounted.
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

/// The policy for states of which a part may be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Losses {
    /// Fail.
    Refuse,
    /// Use the state as it is.
    Accept,
}

/// Returns a message if part of the state `address` with this marker may be lost, and `None` otherwise.
pub fn describe_loss(address: &str, marker: Option<&Settling>, epoch: &str) -> Option<String> {
    let marker = marker.filter(|marker| !marker.is_pending(epoch))?;
    let source = match &marker.source {
        Some(source) => format!(" (it was made from {})", source.escape_debug()),
        None => String::new(),
    };
    Some(match &marker.failed {
        Some(reason) if marker.is_in_epoch(epoch) => {
            let reason = reason.escape_debug();
            format!("{address} is not durable, and part of it may be lost{source}: {reason}")
        }
        _ => format!(
            "{address} is incomplete{source}: the machine crashed or the disk was removed before all of \
             it was durable"
        ),
    })
}

fn loss_error(message: String, container: &ContainerName) -> Error {
    Error::failed(message).hint(format!(
        "inspect it first (cowl mount, ls, diff); --force uses it as it is, and cowl check {container} \
         --repair accepts it"
    ))
}
