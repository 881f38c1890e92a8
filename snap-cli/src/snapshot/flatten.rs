//! Merging adjacent layers of a container into one: deltas, or deltas and the base.
//!
//! The head stays as it is; so do the other containers that use the merged layers. The
//! container's own snapshots that hold the whole run get the merged layer in its place, so that the run
//! goes once nothing names a part of it.

use cowl_layers::view::View;

use super::restore::again;
use crate::container::Container;
use crate::container::mount::AfterUnmount;
use crate::container::state::Mounted;
use crate::container::{Swap, dead, detach};
use crate::error::{Error, Result};
use crate::store::making::Making;
use crate::store::manifest::{
    ContainerManifest, LayerId, LayerKind, LayerManifest, Merged, SnapshotManifest,
};
use crate::store::measure;
use crate::store::name::{Range, SnapshotName};
use crate::store::{Store, disk};
use crate::tree::error::{OnProgress, Progress};

/// What a flatten did, or would do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flattened {
    /// How many layers are merged; less than two: nothing is done.
    pub merged: usize,
    /// How many layers the container has afterwards.
    pub depth: usize,
}

/// Which layers to merge.
#[derive(Clone, Debug, Default)]
pub struct Which {
    /// Those of the snapshots of this range.
    pub range: Range,
    /// The base too: what comes out is a new base.
    pub base: bool,
}

/// The layers that are meant, topmost first: a run of the container's stack below the head.
fn run(container: &Container<'_>, Which { range, base }: &Which) -> Result<Vec<LayerId>> {
    if *base && range.from.is_some() {
        return Err(
            Error::usage("a range that begins with a snapshot leaves the base out")
                .hint("..B merges everything up to B into the base"),
        );
    }
    let manifest = container.manifest();
    let below = manifest.below_head();
    let place = |name: &SnapshotName| -> Result<usize> {
        let (_, snapshot) = container.snapshot(name)?;
        let from = below.len().checked_sub(snapshot.stack.len());
        from.filter(|from| below.get(*from..) == Some(snapshot.stack.as_slice()))
            .ok_or_else(|| {
                Error::failed(format!(
                    "{name} does not lie below what {} is now",
                    container.name()
                ))
                .hint("a range names snapshots that the container was made from, oldest first")
            })
    };
    let first = range.to.as_ref().map_or(Ok(0), &place)?;
    let end = match &range.from {
        Some(name) => place(name)?,
        None if *base => below.len(),
        None => base_at(container)?,
    };
    below
        .get(first..end)
        .map(<[LayerId]>::to_vec)
        .ok_or_else(|| {
            Error::usage("the range is the wrong way round")
                .hint("A..B: A is the older snapshot, B the newer")
        })
}

/// Where in the stack below the head the base lies.
pub(super) fn base_at(container: &Container<'_>) -> Result<usize> {
    let below = container.manifest().below_head();
    for (at, id) in below.iter().enumerate() {
        let path = container.store().paths().layer_file(*id);
        if disk::read::<LayerManifest>(&path)?.body.kind == LayerKind::Base {
            return Ok(at);
        }
    }
    Ok(below.len())
}

/// What [`flatten`] would do.
pub fn plan(container: &Container<'_>, which: &Which) -> Result<Flattened> {
    let run = run(container, which)?;
    let depth = container.manifest().stack.len();
    Ok(Flattened {
        merged: run.len(),
        depth: depth + 1 - run.len().max(1),
    })
}

/// Refuses while somebody uses the container, who would have the commit refused: better said before the
/// work than after it.
pub(super) fn refuse_users(container: &Container<'_>) -> Result<()> {
    dead::refuse_stranded(container)?;
    if let Mounted::Alive(state) = container.mounted()? {
        let users = detach::users(state.pid, state.device()?)?;
        if !users.is_empty() {
            return Err(detach::in_use(container, &users));
        }
    }
    Ok(())
}

/// Merges layers. A mounted container is mounted anew at the same place.
pub fn flatten(
    container: &mut Container<'_>,
    which: &Which,
    progress: OnProgress<'_>,
) -> Result<Flattened> {
    let planned = plan(container, which)?;
    refuse_users(container)?;
    if planned.merged < 2 {
        return Ok(planned);
    }
    let run = run(container, which)?;
    merge_run(container, &run, progress)?;
    Ok(planned)
}

/// Merges a run of the container's stack below the head.
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

    let mut making = Making::begin(store)?;
    let kind = match below.is_empty() {
        true => LayerKind::Base,
        false => LayerKind::Flattened,
    };
    let merged = making.create_layer(kind, &below, run)?;
    let total = measure::known_size(store, run)?;
    let mut progress = |done| progress(Progress { total, ..done });
    merge(store, run, &below, merged, &mut progress)?;
    making.sync_content()?;

    let was = container.unmount(AfterUnmount::MountAgain)?;
    let mut next = container.manifest().clone();
    next.stack = replaced(&next.stack, run, merged).unwrap_or(next.stack);
    next.origin = replaced(&next.origin, run, merged).unwrap_or(next.origin);
    if !next.stack.ends_with(&next.origin) {
        // It is in what was merged, and would only keep the old layers from going.
        next.origin = next.stack.last().copied().into_iter().collect();
    }
    for snapshot in &mut next.snapshots {
        // Whose state has the run's topmost layer on top has the whole run.
        if run.first() == Some(&snapshot.layer) {
            snapshot.layer = merged;
        }
    }
    next.merged = Some(Merged {
        run: run.to_vec(),
        layer: merged,
    });
    making.request_sweep();
    let done = container.commit(next, Some(making), |_| Ok(Swap::Done));
    if done.is_ok()
        && let Err(error) = finish_merge(container)
    {
        log::warn!("{error}; the layers are merged, and the next command does the rest");
    }
    let mounted = again(container, was.as_ref());
    done?;
    mounted.map_err(|error| {
        let what = format!(
            "the layers of {} are merged, but it could not be mounted again",
            container.name()
        );
        Error::failed(what)
            .because(error.to_string())
            .hint(format!("cowl mount {}", container.name()))
    })
}

/// Fills the layer `merged` with what the layers of the run show together.
fn merge(
    store: &Store,
    run: &[LayerId],
    below: &[LayerId],
    merged: LayerId,
    progress: OnProgress<'_>,
) -> Result<()> {
    let layers = store.open_layers(run)?;
    let (view, beneath) = if below.is_empty() {
        (View::new(layers), None)
    } else {
        let beneath = View::new(store.open_layers(below)?);
        (View::part(layers), Some(beneath))
    };
    let tree = store.paths().layer_tree(merged);
    crate::delta::flatten(&view, beneath.as_ref(), &tree, progress)?;
    Ok(())
}

/// `stack` with `merged` in the place of `run`; `None` when it does not hold the whole run.
fn replaced(stack: &[LayerId], run: &[LayerId], merged: LayerId) -> Option<Vec<LayerId>> {
    let at = stack.windows(run.len()).position(|part| part == run)?;
    let mut new = stack.get(..at)?.to_vec();
    new.push(merged);
    new.extend_from_slice(stack.get(at + run.len()..)?);
    Some(new)
}

/// Does what comes after the commit of a merge: whoever opens the container next does it when its writer was
/// killed before.
pub fn finish_merge(container: &mut Container<'_>) -> Result<()> {
    let Some(Merged { run, layer }) = container.manifest().merged.clone() else {
        return Ok(());
    };
    rewrite_snapshots(container, &run, layer)?;
    let next = ContainerManifest {
        merged: None,
        ..container.manifest().clone()
    };
    container.commit(next, None, |_| Ok(Swap::Done))
}

/// Both stacks show the same, so each file may be rewritten on its own, and a crash between two of them
/// changes nothing.
fn rewrite_snapshots(container: &Container<'_>, run: &[LayerId], merged: LayerId) -> Result<()> {
    let store = container.store();
    // Only for its note: a command that is killed in here may leave a temporary file, or the old layers.
    let mut making = Making::begin(store)?;
    making.request_sweep();
    for snapshot in &container.manifest().snapshots {
        let path = store.paths().snapshot_file(container.id(), snapshot.id);
        let record = disk::read::<SnapshotManifest>(&path)?;
        if let Some(stack) = replaced(&record.body.stack, run, merged) {
            let body = SnapshotManifest {
                stack,
                ..record.body.clone()
            };
            disk::replace(&path, &record.next(body))?;
        }
    }
    making.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_replaced_only_whole() {
        let [a, b, c, d, new] = std::array::from_fn(|_| LayerId::fresh());
        let stack = [a, b, c, d];
        assert_eq!(replaced(&stack, &[b, c], new), Some(vec![a, new, d]));
        assert_eq!(replaced(&stack, &[a, b, c, d], new), Some(vec![new]));
        assert_eq!(replaced(&[c, d], &[b, c], new), None);
        assert_eq!(replaced(&stack, &[c, b], new), None);
        assert_eq!(replaced(&[], &[b, c], new), None);
    }
}
