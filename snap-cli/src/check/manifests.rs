//! What the files say of containers and snapshots, and whether that can be true.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::report::{Fix, Known, Level, Options, Report};
use crate::container::durability::epoch;
use crate::error::Result;
use crate::snapshot::describe_loss;
use crate::store::manifest::{
    ContainerId, ContainerManifest, LayerManifest, SnapshotManifest, SnapshotRef,
};
use crate::store::name::SnapshotName;
use crate::store::{Store, disk};

const CONTAINER: &str = "container";
const SNAPSHOT: &str = "snapshot";

pub(super) fn look(store: &Store, options: &Options, report: &mut Report) -> Result<Vec<Known>> {
    let mut found = Vec::new();
    let mut names = HashMap::new();
    for (id, record) in store.containers()? {
        let path = store.paths().container_file(id);
        let manifest = match record {
            Ok(record) => record.body,
            // It may be the one that was asked for.
            Err(error) => {
                report.add(Level::Damaged, CONTAINER, path, error.to_string(), None);
                continue;
            }
        };
        if let Some(other) = names.insert(manifest.name.clone(), id) {
            let what = format!(
                "two containers are named {}: {other} and {id}",
                manifest.name
            );
            report.add(Level::Damaged, CONTAINER, path, what, None);
        }
        let wanted = options
            .only
            .as_ref()
            .is_none_or(|only| *only == manifest.name);
        if wanted {
            report.containers += 1;
            container(store, id, &manifest, report)?;
            let snapshots = snapshots(store, id, &manifest, report)?;
            found.push(Known {
                id,
                manifest,
                snapshots,
            });
        }
    }
    Ok(found)
}

fn container(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
    report: &mut Report,
) -> Result<()> {
    let name = &manifest.name;
    let path = store.paths().container_file(id);
    let (mut ids, mut names) = (HashSet::new(), HashSet::new());
    for snapshot in &manifest.snapshots {
        if !ids.insert(snapshot.id) || !names.insert(&snapshot.name) {
            let what = format!("{name} names the snapshot {} twice", snapshot.name);
            report.add(Level::Damaged, CONTAINER, path.clone(), what, None);
        }
    }
    for problem in wrong_numbers(manifest)
        .into_iter()
        .chain(lost_parents(manifest))
    {
        let fix = Some(Fix::Container(name.clone()));
        report.add(Level::Damaged, CONTAINER, path.clone(), problem, fix);
    }
    let epoch = epoch(store)?;
    let marks = manifest.snapshots.iter().map(|snapshot| {
        let address = format!("{name}@{}", snapshot.name);
        (address, snapshot.settling.as_ref(), Some(snapshot.id))
    });
    let basis = (name.to_string(), manifest.settling.as_ref(), None);
    for (address, mark, of) in marks.chain([basis]) {
        if let Some(why) = describe_loss(&address, mark, &epoch) {
            let about = if of.is_some() { SNAPSHOT } else { CONTAINER };
            let fix = Some(Fix::Accept(name.clone(), of));
            report.add(Level::Loose, about, path.clone(), why, fix);
        }
    }
    if disk::exists(&store.paths().pending_file(id))? {
        let what = format!("a change of {name} was cut off; the next command on it finishes that");
        let fix = Some(Fix::Settle(name.clone()));
        report.add(
            Level::Loose,
            CONTAINER,
            store.paths().pending_file(id),
            what,
            fix,
        );
    }
    Ok(())
}

/// The number after a counter's word.
fn number(name: &SnapshotName, word: &str) -> Option<u64> {
    let digits = name.as_str().strip_prefix(word)?;
    digits
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| digits.parse().ok())?
}

/// The counters that would give a number twice.
fn wrong_numbers(manifest: &ContainerManifest) -> Vec<String> {
    let next = counters(manifest);
    let mut wrong = Vec::new();
    for (word, says, least) in [
        ("snap", manifest.next_snap, next.0),
        ("auto", manifest.next_auto, next.1),
    ] {
        if says < least {
            wrong.push(format!(
                "the next number of {} would be {word}{says}, which was given already",
                manifest.name
            ));
        }
    }
    wrong
}

/// What the counters must be at least: for `snap` and for `auto`.
pub(super) fn counters(manifest: &ContainerManifest) -> (u64, u64) {
    let least = |word: &str, says: u64| {
        let given = manifest.snapshots.iter();
        let given = given.filter_map(|snapshot| number(&snapshot.name, word));
        given
            .map(|given| given.saturating_add(1))
            .fold(says, u64::max)
    };
    (
        least("snap", manifest.next_snap),
        least("auto", manifest.next_auto),
    )
}

fn lost_parents(manifest: &ContainerManifest) -> Vec<String> {
    let known: HashSet<_> = manifest.snapshots.iter().map(|s| s.id).collect();
    let mut lost = Vec::new();
    for snapshot in &manifest.snapshots {
        if snapshot
            .parent
            .is_some_and(|parent| !known.contains(&parent))
        {
            lost.push(format!(
                "{}@{} was made from a snapshot that is not there",
                manifest.name, snapshot.name
            ));
        }
    }
    if manifest
        .parent
        .is_some_and(|parent| !known.contains(&parent))
    {
        lost.push(format!(
            "{} was made from a snapshot that is not there",
            manifest.name
        ));
    }
    lost
}

fn snapshots(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
    report: &mut Report,
) -> Result<BTreeMap<crate::store::manifest::SnapshotId, SnapshotManifest>> {
    let mut found = BTreeMap::new();
    for snapshot in &manifest.snapshots {
        let path = store.paths().snapshot_file(id, snapshot.id);
        let address = format!("{}@{}", manifest.name, snapshot.name);
        match store.snapshot(id, snapshot.id) {
            Ok(body) => {
                if body.stack.first() != Some(&snapshot.layer) {
                    let what = format!("the list and the file of {address} tell of two states");
                    // A merge that was cut off: the next command on the container finishes it.
                    let (level, fix) = match manifest.merged {
                        Some(_) => (Level::Loose, Some(Fix::Settle(manifest.name.clone()))),
                        None => (Level::Damaged, None),
                    };
                    report.add(level, SNAPSHOT, path, what, fix);
                }
                found.insert(snapshot.id, body);
            }
            Err(error) => {
                let fix =
                    rebuilt(store, snapshot)?.map(|stack| Fix::Snapshot(id, snapshot.id, stack));
                let what = format!("{address}: {error}");
                report.add(Level::Damaged, SNAPSHOT, path, what, fix);
            }
        }
    }
    Ok(found)
}

/// The layers of a snapshot whose file is lost: its top layer, and what that was made over. Nothing when a
/// part of that is gone, merged with others since, say.
fn rebuilt(
    store: &Store,
    snapshot: &SnapshotRef,
) -> Result<Option<Vec<crate::store::manifest::LayerId>>> {
    let Ok(layer) = disk::read::<LayerManifest>(&store.paths().layer_file(snapshot.layer)) else {
        return Ok(None);
    };
    let mut stack = vec![snapshot.layer];
    stack.extend(layer.body.over);
    for layer in &stack {
        if !disk::exists(&store.paths().layer_tree(*layer))? {
            return Ok(None);
        }
    }
    Ok(Some(stack))
}
