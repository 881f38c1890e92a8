//! Going back to a snapshot under the same name.

use super::take::{drop_if_unnamed, write_file};
use crate::container::Container;

use crate::container::mount::AfterUnmount;
use crate::container::{Swap, dead, state::RunState};
use crate::error::{Error, Result};
use crate::store::making::Making;
use crate::store::manifest::{LayerId, Settling, SnapshotId, SnapshotKind, SnapshotRef};
use crate::store::name::{ContainerName, SnapshotName};
use crate::store::synced;

/// What a restore did, or would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The automatic snapshot that keeps what was there; `None` when nothing had been written since.
    pub kept_as: Option<SnapshotName>,
    /// The container was mounted, and is mounted again.
    pub mounted_again: bool,
}

/// Makes the container what it was at a snapshot. What it is now stays as an automatic snapshot.
pub fn restore(container: &mut Container<'_>, name: &SnapshotName) -> Result<Restored> {
    // Everything that can be refused is, before the mount is taken down.
    let (_, snapshot) = container.snapshot(name)?;
    container.store().open_layers(&snapshot.stack)?;
    dead::refuse_stranded(container)?;
    let was = container.unmount(AfterUnmount::MountAgain)?;
    let done = swap(container, name);
    let mounted = again(container, was.as_ref());
    // What became of the container comes first, what became of its mount second.
    let kept_as = done?;
    mounted.map_err(|error| {
        let kept = kept_as
            .as_ref()
            .map(|auto| format!("; what it was stays as {auto}"));
        let what = format!(
            "{} is restored{}, but it could not be mounted again",
            container.name(),
            kept.unwrap_or_default()
        );
        Error::failed(what)
            .because(error.to_string())
            .hint(format!("cowl mount {}", container.name()))
    })?;
    Ok(Restored {
        kept_as,
        mounted_again: was.is_some(),
    })
}

/// What [`restore`] would do.
pub fn plan(container: &Container<'_>, name: &SnapshotName) -> Result<Option<SnapshotName>> {
    let (_, snapshot) = container.snapshot(name)?;
    Ok(match Before::of(container, &snapshot.stack)? {
        Before::Unnamed(_) => Some(SnapshotName::automatic(container.manifest().next_auto)),
        Before::Named(_) | Before::Same => None,
    })
}

/// The snapshot that holds what the container was before it was last put back to something.
pub fn before_last(container: &Container<'_>) -> Result<SnapshotName> {
    let (manifest, name) = (container.manifest(), container.name());
    let hint = format!("`cowl list {name}` shows its snapshots");
    let Some(id) = manifest.undo else {
        return Err(Error::failed(format!(
            "{name} was never restored: there is nothing to undo"
        ))
        .hint(hint));
    };
    let known = manifest.snapshots.iter().find(|s| s.id == id);
    known.map(|known| known.name.clone()).ok_or_else(|| {
        Error::not_found(format!(
            "the snapshot of what {name} was before its last restore was removed"
        ))
        .hint(hint)
    })
}

/// Mounts anew what was mounted, after success and failure alike.
pub(super) fn again(container: &Container<'_>, was: Option<&RunState>) -> Result<()> {
    was.map_or(Ok(()), |was| container.mount_again(was))
}

/// What becomes of a state when its container is about to be another one.
enum Before {
    /// No snapshot holds it: it needs one. These are its layers.
    Unnamed(Vec<LayerId>),
    /// This snapshot holds it, because nothing was written since.
    Named(SnapshotId),
    /// It is the state that the container is to be.
    Same,
}

impl Before {
    fn of(container: &Container<'_>, target: &[LayerId]) -> Result<Self> {
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
        Ok(match named(container, below)? {
            Some(id) => Self::Named(id),
            // Its snapshot was removed; nothing else holds it.
            None => Self::Unnamed(below.to_vec()),
        })
    }
}

/// A snapshot of just these layers; the one that the head was made from before any other.
pub(super) fn named(container: &Container<'_>, stack: &[LayerId]) -> Result<Option<SnapshotId>> {
    let manifest = container.manifest();
    let mut known: Vec<_> = manifest.snapshots.iter().rev().collect();
    known.sort_by_key(|snapshot| Some(snapshot.id) != manifest.parent);
    for snapshot in known {
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
    let mut making = Making::begin(store)?;
    let mut next = container.manifest().clone();
    let (before, below) = (Before::of(container, &snapshot.stack)?, &snapshot.stack);
    let mut kept = None;
    if let Before::Unnamed(stack) = &before {
        synced::record_unsynced(store, container.manifest().head)?;
        let auto = SnapshotName::automatic(next.next_auto);
        let new = SnapshotRef {
            comment: format!("before restore of {name}"),
            ..write_file(container, &mut making, &auto, SnapshotKind::Auto, stack)?
        };
        next.next_auto = next.next_auto.saturating_add(1);
        kept = Some((new.id, auto));
        next.snapshots.push(new);
    }
    next.undo = match (&before, &kept) {
        (Before::Named(id), _) | (Before::Unnamed(_), Some((id, _))) => Some(*id),
        // Nothing changes, so what the restore before this one changed can still be undone.
        (Before::Same, _) | (Before::Unnamed(_), None) => next.undo.or(Some(target.id)),
    };
    if !matches!(before, Before::Same) {
        let like = below.first().unwrap_or(&next.head);
        next.head = making.create_head(below, &store.paths().layer_tree(*like))?;
        next.stack = vec![next.head];
        next.stack.extend_from_slice(below);
    }
    next.parent = Some(target.id);
    next.settling = inherited(target.settling.as_ref(), container.name(), Some(name));
    let stays = |stack: &Vec<LayerId>| stack.contains(&container.manifest().head);
    if next.head != container.manifest().head
        && !matches!(&before, Before::Unnamed(stack) if stays(stack))
    {
        // The head that was there, which holds nothing.
        making.request_sweep();
    }
    let done = container.commit(next, Some(making), |_| Ok(Swap::Done));
    if let Some((id, _)) = &kept {
        drop_if_unnamed(container, *id)?;
    }
    done?;
    Ok(kept.map(|(_, name)| name))
}

/// The mark of a container that comes to stand on a state with the mark `of`.
pub(crate) fn inherited(
    of: Option<&Settling>,
    container: &ContainerName,
    snapshot: Option<&SnapshotName>,
) -> Option<Settling> {
    let source = match snapshot {
        Some(snapshot) => format!("{container}@{snapshot}"),
        None => container.to_string(),
    };
    of.map(|mark| Settling {
        source: Some(source),
        ..mark.clone()
    })
}
