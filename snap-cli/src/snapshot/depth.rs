//! Keeping stacks under a limit: each snapshot makes its container's stack one layer deeper, and when a
//! stack is too deep some of its layers are merged (docs/decisions/0008 says which, and what that costs).
//!
//! It is done along with a command that was asked for something else. So it never fails, and does nothing
//! to a container that is mounted; the next mount does it then.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

use super::Container;
use super::flatten::{base_at, merge_run, refuse_users};
use crate::container::state::Mounted;
use crate::delta::error::OnProgress;
use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::manifest::LayerId;

/// The lowest limit: a head, something merged, a base, and one that is to be merged.
pub const LEAST: usize = 4;

/// Merges layers of a container that is not mounted until its stack has no more layers than `limit`. A
/// failure is told in the log only.
pub fn keep(container: &mut Container<'_>, limit: usize, progress: OnProgress<'_>) {
    if container.manifest().stack.len() <= limit.max(LEAST) {
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
        let _reading = store.share()?;
        let size = |id: &LayerId| Ok(store.measured(*id)?.1.bytes);
        deltas.iter().map(size).collect::<Result<Vec<u64>>>()?
    };
    let width = width(limit, deltas.len());
    let ends = ends(deltas, &stacks(store)?);
    Ok(cheapest(&sizes, &ends, width).and_then(|at| {
        let run = deltas.get(at..at + width)?;
        Some(run.to_vec())
    }))
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

/// Where the run of `width` layers begins that is to be merged: the one whose largest layer is the
/// smallest, to a power of two, so that what was merged lies until its like have gathered. A run that frees
/// nothing, because some state goes on needing the old layers, counts as twice as large. Of several the one
/// that holds most, of equal ones the oldest.
fn cheapest(sizes: &[u64], ends: &[bool], width: usize) -> Option<usize> {
    if width < 2 {
        return None;
    }
    let key = |at: usize| {
        let run = sizes.get(at..at + width)?;
        let shared = ends.get(at..at + width - 1)?.iter().any(|end| *end);
        let largest = run.iter().max()?;
        let size = (u64::BITS - largest.leading_zeros()) + u32::from(shared);
        let total: u64 = run.iter().sum();
        Some((size, Reverse(total), Reverse(at)))
    };
    let best = (0..sizes.len()).filter_map(key).min();
    best.map(|(_, _, Reverse(at))| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_alike_is_merged_and_what_frees_space_first() {
        let none = [false; 5];
        assert_eq!(cheapest(&[9, 1, 1, 1, 9, 1], &none, 3), Some(1));
        // The oldest of equal ones.
        assert_eq!(cheapest(&[1, 1, 1, 1, 1, 1], &none, 2), Some(4));
        // Not a large one over and over again with small ones.
        assert_eq!(cheapest(&[1, 1, 8, 8, 8], &none, 3), Some(2));
        // A state ends within the first pair.
        let ends = [true, false, false, false, false];
        assert_eq!(cheapest(&[1, 1, 9, 2, 1, 9], &ends, 2), Some(3));
        assert_eq!(cheapest(&[1, 1, 9, 4, 1, 9], &ends, 2), Some(0));
        assert_eq!(cheapest(&[1], &[], 1), None);
        assert_eq!(cheapest(&[], &[], 0), None);
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

    /// What is copied in all over so many snapshots, for each byte that was written.
    fn copied(snapshots: u64, size: impl Fn(u64) -> u64) -> f64 {
        let limit = 128;
        let mut sizes: Vec<u64> = Vec::new();
        let (mut written, mut copied) = (0, 0);
        for number in 0..snapshots {
            sizes.insert(0, size(number));
            written += size(number);
            // Head and base count too.
            while sizes.len() + 2 > limit {
                let width = width(limit, sizes.len());
                // Each state keeps its layers, as when every one is a snapshot.
                let ends = vec![true; sizes.len() - 1];
                let at = cheapest(&sizes, &ends, width).unwrap();
                let sum: u64 = sizes.drain(at..at + width).sum();
                copied += sum;
                sizes.insert(at, sum);
            }
        }
        assert_eq!(sizes.iter().sum::<u64>(), written);
        f64::from(u32::try_from(copied * 100 / written).unwrap()) / 100.0
    }

    #[test]
    fn what_is_copied_grows_with_what_is_written() {
        let random = |number: u64| {
            let mixed = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            mixed % 1000 + 1
        };
        for (what, got) in [
            ("a thousand of one size", copied(1000, |_| 1)),
            ("many of one size", copied(20_000, |_| 1)),
            ("many of random sizes", copied(20_000, random)),
            (
                "now and then a large one",
                copied(20_000, |n| if n % 50 == 0 { 5000 } else { 1 }),
            ),
        ] {
            eprintln!("{what}: {got}");
            assert!(got < 8.0, "{what}: {got}");
        }
        assert!(copied(1000, |_| 1) < 1.0);
        assert!(copied(20_000, |_| 1) < 2.0);
    }
}
