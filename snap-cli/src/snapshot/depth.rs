//! Keeping stacks under a limit: each snapshot makes its container's stack one layer deeper, and when a
//! stack is too deep some of its layers are merged (docs/decisions/0008 says which, and what that costs).
//!
//! It is done along with a command that was asked for something else. So it never fails, and does nothing
//! to a container that is mounted; the next mount does it then.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::flatten::{base_at, merge_run, refuse_users};
use crate::container::Container;
use crate::container::state::Mounted;
use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::manifest::{ContainerManifest, LayerId};
use crate::store::measure;
use crate::tree::error::OnProgress;

/// The lowest limit: a head, something merged, a base, and one that is to be merged.
pub const LEAST: usize = 4;

/// Returns whether the container's stack has more layers than `limit`.
pub fn is_over(manifest: &ContainerManifest, limit: usize) -> bool {
    manifest.stack.len() > limit.max(LEAST)
}

/// Merges layers of a container that is not mounted until its stack has no more layers than `limit`. A
/// failure is told in the log only.
pub fn keep(container: &mut Container<'_>, limit: usize, progress: OnProgress<'_>) {
    if !is_over(container.manifest(), limit) {
        return;
    }
    let done = container.mounted().and_then(|mounted| match mounted {
        Mounted::No => shrink(container, limit.max(LEAST), progress),
        Mounted::Alive(_) | Mounted::Dead(_) => Ok(0),
    });
    match done {
        Ok(0) => {}
        Ok(merged) => log::info!("{merged} layers of {} were merged", container.name()),
        Err(error) => log::info!("layers of {} were not merged: {error}", container.name()),
    }
}

/// Merges layers until the stack has no more than `limit`, and says how many were merged. A mounted
/// container is mounted anew.
pub fn shrink(
    container: &mut Container<'_>,
    limit: usize,
    progress: OnProgress<'_>,
) -> Result<usize> {
    if limit < LEAST {
        return Err(Error::usage(format!("a stack has at least {LEAST} layers"))
            .hint("cowl flatten --base merges everything"));
    }
    let mut merged = 0;
    while container.manifest().stack.len() > limit {
        if merged == 0 {
            refuse_users(container)?;
        }
        let Some(run) = choose(container, limit)? else {
            break;
        };
        merge_run(container, &run, progress)?;
        merged += run.len();
    }
    Ok(merged)
}

/// The run of deltas to merge next.
fn choose(container: &Container<'_>, limit: usize) -> Result<Option<Vec<LayerId>>> {
    let store = container.store();
    let below = container.manifest().below_head();
    let deltas = below.get(..base_at(container)?).unwrap_or_default();
    let sizes = {
        let _reading = store.lock_shared()?;
        let size = |id: &LayerId| Ok(measure::measured(store, *id)?.1.bytes);
        deltas.iter().map(size).collect::<Result<Vec<u64>>>()?
    };
    let width = width(limit, deltas.len());
    let ends = ends(deltas, &stacks(store)?);
    Ok(best(&sizes, &ends, width).and_then(|run| Some(deltas.get(run)?.to_vec())))
}

/// How many layers are merged at a time.
fn width(limit: usize, deltas: usize) -> usize {
    (limit / 4).max(2).min(deltas)
}

/// All stacks that the manifests of a store name.
fn stacks(store: &Store) -> Result<Vec<Vec<LayerId>>> {
    let mut stacks = Vec::new();
    for (id, record) in store.containers()? {
        // What one that can't be read names is not known: no reason not to merge.
        let Ok(record) = record else { continue };
        for snapshot in &record.body.snapshots {
            stacks.push(store.snapshot(id, snapshot.id)?.stack);
        }
        stacks.push(record.body.stack);
    }
    Ok(stacks)
}

/// For each layer but the last whether some state has it and not the next one, or the other way round: a
/// run over that place leaves its layers to that state, and frees nothing.
fn ends(deltas: &[LayerId], stacks: &[Vec<LayerId>]) -> Vec<bool> {
    let places: HashMap<LayerId, usize> = deltas
        .iter()
        .enumerate()
        .map(|(place, id)| (*id, place))
        .collect();
    let mut ends = vec![false; deltas.len().saturating_sub(1)];
    for stack in stacks {
        let has: HashSet<usize> = stack
            .iter()
            .filter_map(|id| places.get(id).copied())
            .collect();
        for place in &has {
            if let Some(end) = ends.get_mut(*place) {
                *end |= !has.contains(&(place + 1));
            }
            if let Some(end) = place.checked_sub(1).and_then(|above| ends.get_mut(above)) {
                *end |= !has.contains(&(place - 1));
            }
        }
    }
    ends
}

/// Which run of at most `width` layers to merge.
///
/// The result is to be many times as large as the largest that goes into it: half of `width`, where that can
/// be had. So whatever is copied ends in a layer of a higher order, and over its whole life a byte is copied
/// as often as there are orders: a few times. A large layer is never copied again for a few small ones beside
/// it. Of all such runs the one with the least to copy, twice where some state goes on needing the old layers
/// too; of equal ones the oldest, and of those the longest.
fn best(sizes: &[u64], ends: &[bool], width: usize) -> Option<Range<usize>> {
    let enough = (width as u128 * PARTS / 2).max(2 * PARTS);
    let mut best: Option<(u128, u128, Range<usize>)> = None;
    for at in 0..sizes.len() {
        let (mut sum, mut largest, mut shared) = (0_u128, 1_u128, false);
        for (place, size) in sizes.iter().enumerate().skip(at).take(width) {
            sum += u128::from(*size);
            largest = largest.max(u128::from(*size));
            if place == at {
                continue;
            }
            shared |= ends.get(place - 1).copied().unwrap_or(false);
            let growth = (sum * PARTS / largest).min(enough);
            let cost = sum * (1 + u128::from(shared));
            let better = best.as_ref().is_none_or(|(most, least, _)| {
                growth > *most || (growth == *most && cost <= *least)
            });
            if better {
                best = Some((growth, cost, at..place + 1));
            }
        }
    }
    best.map(|(_, _, run)| run)
}

/// Growth is counted in so many parts of one.
const PARTS: u128 = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_grows_and_copies_little() {
        let none = [false; 5];
        assert_eq!(best(&[5, 1, 1, 1, 9, 1], &none, 6), Some(1..4));
        // The oldest of equal ones.
        assert_eq!(best(&[1, 1, 1, 1, 1, 1], &none, 2), Some(4..6));
        // What was merged before is left alone.
        assert_eq!(best(&[1, 1, 1, 100, 100], &none[..4], 4), Some(1..3));
        assert_eq!(best(&[1, 100, 100, 100, 100], &none[..4], 8), Some(1..5));
        // A state ends within the first pair.
        let ends = [true, false, false, false, false];
        assert_eq!(best(&[1, 1, 9, 3, 3, 9], &ends, 2), Some(0..2));
        assert_eq!(best(&[3, 3, 9, 4, 4, 9], &ends, 2), Some(3..5));
        // Layers of no size at all are as good as any.
        assert_eq!(best(&[0, 0], &none[..1], 2), Some(0..2));
        assert_eq!(best(&[1], &[], 1), None);
        assert_eq!(best(&[], &[], 0), None);
    }

    #[test]
    fn a_state_ends_where_it_has_one_of_two_neighbours() {
        let ids: Vec<LayerId> = (0..4).map(|_| LayerId::fresh()).collect();
        let other = LayerId::fresh();
        let of = |places: &[usize]| -> Vec<LayerId> {
            places
                .iter()
                .map(|place| ids[*place])
                .chain([other])
                .collect()
        };
        assert_eq!(ends(&ids, &[of(&[0, 1, 2, 3])]), [false; 3]);
        assert_eq!(ends(&ids, &[of(&[2, 3])]), [false, true, false]);
        assert_eq!(ends(&ids, &[of(&[1]), of(&[])]), [true, true, false]);
    }

    /// What is copied in all over many snapshots of one size stays near to what was written.
    #[test]
    fn what_is_copied_grows_with_what_is_written() {
        let limit = 128;
        let mut sizes: Vec<u64> = Vec::new();
        let mut copied = 0;
        let snapshots = 20_000;
        for _ in 0..snapshots {
            sizes.insert(0, 1);
            // Head and base count too.
            while sizes.len() + 2 > limit {
                let width = width(limit, sizes.len());
                // Each state keeps its layers, as when every one is a snapshot.
                let ends = vec![true; sizes.len() - 1];
                let run = best(&sizes, &ends, width).unwrap();
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
