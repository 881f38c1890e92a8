//! Going back to a snapshot, under the same name or a new one, and cloning.

use super::take::{drop_if_unnamed, write_file};
use super::{Container, resolve};
use crate::container::create::over_layers_and;
use crate::container::durability::epoch;
use crate::container::lxc;
use crate::container::{Swap, state::RunState};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::layers::Making;
use crate::store::manifest::{Ephemeral, LayerId, Settling, SnapshotId, SnapshotKind, SnapshotRef};
use crate::store::name::{Address, ContainerName, SnapshotName};
use crate::tree::error::OnProgress;

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
    container.refuse_stranded()?;
    let was = container.unmount(true)?;
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
        store.note_unsynced(container.manifest().head)?;
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
        next.head = making.head(below, &store.layer_tree(*like))?;
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
        making.frees_something();
    }
    let done = container.commit(next, Some(making), |_| Ok(Swap::Done));
    if let Some((id, _)) = &kept {
        drop_if_unnamed(container, *id)?;
    }
    done?;
    Ok(kept.map(|(_, name)| name))
}

/// The mark of a container that comes to stand on a state with the mark `of`.
fn inherited(
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

/// Makes the container `new` over the layers of a state. What the source is now is frozen first. The copy of
/// an LXC container is one too, with a name and addresses of its own. Tells what people should know.
pub fn clone(store: &Store, source: &Address, new: &ContainerName) -> Result<Vec<String>> {
    clone_or_copy(store, source, new, Made::Clone)
}

/// The same for one mount only: when that ends, the new container goes, for good.
pub fn clone_for_one_mount(store: &Store, source: &Address, new: &ContainerName) -> Result<()> {
    let state = resolve(store, source)?;
    if state.manifest.lxc.is_some() {
        return Err(Error::failed(format!(
            "{} is an LXC container, which is unmounted at every stop and reboot",
            state.manifest.name
        ))
        .hint("clone it without --ephemeral, and when it is not needed any more: cowl destroy NEW --now"));
    }
    clone_or_copy(store, source, new, Made::Ephemeral).map(drop)
}

/// How a state becomes a container.
enum Made<'p> {
    /// Over the state's layers.
    Clone,
    /// The same, for one mount.
    Ephemeral,
    /// Over a base of its own.
    Copy(OnProgress<'p>),
}

/// The same with all content copied into a base of its own: the two share no layer.
pub fn copy(
    store: &Store,
    source: &Address,
    new: &ContainerName,
    progress: OnProgress<'_>,
) -> Result<Vec<String>> {
    clone_or_copy(store, source, new, Made::Copy(progress))
}

fn clone_or_copy(
    store: &Store,
    source: &Address,
    new: &ContainerName,
    made: Made<'_>,
) -> Result<Vec<String>> {
    // Whatever is wrong with the source is told before anything about the new name.
    resolve(store, source)?;
    let claim = store.claim(new)?;
    let made = clone_claimed(store, source, new, made);
    claim.remove()?;
    made
}

fn clone_claimed(
    store: &Store,
    source: &Address,
    new: &ContainerName,
    made: Made<'_>,
) -> Result<Vec<String>> {
    let (mut stack, mut making, manifest, mut lxc, mut settling, _lock);
    if source.snapshot.is_some() {
        making = Making::begin(store)?;
        // Found anew: from here on nothing that it names is collected.
        let state = resolve(store, source)?;
        store.open_layers(&state.stack)?;
        let kept = state.snapshot.as_ref().and_then(|(_, s)| s.config.as_ref());
        lxc = lxc::Copy::of((state.container, &state.manifest), kept, new)?;
        settling = inherited(
            state.settling(),
            &source.container,
            source.snapshot.as_ref(),
        );
        (stack, manifest, _lock) = (state.stack, state.manifest, None);
    } else {
        let mut container = Container::open(store, &source.container)?;
        lxc = lxc::Copy::of((container.id(), container.manifest()), None, new)?;
        stack = container.freeze()?;
        making = Making::begin(store)?;
        manifest = container.manifest().clone();
        let mark = match container.loss()? {
            Some(lost) => Some(lost.clone()),
            None => container.settling_of(&stack)?,
        };
        settling = inherited(mark.as_ref(), &source.container, None);
        _lock = Some(container);
    }
    let ephemeral = matches!(made, Made::Ephemeral).then_some(Ephemeral::Waiting);
    if let Made::Copy(progress) = made {
        stack = vec![super::copy::base(store, &mut making, &stack, progress)?];
        // The copy is durable with all that could be read.
        let epoch = epoch(store)?;
        settling = settling.filter(|mark| !mark.is_pending(&epoch));
    }
    let body = (new, stack.as_slice(), manifest.settings);
    over_layers_and(store, making, body, |id, manifest| {
        manifest.ephemeral = ephemeral;
        manifest.settling = settling;
        match &mut lxc {
            Some(lxc) => lxc.fill(store, id, manifest),
            None => Ok(()),
        }
    })?;
    let Some(lxc) = lxc else {
        return Ok(Vec::new());
    };
    // Who opens it first makes what is outside the store.
    drop(Container::open(store, new)?);
    Ok(lxc.notes)
}
