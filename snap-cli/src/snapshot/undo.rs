//! Taking back what changed since a snapshot: all of it, or what lies at some paths.
//!
//! What the container is now is kept by a snapshot first. Where the container is not mounted, what is put
//! back goes into a new head, and one commit puts both in force. Where it is mounted, it is put back through
//! the mount, path by path, and programs inside see it.

use std::os::unix::ffi::OsStrExt;

use cowl_layers::layer::Upper;
use cowl_layers::sys::dir;
use cowl_layers::view::View;
use cowl_overlay::{Behaviour, Overlay};

use super::freeze::{self, Frozen};
use super::paths::{Only, check};
use super::restore::named;
use super::take::{drop_if_unnamed, write_file};
use crate::container::Container;
use crate::container::Swap;
use crate::container::state::{Mounted, RunState};
use crate::delta::revert::{RevertPlan, RevertStep, Scope};
use crate::error::{Error, Result};
use crate::host::mountinfo;
use crate::shell::quoted;
use crate::store::making::Making;
use crate::store::manifest::{ContainerManifest, LayerId, SnapshotId, SnapshotKind, SnapshotRef};
use crate::store::name::SnapshotName;
use crate::tree::error::OnProgress;
use crate::tree::writable::{DirTree, OverlayTree};
use cowl_layers::shown::Show as _;

/// What is to be taken back.
#[derive(Debug)]
pub struct Wish {
    /// Since when; `None`: since what the container was made from.
    pub since: Option<SnapshotName>,
    /// Which paths.
    pub scope: Scope,
    /// Which of them may be named.
    pub only: Only,
}

/// What was done, or would be.
#[derive(Debug, Default)]
pub struct Undone {
    /// Path by path.
    pub steps: Vec<RevertStep>,
    /// The automatic snapshot that keeps what was there; `None` where another one does, or nothing was
    /// done.
    pub kept_as: Option<SnapshotName>,
}

/// The state to go back to: its layers, and the snapshot.
fn target(container: &Container<'_>, wish: &Wish) -> Result<(Vec<LayerId>, Option<SnapshotId>)> {
    let manifest = container.manifest();
    if let Some(name) = &wish.since {
        let (found, snapshot) = container.snapshot(name)?;
        return Ok((snapshot.stack, Some(found.id)));
    }
    let state = super::State {
        container: container.id(),
        manifest: manifest.clone(),
        snapshot: None,
        stack: manifest.stack.clone(),
    };
    let parent = manifest
        .parent
        .filter(|id| manifest.snapshots.iter().any(|s| s.id == *id));
    Ok((state.parent_stack(container.store())?, parent))
}

/// What [`undo`] would do.
pub fn plan(container: &Container<'_>, wish: &Wish) -> Result<Undone> {
    let store = container.store();
    let _reading = store.share()?;
    let (stack, _) = target(container, wish)?;
    Ok(Undone {
        steps: look(container, &store.view(&stack)?, wish)?.steps,
        kept_as: None,
    })
}

fn look(container: &Container<'_>, old: &View, wish: &Wish) -> Result<RevertPlan> {
    if let Mounted::Alive(run) = container.mounted()? {
        refuse_inner_mounts(container, &run, &wish.scope)?;
        run.flush(container.store(), container.id())?;
    }
    let now = container.store().view(&container.manifest().stack)?;
    check(&wish.scope, old, &now, wish.only)?;
    Ok(RevertPlan::new(old, &now, &wish.scope)?)
}

/// What is mounted in the scope is no part of the container, and must not be removed with it.
fn refuse_inner_mounts(container: &Container<'_>, run: &RunState, scope: &Scope) -> Result<()> {
    let mounts = mountinfo::read()?;
    for mount in mountinfo::below(&mounts, &run.mountpoint) {
        let Ok(inside) = mount.at.strip_prefix(&run.mountpoint) else {
            continue;
        };
        if scope.overlaps(inside.as_os_str().as_bytes()) {
            return Err(Error::busy(format!(
                "something else is mounted in {}, at {}",
                container.name(),
                mount.at.shown()
            ))
            .hint(format!(
                "unmount it first (umount {}), then type: {}",
                quoted(&mount.at),
                container.store().session().who
            )));
        }
    }
    Ok(())
}

/// Takes back what changed. Does nothing where nothing did.
pub fn undo(
    container: &mut Container<'_>,
    wish: &Wish,
    progress: OnProgress<'_>,
) -> Result<Undone> {
    let store = container.store();
    let mut making = Making::begin(store)?;
    let (stack, snapshot) = target(container, wish)?;
    let old = store.view(&stack)?;
    let planned = look(container, &old, wish)?;
    if planned.is_empty() {
        making.done()?;
        return Ok(Undone::default());
    }
    let frozen = freeze::plan(container, &mut making)?;
    let mut next = container.manifest().clone();
    let kept = keep(container, &mut making, &mut next, &frozen)?;
    if wish.scope.is_all() && snapshot.is_some() {
        next.parent = snapshot;
    }
    let done = match container.mounted()? {
        Mounted::Alive(run) => {
            next.head = frozen.head;
            next.stack.clone_from(&frozen.stack);
            freeze::commit(container, next, Some(making))
                .and_then(|()| live(container, &old, &frozen, &run, wish, progress))
                .map_err(|error| unfinished(container, error))
        }
        Mounted::No | Mounted::Dead(_) => {
            apart(container, making, next, &frozen, &old, &planned, progress)
        }
    };
    if let Some((id, _)) = &kept {
        drop_if_unnamed(container, *id)?;
    }
    done?;
    Ok(Undone {
        steps: planned.steps,
        kept_as: kept.map(|(_, name)| name),
    })
}

/// Sees to it that a snapshot holds what the container is now, and notes it as what an undo gives.
fn keep(
    container: &Container<'_>,
    making: &mut Making<'_>,
    next: &mut ContainerManifest,
    frozen: &Frozen,
) -> Result<Option<(SnapshotId, SnapshotName)>> {
    if let Some(id) = named(container, &frozen.state)? {
        next.undo = Some(id);
        return Ok(None);
    }
    let auto = SnapshotName::automatic(next.next_auto);
    next.next_auto = next.next_auto.saturating_add(1);
    let new = SnapshotRef {
        comment: "before changes were taken back".to_owned(),
        ..write_file(container, making, &auto, SnapshotKind::Auto, &frozen.state)?
    };
    let id = new.id;
    next.undo = Some(id);
    next.snapshots.push(new);
    Ok(Some((id, auto)))
}

/// Into a new head that nobody has seen yet.
fn apart(
    container: &mut Container<'_>,
    mut making: Making<'_>,
    mut next: ContainerManifest,
    frozen: &Frozen,
    old: &View,
    plan: &RevertPlan,
    progress: OnProgress<'_>,
) -> Result<()> {
    let store = container.store();
    let mut head = frozen.head;
    if head == container.manifest().head {
        // Shared with the state because nothing was written to it; what is in force stays as it is.
        let top = frozen.state.first().unwrap_or(&head);
        head = making.head(&frozen.state, &store.paths().layer_tree(*top))?;
        making.frees_something();
    }
    let tree = store.paths().layer_tree(head);
    let open = || -> Result<OverlayTree> {
        let upper = Upper::open(&tree, &store.paths().layer_work(head), store.space())?;
        let lowers = store.open_layers(&frozen.state)?;
        // How many names of a lower file show is of no use here, and costs a walk to each of them.
        let behaviour = Behaviour {
            static_nlink: true,
            ..Behaviour::default()
        };
        let overlay = Overlay::new(Some(upper), lowers, behaviour)
            .map_err(|error| Error::failed("cannot open the layers").because(error))?;
        Ok(OverlayTree::new(overlay))
    };
    let mut stack = vec![head];
    stack.extend_from_slice(&frozen.state);
    let renamed = plan.revert_renames(&open()?)?;
    match renamed {
        true => {
            let scope = plan.scope();
            let rest = RevertPlan::new(old, &store.view(&stack)?, scope)?;
            rest.execute(old, &open()?, progress)?;
        }
        false => plan.execute(old, &open()?, progress)?,
    }
    making.sync_content()?;
    next.head = head;
    next.stack = stack;
    container.commit(next, Some(making), |_| Ok(Swap::Done))
}

/// Through the mount.
fn live(
    container: &mut Container<'_>,
    old: &View,
    frozen: &Frozen,
    run: &RunState,
    wish: &Wish,
    progress: OnProgress<'_>,
) -> Result<()> {
    let store = container.store();
    // What is frozen stands still, whatever programs do meanwhile.
    let mut plan = RevertPlan::new(old, &store.view(&frozen.state)?, &wish.scope)?;
    let place = container.mount(None, run.lifetime())?;
    let root = dir::open_root(&place).map_err(|error| Error::at("open", &place, error))?;
    let target = DirTree::new(root).map_err(|error| Error::at("open", &place, error))?;
    if plan.revert_renames(&target)? {
        run.flush(container.store(), container.id())?;
        plan = RevertPlan::new(old, &store.view(&container.manifest().stack)?, &wish.scope)?;
    }
    Ok(plan.execute(old, &target, progress)?)
}

fn unfinished(container: &Container<'_>, error: Error) -> Error {
    match error.hint {
        Some(_) => error,
        None => error.hint(format!(
            "what was put back until then stays; cowl restore {} --undo takes that back",
            container.name()
        )),
    }
}
