//! Restores a container to a snapshot, under the same container name.

use super::take::{drop_if_unnamed, write_file};
use crate::container::Container;
use crate::container::mount::AfterUnmount;
use crate::container::{Swap, dead, state::RunState};
use crate::error::{Error, Result};
use crate::store::creation::Creation;
use crate::store::manifest::{LayerId, Settling, SnapshotId, SnapshotKind, SnapshotRef};
use crate::store::name::{ContainerName, SnapshotName};
use crate::store::synced;

/// The result of a restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The automatic snapshot of the previous state; `None` if nothing had been written since the last
    /// snapshot.
    pub auto_snapshot: Option<SnapshotName>,
    /// Whether the container was mounted and has been remounted.
    pub remounted: bool,
}

/// Restores the container to a snapshot.
///
/// An automatic snapshot retains the current state.
pub fn restore(container: &mut Container<'_>, name: &SnapshotName) -> Result<Restored> {
    // Detect as many errors as possible before the unmount.
    let (_, snapshot) = container.snapshot(name)?;
    container.store().open_layers(&snapshot.stack)?;
    dead::refuse_stranded(container)?;
    let was = container.unmount(AfterUnmount::Remount)?;
    let done = swap(container, name);
    let mounted = remount(container, was.as_ref());
    // An error of the restore takes precedence over one of the mount.
    let auto_snapshot = done?;
    mounted.map_err(|error| {
        let previous = auto_snapshot
            .as_ref()
            .map(|auto| format!("; its previous state is {auto}"));
        let message = format!(
            "cannot remount {}: it is restored, but it is not mounted{}",
            container.name(),
            previous.unwrap_or_default()
        );
        Error::failed(message)
            .because(error.to_string())
            .hint(format!("cowl mount {}", container.name()))
    })?;
    Ok(Restored {
        auto_snapshot,
        remounted: was.is_some(),
    })
}

/// Returns the name of the automatic snapshot that [`restore`] would take, without changing anything.
pub fn plan(container: &Container<'_>, name: &SnapshotName) -> Result<Option<SnapshotName>> {
    let (_, snapshot) = container.snapshot(name)?;
    Ok(match CurrentState::classify(container, &snapshot.stack)? {
        CurrentState::Unnamed(_) => Some(container.manifest().free_automatic().0),
        CurrentState::Named(_) | CurrentState::Same => None,
    })
}

/// Returns the snapshot of the state before the last restore or undo.
pub fn find_before_last(container: &Container<'_>) -> Result<SnapshotName> {
    let (manifest, name) = (container.manifest(), container.name());
    let hint = format!("list its snapshots: cowl list {name}");
    let Some(id) = manifest.undo else {
        return Err(Error::failed(format!("cannot undo: {name} was never restored")).hint(hint));
    };
    let found = manifest.snapshots.iter().find(|s| s.id == id);
    found.map(|found| found.name.clone()).ok_or_else(|| {
        Error::not_found(format!(
            "cannot undo: the snapshot of {name} before its last restore was removed"
        ))
        .hint(hint)
    })
}

/// Returns the snapshot with the current state of a container, if nothing was written since; `None` if there is none.
///
/// The caller must have flushed the writes to its mount.
pub fn find_current(container: &Container<'_>) -> Result<Option<SnapshotName>> {
    let manifest = container.manifest();
    let below = manifest.below_head();
    let is_untouched = match below.first() {
        Some(top) => container.store().is_untouched(manifest.head, *top)?,
        None => false,
    };
    if !is_untouched {
        return Ok(None);
    }
    let id = find_by_stack(container, below)?;
    let named = manifest.snapshots.iter().find(|s| Some(s.id) == id);
    Ok(named.map(|snapshot| snapshot.name.clone()))
}

/// Remounts a container if it was mounted before an operation, whether that succeeded or failed.
pub(super) fn remount(container: &Container<'_>, was: Option<&RunState>) -> Result<()> {
    was.map_or(Ok(()), |was| container.remount(was))
}

/// The relation of the current state to the snapshots and to the state that is about to replace it.
enum CurrentState {
    /// No snapshot has the state, so one must be taken of these layers.
    Unnamed(Vec<LayerId>),
    /// This snapshot has the state: nothing has been written since it was taken.
    Named(SnapshotId),
    /// The current state equals the target.
    Same,
}

impl CurrentState {
    fn classify(container: &Container<'_>, target: &[LayerId]) -> Result<Self> {
        let (store, manifest) = (container.store(), container.manifest());
        let below = manifest.below_head();
        let touched = match below.first() {
            Some(top) => !store.is_untouched(manifest.head, *top)?,
            None => true,
        };
        if touched {
            return Ok(Self::Unnamed(manifest.stack.clone()));
        }
        if below == target {
            return Ok(Self::Same);
        }
        Ok(match find_by_stack(container, below)? {
            Some(id) => Self::Named(id),
            // Its snapshot was removed, and no other one has the state.
            None => Self::Unnamed(below.to_vec()),
        })
    }
}

/// Returns the snapshot with exactly this stack, preferably the parent of the head.
pub(crate) fn find_by_stack(
    container: &Container<'_>,
    stack: &[LayerId],
) -> Result<Option<SnapshotId>> {
    let manifest = container.manifest();
    let mut snapshots: Vec<_> = manifest.snapshots.iter().rev().collect();
    snapshots.sort_by_key(|snapshot| Some(snapshot.id) != manifest.parent);
    for snapshot in snapshots {
        if Some(&snapshot.layer) == stack.first()
            && container
                .store()
                .snapshot(container.id(), snapshot.id)?
                .stack
                == stack
        {
            return Ok(Some(snapshot.id));
        }
    }
    Ok(None)
}

fn swap(container: &mut Container<'_>, name: &SnapshotName) -> Result<Option<SnapshotName>> {
    let store = container.store();
    let (target, snapshot) = container.snapshot(name)?;
    let mut creation = Creation::begin(store)?;
    let mut next = container.manifest().clone();
    let (before, below) = (
        CurrentState::classify(container, &snapshot.stack)?,
        &snapshot.stack,
    );
    let mut taken = None;
    if let CurrentState::Unnamed(stack) = &before {
        synced::record_unsynced(store, container.manifest().head)?;
        let (auto, after) = next.free_automatic();
        let new = SnapshotRef {
            comment: format!("before restore of {name}"),
            ..write_file(container, &mut creation, &auto, SnapshotKind::Auto, stack)?
        };
        next.next_auto = after;
        taken = Some((new.id, auto));
        next.snapshots.push(new);
    }
    next.undo = match (&before, &taken) {
        (CurrentState::Named(id), _) | (CurrentState::Unnamed(_), Some((id, _))) => Some(*id),
        // Nothing changes, so the previous restore can still be undone.
        (CurrentState::Same, _) | (CurrentState::Unnamed(_), None) => next.undo.or(Some(target.id)),
    };
    if !matches!(before, CurrentState::Same) {
        let like = below.first().unwrap_or(&next.head);
        next.head = creation.create_head(below, &store.paths().layer_tree(*like))?;
        next.stack = vec![next.head];
        next.stack.extend_from_slice(below);
    }
    next.parent = Some(target.id);
    next.settling = inherit_settling(target.settling.as_ref(), container.name(), Some(name));
    let keeps_head = |stack: &Vec<LayerId>| stack.contains(&container.manifest().head);
    if next.head != container.manifest().head
        && !matches!(&before, CurrentState::Unnamed(stack) if keeps_head(stack))
    {
        // The replaced head has no changes and is collected.
        creation.request_sweep();
    }
    let done = container.commit(next, Some(creation), |_| Ok(Swap::Done));
    if let Some((id, _)) = &taken {
        drop_if_unnamed(container, *id)?;
    }
    done?;
    Ok(taken.map(|(_, name)| name))
}

/// Returns the settling marker of a container whose new state is based on a state with `marker`.
pub(crate) fn inherit_settling(
    marker: Option<&Settling>,
    container: &ContainerName,
    snapshot: Option<&SnapshotName>,
) -> Option<Settling> {
    let source = match snapshot {
        Some(snapshot) => format!("{container}@{snapshot}"),
        None => container.to_string(),
    };
    marker.map(|marker| Settling {
        source: Some(source),
        ..marker.clone()
    })
}
