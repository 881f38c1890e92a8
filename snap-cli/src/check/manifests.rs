//! Verification of the manifests of containers and snapshots.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::report::{CheckReport, Fix, Options, ReadableContainer, Severity};
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

/// Verifies the manifests, and returns the readable containers.
pub(super) fn check(
    store: &Store,
    options: &Options,
    report: &mut CheckReport,
) -> Result<Vec<ReadableContainer>> {
    let mut found = Vec::new();
    let mut names = HashMap::new();
    for (id, record) in store.containers()? {
        let path = store.paths().container_file(id);
        let manifest = match record {
            Ok(record) => record.body,
            // Its name is unknown, so it is reported even if only one container is checked.
            Err(error) => {
                report.add(Severity::Damaged, CONTAINER, path, error.to_string(), None);
                continue;
            }
        };
        if let Some(other) = names.insert(manifest.name.clone(), id) {
            let what = format!(
                "two containers are named {}: {other} and {id}",
                manifest.name
            );
            report.add(Severity::Damaged, CONTAINER, path, what, None);
        }
        let is_selected = options
            .only
            .as_ref()
            .is_none_or(|only| *only == manifest.name);
        if is_selected {
            report.containers += 1;
            check_container(store, id, &manifest, report)?;
            let snapshots = check_snapshots(store, id, &manifest, report)?;
            found.push(ReadableContainer {
                id,
                manifest,
                snapshots,
            });
        }
    }
    Ok(found)
}

fn check_container(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
    report: &mut CheckReport,
) -> Result<()> {
    let name = &manifest.name;
    let path = store.paths().container_file(id);
    let (mut ids, mut names) = (HashSet::new(), HashSet::new());
    for snapshot in &manifest.snapshots {
        if !ids.insert(snapshot.id) || !names.insert(&snapshot.name) {
            let what = format!("{name} lists the snapshot {} twice", snapshot.name);
            report.add(Severity::Damaged, CONTAINER, path.clone(), what, None);
        }
    }
    for problem in counter_problems(manifest)
        .into_iter()
        .chain(parent_problems(manifest))
    {
        let fix = Some(Fix::Container(name.clone()));
        report.add(Severity::Damaged, CONTAINER, path.clone(), problem, fix);
    }
    let epoch = epoch(store)?;
    let markers = manifest.snapshots.iter().map(|snapshot| {
        let address = format!("{name}@{}", snapshot.name);
        (address, snapshot.settling.as_ref(), Some(snapshot.id))
    });
    let basis = (name.to_string(), manifest.settling.as_ref(), None);
    for (address, mark, of) in markers.chain([basis]) {
        if let Some(why) = describe_loss(&address, mark, &epoch) {
            let about = if of.is_some() { SNAPSHOT } else { CONTAINER };
            let fix = Some(Fix::Accept(name.clone(), of));
            report.add(Severity::Loose, about, path.clone(), why, fix);
        }
    }
    if disk::exists(&store.paths().pending_file(id))? {
        let what = format!(
            "a change of {name} was interrupted; the next command on it completes it or rolls it back"
        );
        let fix = Some(Fix::Settle(name.clone()));
        report.add(
            Severity::Loose,
            CONTAINER,
            store.paths().pending_file(id),
            what,
            fix,
        );
    }
    Ok(())
}

/// Returns the number of an automatic snapshot name with this prefix.
fn number(name: &SnapshotName, prefix: &str) -> Option<u64> {
    let digits = name.as_str().strip_prefix(prefix)?;
    digits
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| digits.parse().ok())?
}

/// Describes the counters that would assign a number a second time.
fn counter_problems(manifest: &ContainerManifest) -> Vec<String> {
    let next = minimal_counters(manifest);
    let mut problems = Vec::new();
    for (prefix, counter, minimum) in [
        ("snap", manifest.next_snap, next.0),
        ("auto", manifest.next_auto, next.1),
    ] {
        if counter < minimum {
            problems.push(format!(
                "the next number of {} would be {prefix}{counter}, which is already assigned",
                manifest.name
            ));
        }
    }
    problems
}

/// Returns the minimal values of the counters for `snap` and `auto`.
pub(super) fn minimal_counters(manifest: &ContainerManifest) -> (u64, u64) {
    let minimum = |prefix: &str, counter: u64| {
        let snapshots = manifest.snapshots.iter();
        let numbers = snapshots.filter_map(|snapshot| number(&snapshot.name, prefix));
        numbers
            .map(|number| number.saturating_add(1))
            .fold(counter, u64::max)
    };
    (
        minimum("snap", manifest.next_snap),
        minimum("auto", manifest.next_auto),
    )
}

fn parent_problems(manifest: &ContainerManifest) -> Vec<String> {
    let known: HashSet<_> = manifest.snapshots.iter().map(|s| s.id).collect();
    let mut problems = Vec::new();
    for snapshot in &manifest.snapshots {
        if snapshot
            .parent
            .is_some_and(|parent| !known.contains(&parent))
        {
            problems.push(format!(
                "the parent snapshot of {}@{} does not exist",
                manifest.name, snapshot.name
            ));
        }
    }
    if manifest
        .parent
        .is_some_and(|parent| !known.contains(&parent))
    {
        problems.push(format!(
            "the parent snapshot of {} does not exist",
            manifest.name
        ));
    }
    problems
}

/// Verifies the files of the snapshots, and returns the readable ones.
fn check_snapshots(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
    report: &mut CheckReport,
) -> Result<BTreeMap<crate::store::manifest::SnapshotId, SnapshotManifest>> {
    let mut found = BTreeMap::new();
    for snapshot in &manifest.snapshots {
        let path = store.paths().snapshot_file(id, snapshot.id);
        let address = format!("{}@{}", manifest.name, snapshot.name);
        match store.snapshot(id, snapshot.id) {
            Ok(body) => {
                if body.stack.first() != Some(&snapshot.layer) {
                    let what = format!(
                        "the manifest and the snapshot file of {address} reference different states"
                    );
                    // An interrupted flatten. The next command on the container completes it.
                    let (level, fix) = match manifest.merged {
                        Some(_) => (Severity::Loose, Some(Fix::Settle(manifest.name.clone()))),
                        None => (Severity::Damaged, None),
                    };
                    report.add(level, SNAPSHOT, path, what, fix);
                }
                found.insert(snapshot.id, body);
            }
            Err(error) => {
                let fix = rebuild_stack(store, snapshot)?
                    .map(|stack| Fix::Snapshot(id, snapshot.id, stack));
                let what = format!("{address}: {error}");
                report.add(Severity::Damaged, SNAPSHOT, path, what, fix);
            }
        }
    }
    Ok(found)
}

/// Returns the stack of a snapshot whose file is unreadable: its top layer, and the layers on which it was created.
///
/// Returns `None` if one of them does not exist any more, for example because it was flattened.
fn rebuild_stack(
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
