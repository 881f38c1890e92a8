//! Merges adjacent layers of a container into one: deltas, or deltas and the base.
//!
//! The head is not changed, nor are other containers that use the merged layers. The container's own snapshots
//! that contain the whole run get the merged layer instead, so that the run is collected once no manifest
//! references a part of it.

use std::os::unix::ffi::OsStrExt as _;

use cowl_layers::view::View;

use crate::container::state::Mounted;
use crate::container::{Container, Swap, daemon, kernel};
use crate::error::{Error, Result};
use crate::store::collect;
use crate::store::creation::Creation;
use crate::store::kernel::Driver;
use crate::store::manifest::{
    ContainerManifest, LayerId, LayerKind, LayerManifest, Merged, SnapshotManifest,
};
use crate::store::measure;
use crate::store::name::{Range, SnapshotName};
use crate::store::{Store, disk};
use crate::tree::error::{OnProgress, Progress};

/// The result of a flatten, or of its plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flattened {
    /// The number of layers to merge. With less than two, nothing is done.
    pub merged: usize,
    /// The depth of the container's stack afterwards.
    pub depth: usize,
}

/// The layers to merge.
#[derive(Clone, Debug, Default)]
pub struct FlattenRequest {
    /// The range of snapshots whose layers are merged.
    pub range: Range,
    /// Whether the base is merged too, into a new base.
    pub base: bool,
}

/// Returns the requested layers, topmost first: a run of the container's stack below the head.
fn find_run(
    container: &Container<'_>,
    FlattenRequest { range, base }: &FlattenRequest,
) -> Result<Vec<LayerId>> {
    if *base && range.from.is_some() {
        return Err(
            Error::usage("a range with a first snapshot excludes the base")
                .hint("..B merges everything up to B into the base"),
        );
    }
    let manifest = container.manifest();
    let below = manifest.below_head();
    let position = |name: &SnapshotName| -> Result<usize> {
        let (_, snapshot) = container.snapshot(name)?;
        let from = below.len().checked_sub(snapshot.stack.len());
        from.filter(|from| below.get(*from..) == Some(snapshot.stack.as_slice()))
            .ok_or_else(|| {
                Error::failed(format!(
                    "the current state of {} is not based on the layers of {name}",
                    container.name()
                ))
                .hint("use the container's ancestors as the ends of the range, oldest first")
            })
    };
    let first = range.to.as_ref().map_or(Ok(0), &position)?;
    let end = match &range.from {
        Some(name) => position(name)?,
        None if *base => below.len(),
        None => find_base(container)?,
    };
    below
        .get(first..end)
        .map(<[LayerId]>::to_vec)
        .ok_or_else(|| {
            Error::usage("the range is reversed")
                .hint("write A..B, where A is the older snapshot and B the newer")
        })
}

/// Returns the index of the base in the stack below the head.
pub(super) fn find_base(container: &Container<'_>) -> Result<usize> {
    let below = container.manifest().below_head();
    for (at, id) in below.iter().enumerate() {
        let path = container.store().paths().layer_file(*id);
        if disk::read::<LayerManifest>(&path)?.body.kind == LayerKind::Base {
            return Ok(at);
        }
    }
    Ok(below.len())
}

/// Returns the result that [`flatten`] would have, without changing anything.
pub fn plan(container: &Container<'_>, request: &FlattenRequest) -> Result<Flattened> {
    let run = find_run(container, request)?;
    let depth = container.manifest().stack.len();
    Ok(Flattened {
        merged: run.len(),
        depth: depth + 1 - run.len().max(1),
    })
}

/// Merges layers. A mounted container stays mounted, and its daemon uses the merged layer from then on.
pub fn flatten(
    container: &mut Container<'_>,
    request: &FlattenRequest,
    progress: OnProgress<'_>,
) -> Result<Flattened> {
    kernel::refuse(container, "merge layers of")?;
    let planned = plan(container, request)?;
    if planned.merged < 2 {
        // After an earlier merge, the daemon may have been too busy.
        switch_or_warn(container);
        collect::collect_or_warn(container.store());
        return Ok(planned);
    }
    let run = find_run(container, request)?;
    merge_run(container, &run, progress)?;
    Ok(planned)
}

/// Merges a run of layers of the container's stack below the head.
pub(super) fn merge_run(
    container: &mut Container<'_>,
    run: &[LayerId],
    progress: OnProgress<'_>,
) -> Result<()> {
    finish_merge(container)?;
    let store = container.store();
    let stack = container.manifest().stack.clone();
    let start = stack
        .iter()
        .position(|id| Some(id) == run.first())
        .unwrap_or(0);
    let below = stack.get(start + run.len()..).unwrap_or_default().to_vec();

    let mut creation = Creation::begin(store)?;
    let kind = match below.is_empty() {
        true => LayerKind::Base,
        false => LayerKind::Flattened,
    };
    let merged = creation.create_layer(kind, &below, run)?;
    let total = measure::known_size(store, run)?;
    let mut progress = |done| progress(Progress { total, ..done });
    merge(store, run, &below, merged, &mut progress)?;
    creation.sync_content()?;

    let mut next = container.manifest().clone();
    next.stack = replace_run(&next.stack, run, merged).unwrap_or(next.stack);
    next.origin = replace_run(&next.origin, run, merged).unwrap_or(next.origin);
    if !next.stack.ends_with(&next.origin) {
        // The origin was merged. A manifest that still listed it would retain the old layers.
        next.origin = next.stack.last().copied().into_iter().collect();
    }
    for snapshot in &mut next.snapshots {
        // A state that has the run's topmost layer on top contains the whole run.
        if run.first() == Some(&snapshot.layer) {
            snapshot.layer = merged;
        }
    }
    next.merged = Some(Merged {
        run: run.to_vec(),
        layer: merged,
    });
    creation.request_sweep();
    container.commit(next, Some(creation), |_| Ok(Swap::Done))?;
    if let Err(error) = finish_merge(container) {
        log::warn!("{error}; the layers are merged; the next command completes the cleanup");
    }
    Ok(())
}

/// Makes the daemon of a mounted container use the layers of the manifest, if it does not yet.
///
/// Both stacks have the same content, so a failure has no effect except that the old layers remain in use.
pub(super) fn switch_or_warn(container: &Container<'_>) {
    if let Err(error) = switch_daemon(container)
        && !matches!(uses_layers_of_manifest(container), Ok(true))
    {
        let name = container.name();
        log::warn!(
            "{error}; the layers of {name} are merged, but its mount uses the old ones: cowl flatten {name} tries \
             again, or they are removed when it is unmounted"
        );
    }
}

/// Whether the daemon uses the layers of the manifest. One of an older version may not know the request to switch.
fn uses_layers_of_manifest(container: &Container<'_>) -> Result<bool> {
    let store = container.store();
    let lowers = store.layer_trees(container.manifest().below_head())?;
    let status = daemon::connect(store, container.id())?
        .status()
        .map_err(|error| daemon::to_error(&error))?;
    let lowers = lowers.iter().map(|path| path.as_os_str().as_bytes());
    Ok(lowers.eq(status.lowers.iter().map(Vec::as_slice)))
}

fn switch_daemon(container: &Container<'_>) -> Result<()> {
    match container.mounted()? {
        Mounted::Alive(state) if state.driver() == Driver::Fuse => {}
        Mounted::Alive(_) | Mounted::No | Mounted::Dead(_) => return Ok(()),
    }
    let store = container.store();
    let lowers = store.layer_trees(container.manifest().below_head())?;
    let replaced = daemon::connect(store, container.id())?
        .replace_layers(&lowers)
        .map_err(|error| daemon::to_error(&error))?;
    if replaced.retained > 0 {
        log::info!(
            "{} of the old layers of {} remain: they contain deleted files that are still in use",
            replaced.retained,
            container.name()
        );
    }
    Ok(())
}

/// Fills the layer `merged` with the merged tree of the run.
fn merge(
    store: &Store,
    run: &[LayerId],
    below: &[LayerId],
    merged: LayerId,
    progress: OnProgress<'_>,
) -> Result<()> {
    let layers = store.open_layers(run)?;
    let (view, lower_view) = if below.is_empty() {
        (View::new(layers), None)
    } else {
        let lower_view = View::new(store.open_layers(below)?);
        (View::part(layers), Some(lower_view))
    };
    let tree = store.paths().layer_tree(merged);
    crate::delta::flatten(&view, lower_view.as_ref(), &tree, progress)?;
    Ok(())
}

/// Returns `stack` with `run` replaced by `merged`, or `None` if it does not contain the whole run.
fn replace_run(stack: &[LayerId], run: &[LayerId], merged: LayerId) -> Option<Vec<LayerId>> {
    // A damaged manifest can have an empty run, and windows of that length do not exist.
    if run.is_empty() {
        return None;
    }
    let at = stack.windows(run.len()).position(|part| part == run)?;
    let mut new = stack.get(..at)?.to_vec();
    new.push(merged);
    new.extend_from_slice(stack.get(at + run.len()..)?);
    Some(new)
}

/// Completes a committed merge: rewrites the container's snapshots to the merged layer, and makes the daemon use it.
///
/// If the command that merged was killed, the next command that opens the container calls this.
pub fn finish_merge(container: &mut Container<'_>) -> Result<()> {
    let Some(Merged { run, layer }) = container.manifest().merged.clone() else {
        return Ok(());
    };
    // Before the step that a full disk can prevent: the old layers are removed only after the daemon has released them.
    switch_or_warn(container);
    rewrite_snapshots(container, &run, layer)?;
    let next = ContainerManifest {
        merged: None,
        ..container.manifest().clone()
    };
    container.commit(next, None, |_| Ok(Swap::Done))?;
    collect::collect_or_warn(container.store());
    Ok(())
}

/// Replaces the run by the merged layer in all snapshots of the container.
///
/// Both stacks have the same content, so a crash between two files leaves every snapshot intact.
fn rewrite_snapshots(container: &Container<'_>, run: &[LayerId], merged: LayerId) -> Result<()> {
    let store = container.store();
    // This registers the pending cleanup only: a command that is killed here may leave a temporary file or the
    // old layers.
    let mut creation = Creation::begin(store)?;
    creation.request_sweep();
    for snapshot in &container.manifest().snapshots {
        let path = store.paths().snapshot_file(container.id(), snapshot.id);
        let record = disk::read::<SnapshotManifest>(&path)?;
        if let Some(stack) = replace_run(&record.body.stack, run, merged) {
            let body = SnapshotManifest {
                stack,
                ..record.body.clone()
            };
            disk::replace(&path, &record.next(body))?;
        }
    }
    creation.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_run_is_in_no_stack() {
        let [one, two] = [(); 2].map(|()| LayerId::fresh());
        assert_eq!(replace_run(&[one], &[], two), None);
        assert_eq!(replace_run(&[one], &[one], two), Some(vec![two]));
    }

    #[test]
    fn a_run_is_replaced_only_whole() {
        let [a, b, c, d, new] = std::array::from_fn(|_| LayerId::fresh());
        let stack = [a, b, c, d];
        assert_eq!(replace_run(&stack, &[b, c], new), Some(vec![a, new, d]));
        assert_eq!(replace_run(&stack, &[a, b, c, d], new), Some(vec![new]));
        assert_eq!(replace_run(&[c, d], &[b, c], new), None);
        assert_eq!(replace_run(&stack, &[c, b], new), None);
        assert_eq!(replace_run(&[], &[b, c], new), None);
    }
}
