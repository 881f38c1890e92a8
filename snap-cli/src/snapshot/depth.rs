//! Limits the depth of stacks: every snapshot makes the stack of its container one layer deeper, and a stack
//! that is too deep gets some of its layers merged.
//!
//! docs/decisions/0008 explains which layers are merged and at what cost. The merge is a side effect of another
//! command, so a failure of [`enforce_limit`] is only logged.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::flatten::{find_base, merge_run};
use crate::container::state::Mounted;
use crate::container::{Container, kernel};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::kernel::Driver;
use crate::store::manifest::{ContainerManifest, LayerId};
use crate::store::measure;
use crate::tree::error::OnProgress;
use cowl_layers::shown::Show as _;

/// The lowest limit: a head, a merged layer, a base, and one layer that is to be merged.
pub const MIN_LIMIT: usize = 4;

/// Returns whether the container's stack has more layers than `limit`.
pub fn is_over(manifest: &ContainerManifest, limit: usize) -> bool {
    manifest.stack.len() > limit.max(MIN_LIMIT)
}

/// The part of the free space that an automatic merge may use while a container is mounted.
const MOUNTED_SHARE: u64 = 4;

/// Whether a merge also applies to a mounted container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergeScope {
    /// Only an unmounted container: the caller is about to use a mounted one, and does not wait for a merge.
    Unmounted,
    /// Any container.
    Any,
}

/// Merges layers of a container until its stack has at most `limit` layers.
///
/// Only logs a failure.
pub fn enforce_limit(
    container: &mut Container<'_>,
    limit: usize,
    scope: MergeScope,
    progress: OnProgress<'_>,
) {
    if !is_over(container.manifest(), limit) {
        return;
    }
    let done = container.mounted().and_then(|mounted| match mounted {
        Mounted::Alive(_) if scope == MergeScope::Unmounted => Ok(0),
        Mounted::Alive(state) if state.driver() == Driver::Kernel => Ok(0),
        Mounted::Alive(_) => shrink_with(container, limit.max(MIN_LIMIT), has_room, progress),
        Mounted::No => shrink(container, limit.max(MIN_LIMIT), progress),
        Mounted::Dead(_) => Ok(0),
    });
    match done {
        Ok(0) => {}
        Ok(merged) => log::info!("{merged} layers of {} were merged", container.name()),
        Err(error) => log::info!("layers of {} were not merged: {error}", container.name()),
    }
}

/// Merges layers until the stack has at most `limit`, and returns the number of merged layers.
pub fn shrink(
    container: &mut Container<'_>,
    limit: usize,
    progress: OnProgress<'_>,
) -> Result<usize> {
    if limit < MIN_LIMIT {
        return Err(
            Error::usage(format!("a stack has at least {MIN_LIMIT} layers"))
                .hint("cowl flatten --base merges everything"),
        );
    }
    kernel::refuse(container, "merge layers of")?;
    shrink_with(container, limit, |_, _| Ok(true), progress)
}

/// Whether a merge leaves most of the free space to a container that is in use.
fn has_room(store: &Store, run: &[LayerId]) -> Result<bool> {
    let Some(bytes) = measure::known_size(store, run)? else {
        return Ok(false);
    };
    let space = rustix::fs::statvfs(store.root())
        .map_err(|error| Error::at("query the free space of", store.root(), error))?;
    Ok(bytes <= space.f_bavail.saturating_mul(space.f_frsize) / MOUNTED_SHARE)
}

/// Merges runs of layers for which `may_merge` returns true until the stack has at most `limit` layers.
fn shrink_with(
    container: &mut Container<'_>,
    limit: usize,
    may_merge: impl Fn(&Store, &[LayerId]) -> Result<bool>,
    progress: OnProgress<'_>,
) -> Result<usize> {
    let mut merged = 0;
    while container.manifest().stack.len() > limit {
        let Some(run) = choose(container, limit)? else {
            break;
        };
        if !may_merge(container.store(), &run)? {
            log::info!(
                "{} has little free space for a merge",
                container.store().root().shown()
            );
            break;
        }
        merge_run(container, &run, progress)?;
        merged += run.len();
    }
    Ok(merged)
}

/// Returns the run of deltas to merge next.
fn choose(container: &Container<'_>, limit: usize) -> Result<Option<Vec<LayerId>>> {
    let store = container.store();
    let below = container.manifest().below_head();
    let deltas = below.get(..find_base(container)?).unwrap_or_default();
    let sizes = {
        let _reading = store.lock_shared()?;
        let size = |id: &LayerId| Ok(measure::measured(store, *id)?.1.bytes);
        deltas.iter().map(size).collect::<Result<Vec<u64>>>()?
    };
    let width = run_width(limit, deltas.len());
    let boundaries = run_boundaries(deltas, &read_stacks(store)?);
    Ok(best_run(&sizes, &boundaries, width).and_then(|run| Some(deltas.get(run)?.to_vec())))
}

/// Returns the number of layers to merge at a time.
fn run_width(limit: usize, deltas: usize) -> usize {
    (limit / 4).max(2).min(deltas)
}

/// Returns all stacks that the manifests of a store reference.
fn read_stacks(store: &Store) -> Result<Vec<Vec<LayerId>>> {
    let mut stacks = Vec::new();
    for (id, record) in store.containers()? {
        // An unreadable manifest only makes the estimate of shared layers less precise, so it does not prevent
        // the merge.
        let Ok(record) = record else { continue };
        for snapshot in &record.body.snapshots {
            stacks.push(store.snapshot(id, snapshot.id)?.stack);
        }
        stacks.push(record.body.stack);
    }
    Ok(stacks)
}

/// Returns, for each pair of adjacent layers, whether a state contains exactly one of the two.
///
/// Merging a run across such a boundary frees nothing: the state retains its part of the run's layers.
fn run_boundaries(deltas: &[LayerId], stacks: &[Vec<LayerId>]) -> Vec<bool> {
    let positions: HashMap<LayerId, usize> = deltas
        .iter()
        .enumerate()
        .map(|(position, id)| (*id, position))
        .collect();
    let mut boundaries = vec![false; deltas.len().saturating_sub(1)];
    for stack in stacks {
        let present: HashSet<usize> = stack
            .iter()
            .filter_map(|id| positions.get(id).copied())
            .collect();
        for position in &present {
            if let Some(boundary) = boundaries.get_mut(*position) {
                *boundary |= !present.contains(&(position + 1));
            }
            let above = position.checked_sub(1);
            if let Some(boundary) = above.and_then(|above| boundaries.get_mut(above)) {
                *boundary |= !present.contains(&(position - 1));
            }
        }
    }
    boundaries
}

/// Returns the run of at most `width` layers that is best to merge.
///
/// The result should be many times as large as the largest layer in the run: half of `width` times, if
/// possible. Then the copied bytes end in a layer of a higher order of magnitude, and a byte is copied only as
/// often as there are orders: a few times. A large layer is never copied again for a few small neighbors. Among
/// the runs that grow equally, the cheapest to copy wins; its cost doubles if a state retains the old layers
/// too. Ties go to the oldest and then the longest run.
fn best_run(sizes: &[u64], boundaries: &[bool], width: usize) -> Option<Range<usize>> {
    let enough = (width as u128 * GROWTH_UNIT / 2).max(2 * GROWTH_UNIT);
    let mut best: Option<(u128, u128, Range<usize>)> = None;
    for at in 0..sizes.len() {
        let (mut sum, mut largest, mut shared) = (0_u128, 1_u128, false);
        for (position, size) in sizes.iter().enumerate().skip(at).take(width) {
            sum += u128::from(*size);
            largest = largest.max(u128::from(*size));
            if position == at {
                continue;
            }
            shared |= boundaries.get(position - 1).copied().unwrap_or(false);
            let growth = (sum * GROWTH_UNIT / largest).min(enough);
            let cost = sum * (1 + u128::from(shared));
            let better = best.as_ref().is_none_or(|(most, least, _)| {
                growth > *most || (growth == *most && cost <= *least)
            });
            if better {
                best = Some((growth, cost, at..position + 1));
            }
        }
    }
    best.map(|(_, _, run)| run)
}

/// The fixed-point unit of growth.
const GROWTH_UNIT: u128 = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_run_grows_and_copies_little() {
        let none = [false; 5];
        assert_eq!(best_run(&[5, 1, 1, 1, 9, 1], &none, 6), Some(1..4));
        // Ties go to the oldest.
        assert_eq!(best_run(&[1, 1, 1, 1, 1, 1], &none, 2), Some(4..6));
        // Layers that were merged before are not merged again.
        assert_eq!(best_run(&[1, 1, 1, 100, 100], &none[..4], 4), Some(1..3));
        assert_eq!(
            best_run(&[1, 100, 100, 100, 100], &none[..4], 8),
            Some(1..5)
        );
        // A state contains only one layer of the first pair.
        let boundaries = [true, false, false, false, false];
        assert_eq!(best_run(&[1, 1, 9, 3, 3, 9], &boundaries, 2), Some(0..2));
        assert_eq!(best_run(&[3, 3, 9, 4, 4, 9], &boundaries, 2), Some(3..5));
        // Empty layers can be merged.
        assert_eq!(best_run(&[0, 0], &none[..1], 2), Some(0..2));
        assert_eq!(best_run(&[1], &[], 1), None);
        assert_eq!(best_run(&[], &[], 0), None);
    }

    #[test]
    fn a_boundary_is_where_a_state_has_one_of_two_neighbors() {
        let ids: Vec<LayerId> = (0..4).map(|_| LayerId::fresh()).collect();
        let other = LayerId::fresh();
        let stack = |positions: &[usize]| -> Vec<LayerId> {
            positions
                .iter()
                .map(|position| ids[*position])
                .chain([other])
                .collect()
        };
        assert_eq!(run_boundaries(&ids, &[stack(&[0, 1, 2, 3])]), [false; 3]);
        assert_eq!(
            run_boundaries(&ids, &[stack(&[2, 3])]),
            [false, true, false]
        );
        assert_eq!(
            run_boundaries(&ids, &[stack(&[1]), stack(&[])]),
            [true, true, false]
        );
    }

    /// Over many snapshots of one size, the number of copied bytes stays near the number of written bytes.
    #[test]
    fn copied_bytes_grow_linearly_with_written_bytes() {
        let limit = 128;
        let mut sizes: Vec<u64> = Vec::new();
        let mut copied = 0;
        let snapshots = 20_000;
        for _ in 0..snapshots {
            sizes.insert(0, 1);
            // The head and the base count too.
            while sizes.len() + 2 > limit {
                let width = run_width(limit, sizes.len());
                // Every state retains its layers, as if each one were a snapshot.
                let boundaries = vec![true; sizes.len() - 1];
                let run = best_run(&sizes, &boundaries, width).unwrap();
                let at = run.start;
                let sum: u64 = sizes.drain(run).sum();
                copied += sum;
                sizes.insert(at, sum);
            }
        }
        assert_eq!(sizes.iter().sum::<u64>(), snapshots);
        assert!(copied < 4 * snapshots, "{copied}");
    }
}
