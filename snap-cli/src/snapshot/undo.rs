//! Reverts changes since a snapshot: all of them, or those at some paths.
//!
//! A snapshot of the current state is taken first. If the container is not mounted, the old content is written
//! to a new head, and one commit activates the snapshot and the head. If it is mounted, the content is written
//! through the mount, path by path, and processes inside see each change.

use std::os::unix::ffi::OsStrExt;

use cowl_layers::layer::Upper;
use cowl_layers::sys::dir;
use cowl_layers::view::View;
use cowl_overlay::{Overlay, OverlayOptions};

use super::freeze::{self, Frozen};
use super::paths::{AllowedPaths, check_paths};
use super::restore::find_by_stack;
use super::take::{drop_if_unnamed, write_file};
use crate::container::Container;
use crate::container::Swap;
use crate::container::lxc::runs_in_lxc;
use crate::container::mount::MountRequest;
use crate::container::state::{Mounted, RunState};
use crate::delta::TargetLayer;
use crate::delta::revert::{RevertPlan, RevertStep, Scope};
use crate::error::{Error, Result};
use crate::host::mountinfo;
use crate::shell::quoted;
use crate::store::creation::Creation;
use crate::store::manifest::{ContainerManifest, LayerId, SnapshotId, SnapshotKind, SnapshotRef};
use crate::store::name::SnapshotName;
use crate::tree::error::OnProgress;
use crate::tree::writable::{DirTree, OverlayTree};
use cowl_layers::shown::Show as _;

/// The changes to revert.
#[derive(Debug)]
pub struct UndoRequest {
    /// The snapshot to compare with; `None` for the container's parent state.
    pub since: Option<SnapshotName>,
    /// The paths to revert.
    pub scope: Scope,
    /// The paths that the scope may contain.
    pub allowed: AllowedPaths,
}

/// The result of an undo, or of its plan.
#[derive(Debug, Default)]
pub struct Undone {
    /// The changes, path by path.
    pub steps: Vec<RevertStep>,
    /// The automatic snapshot of the previous state; `None` if another snapshot has that state, or if nothing
    /// changed.
    pub auto_snapshot: Option<SnapshotName>,
}

/// Returns the layers of the state to return to, and its snapshot.
fn find_target(
    container: &Container<'_>,
    request: &UndoRequest,
) -> Result<(Vec<LayerId>, Option<SnapshotId>)> {
    let manifest = container.manifest();
    if let Some(name) = &request.since {
        let (found, snapshot) = container.snapshot(name)?;
        return Ok((snapshot.stack, Some(found.id)));
    }
    let state = super::ResolvedState {
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

/// Returns what [`undo`] would do, without changing anything.
pub fn plan(container: &Container<'_>, request: &UndoRequest) -> Result<Undone> {
    let store = container.store();
    let _reading = store.lock_shared()?;
    let (stack, _) = find_target(container, request)?;
    Ok(Undone {
        steps: compare(container, &store.view(&stack)?, request)?.steps,
        auto_snapshot: None,
    })
}

/// Compares the current state with `old`, and returns the steps that revert it.
fn compare(container: &Container<'_>, old: &View, request: &UndoRequest) -> Result<RevertPlan> {
    if let Mounted::Alive(run) = container.mounted()? {
        refuse_inner_mounts(container, &run, &request.scope)?;
        run.flush(container.store(), container.id())?;
    }
    let now = container.store().view(&container.manifest().stack)?;
    check_paths(&request.scope, old, &now, request.allowed)?;
    Ok(RevertPlan::new(old, &now, &request.scope)?)
}

/// Fails if another file system is mounted in the scope: its content is not part of the container and must not
/// be removed.
fn refuse_inner_mounts(container: &Container<'_>, run: &RunState, scope: &Scope) -> Result<()> {
    let mounts = mountinfo::read()?;
    for mount in mountinfo::below(&mounts, &run.mountpoint) {
        let Ok(inside) = mount.at.strip_prefix(&run.mountpoint) else {
            continue;
        };
        if scope.overlaps(inside.as_os_str().as_bytes()) {
            return Err(Error::busy(format!(
                "cannot undo changes in {}: a file system is mounted at {}",
                container.name(),
                mount.at.shown()
            ))
            .hint(format!(
                "unmount it first (umount {}), then type: {}",
                quoted(&mount.at),
                container.store().session().command
            )));
        }
    }
    Ok(())
}

/// Reverts the changes.
///
/// Does nothing if there are none.
pub fn undo(
    container: &mut Container<'_>,
    request: &UndoRequest,
    progress: OnProgress<'_>,
) -> Result<Undone> {
    let store = container.store();
    // Files are changed through the mount.
    if let Mounted::Alive(state) = container.mounted()?
        && state.in_lxc
    {
        return Err(runs_in_lxc(container));
    }
    let mut creation = Creation::begin(store)?;
    let (stack, snapshot) = find_target(container, request)?;
    let old = store.view(&stack)?;
    let planned = compare(container, &old, request)?;
    if planned.is_empty() {
        creation.finish()?;
        return Ok(Undone::default());
    }
    let frozen = freeze::plan(container, &mut creation)?;
    let mut next = container.manifest().clone();
    let auto = retain_current(container, &mut creation, &mut next, &frozen)?;
    if request.scope.is_all() && snapshot.is_some() {
        next.parent = snapshot;
    }
    let done = match container.mounted()? {
        Mounted::Alive(run) => {
            next.head = frozen.head;
            next.stack.clone_from(&frozen.stack);
            freeze::commit(container, next, Some(creation))
                .and_then(|()| undo_mounted(container, &old, &frozen, &run, request, progress))
                .map_err(|error| hint_partial(container, error))
        }
        Mounted::No | Mounted::Dead(_) => {
            undo_unmounted(container, creation, next, &frozen, &old, &planned, progress)
        }
    };
    if let Some((id, _)) = &auto {
        drop_if_unnamed(container, *id)?;
    }
    done?;
    Ok(Undone {
        steps: planned.steps,
        auto_snapshot: auto.map(|(_, name)| name),
    })
}

/// Ensures that a snapshot retains the current state, and records it as the state to return to.
fn retain_current(
    container: &Container<'_>,
    creation: &mut Creation<'_>,
    next: &mut ContainerManifest,
    frozen: &Frozen,
) -> Result<Option<(SnapshotId, SnapshotName)>> {
    if let Some(id) = find_by_stack(container, &frozen.state)? {
        next.undo = Some(id);
        return Ok(None);
    }
    let (auto, after) = next.free_automatic();
    next.next_auto = after;
    let new = SnapshotRef {
        comment: "before undo".to_owned(),
        ..write_file(
            container,
            creation,
            &auto,
            SnapshotKind::Auto,
            &frozen.state,
        )?
    };
    let id = new.id;
    next.undo = Some(id);
    next.snapshots.push(new);
    Ok(Some((id, auto)))
}

/// Reverts the changes in a new head that is not in use yet.
fn undo_unmounted(
    container: &mut Container<'_>,
    mut creation: Creation<'_>,
    mut next: ContainerManifest,
    frozen: &Frozen,
    old: &View,
    plan: &RevertPlan,
    progress: OnProgress<'_>,
) -> Result<()> {
    let store = container.store();
    let mut head = frozen.head;
    if head == container.manifest().head {
        // The head has no changes, so it stays on top of the frozen state. It must not change before the
        // commit.
        let top = frozen.state.first().unwrap_or(&head);
        head = creation.create_head(&frozen.state, &store.paths().layer_tree(*top))?;
        creation.request_sweep();
    }
    let tree = store.paths().layer_tree(head);
    let layer = TargetLayer::open(&tree, store.space())?;
    let open = || -> Result<OverlayTree> {
        let upper = Upper::open(&tree, &store.paths().layer_work(head), store.space())?;
        let lowers = store.open_layers(&frozen.state)?;
        // Exact link counts are not needed here, and would cost a walk over all names of a lower file.
        let options = OverlayOptions {
            static_nlink: true,
            ..OverlayOptions::default()
        };
        let overlay = Overlay::new(Some(upper), lowers, options)
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
            rest.execute(old, (&open()?, &layer), progress)?;
        }
        false => plan.execute(old, (&open()?, &layer), progress)?,
    }
    creation.sync_content()?;
    next.head = head;
    next.stack = stack;
    container.commit(next, Some(creation), |_| Ok(Swap::Done))
}

/// Reverts the changes through the mount.
fn undo_mounted(
    container: &mut Container<'_>,
    old: &View,
    frozen: &Frozen,
    run: &RunState,
    request: &UndoRequest,
    progress: OnProgress<'_>,
) -> Result<()> {
    let store = container.store();
    // The frozen state does not change, whatever processes write meanwhile.
    let mut plan = RevertPlan::new(old, &store.view(&frozen.state)?, &request.scope)?;
    let mountpoint = container.mount(MountRequest::of(run.lifetime()))?;
    let open_error = |error| Error::at("open", &mountpoint, error);
    let root = dir::open_root(&mountpoint).map_err(open_error)?;
    let target = DirTree::new(root).map_err(open_error)?;
    if plan.revert_renames(&target)? {
        run.flush(container.store(), container.id())?;
        plan = RevertPlan::new(
            old,
            &store.view(&container.manifest().stack)?,
            &request.scope,
        )?;
    }
    let head = store.paths().layer_tree(container.manifest().head);
    let layer = TargetLayer::open(&head, store.space())?;
    Ok(plan.execute(old, (&target, &layer), progress)?)
}

/// Adds a hint on how to revert a partial undo.
fn hint_partial(container: &Container<'_>, error: Error) -> Error {
    match error.hint {
        Some(_) => error,
        None => error.hint(format!(
            "the paths restored so far remain restored; revert them too: cowl restore {} --undo",
            container.name()
        )),
    }
}
