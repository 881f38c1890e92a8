//! Repairs of a store. An unreadable file is moved to `damaged` in the store, never removed.

use std::ffi::OsString;
use std::path::Path;

use serde_json::Map;

use super::manifests::minimal_counters;
use super::report::{CheckReport, Fix};
use crate::container::{Swap, durability};
use crate::error::{Error, Result};
use crate::recover;
use crate::store::collect;
use crate::store::creation::Creation;
use crate::store::leftovers::{self, Retention};
use crate::store::manifest::{ContainerId, LayerManifest, SnapshotManifest};
use crate::store::name::ContainerName;
use crate::store::record::Record;
use crate::store::{Store, disk, image_layers};
use cowl_layers::shown::Show as _;

/// Performs the possible repairs of all findings, and records them in the findings.
///
/// A failed repair is logged, and does not prevent the others.
pub fn repair(store: &Store, report: &mut CheckReport) {
    // Garbage collection is last, because rebuilt files reference objects that must not be collected.
    let is_collection = |fix: &Option<Fix>| *fix == Some(Fix::Collect);
    for collecting in [false, true] {
        for finding in &mut report.findings {
            if is_collection(&finding.fix) != collecting {
                continue;
            }
            let Some(fix) = &finding.fix else {
                continue;
            };
            match apply(store, fix) {
                Ok(done) => finding.done = done,
                Err(error) => log::warn!("cannot repair {}: {error}", finding.path.shown()),
            }
        }
    }
}

fn apply(store: &Store, fix: &Fix) -> Result<Option<String>> {
    match fix {
        Fix::Snapshot(container, snapshot, stack) => {
            let path = store.paths().snapshot_file(*container, *snapshot);
            let name = name_of(store, *container)?;
            let _alone = recover::open(store, &name)?;
            let saved = set_aside(store, &path)?;
            let body = SnapshotManifest {
                stack: stack.clone(),
                settings: Map::new(),
                config: None,
                received_config: None,
                extra: Map::new(),
            };
            disk::replace(&path, &Record::first(body))?;
            Ok(Some(format!("rebuilt from its top layer{saved}")))
        }
        Fix::Layer(id, kind, below) => {
            let _reading = store.lock_shared()?;
            let path = store.paths().layer_file(*id);
            let saved = set_aside(store, &path)?;
            let body = LayerManifest {
                unsynced: true,
                ..LayerManifest::new(*kind, below, &[])
            };
            disk::replace(&path, &Record::first(body))?;
            Ok(Some(format!(
                "rebuilt from a stack that contains it{saved}"
            )))
        }
        Fix::Container(name) => correct_container(store, name),
        Fix::Settle(name) => {
            drop(recover::open(store, name)?);
            Ok(Some(
                "the interrupted operation was completed or rolled back".to_owned(),
            ))
        }
        Fix::Work(id) => {
            let _reading = store.lock_shared()?;
            disk::ensure_dir(&store.paths().layer_work(*id))?;
            Ok(Some("created, empty".to_owned()))
        }
        Fix::Blob(id) => {
            let _reading = store.lock_shared()?;
            image_layers::forget_blob(store, *id)?;
            Ok(Some(
                "removed; an export compresses the layer again".to_owned(),
            ))
        }
        Fix::Accept(name, snapshot) => {
            durability::accept(&mut recover::open(store, name)?, *snapshot)?;
            Ok(Some("accepted as it is".to_owned()))
        }
        Fix::Collect => {
            let alone = store.lock_exclusive()?;
            let left = leftovers::find(store, Retention::RESPECTED)?;
            collect::remove_leftovers(store, alone, &left)?;
            Ok(Some("removed".to_owned()))
        }
    }
}

fn name_of(store: &Store, id: ContainerId) -> Result<ContainerName> {
    match store.container(id)? {
        Some(record) => Ok(record.body.name),
        None => Err(Error::not_found(format!(
            "the container {id} was removed meanwhile"
        ))),
    }
}

/// Raises the counters above all assigned numbers, and clears references to missing parents.
fn correct_container(store: &Store, name: &ContainerName) -> Result<Option<String>> {
    let mut container = recover::open(store, name)?;
    let mut next = container.manifest().clone();
    (next.next_snap, next.next_auto) = minimal_counters(&next);
    let known: Vec<_> = next.snapshots.iter().map(|snapshot| snapshot.id).collect();
    next.parent = next.parent.filter(|parent| known.contains(parent));
    for snapshot in &mut next.snapshots {
        snapshot.parent = snapshot.parent.filter(|parent| known.contains(parent));
    }
    if next != *container.manifest() {
        let creation = Creation::begin(store)?;
        container.commit(next, Some(creation), |_| Ok(Swap::Done))?;
    }
    Ok(Some("corrected".to_owned()))
}

/// Moves an unreadable file to `damaged`. Returns a description of its new path, or an empty string if there is no file.
fn set_aside(store: &Store, path: &Path) -> Result<String> {
    if !disk::exists(path)? {
        return Ok(String::new());
    }
    let dir = store.paths().damaged();
    disk::ensure_private_dir(&dir)?;
    // The parent's name identifies the layer or container; the number makes the name unique.
    let components = path.iter().rev().take(2).collect::<Vec<_>>();
    let mut suffix = OsString::new();
    for component in components.into_iter().rev() {
        suffix.push("-");
        suffix.push(component);
    }
    let mut to = dir.join("x");
    for number in 0_u32.. {
        let mut name = OsString::from(number.to_string());
        name.push(&suffix);
        to = dir.join(name);
        if !disk::exists(&to)? {
            break;
        }
    }
    disk::rename(path, &to)?;
    Ok(format!("; the unreadable file was moved to {}", to.shown()))
}
