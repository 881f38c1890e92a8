//! Putting in order what can be. What can't be read is moved to `damaged` in the store, never removed.

use std::ffi::OsString;
use std::path::Path;

use serde_json::Map;

use super::manifests::counters;
use super::report::{Fix, Report};
use crate::container::{Swap, durability};
use crate::error::{Error, Result};
use crate::recover;
use crate::store::collect;
use crate::store::leftovers::{self, Expiry};
use crate::store::making::Making;
use crate::store::manifest::{ContainerId, LayerManifest, SnapshotManifest};
use crate::store::name::ContainerName;
use crate::store::record::Record;
use crate::store::{Store, disk};
use cowl_layers::shown::Show as _;

/// Does what can be done about what was found, and notes with each finding what that was. What could not
/// be put in order is told, and keeps nothing else from it.
pub fn repair(store: &Store, report: &mut Report) {
    // Collection comes last: what was rebuilt names what must not be collected.
    let collects = |fix: &Option<Fix>| *fix == Some(Fix::Collect);
    for last in [false, true] {
        for finding in &mut report.findings {
            if collects(&finding.fix) != last {
                continue;
            }
            let Some(fix) = &finding.fix else {
                continue;
            };
            match apply(store, fix) {
                Ok(done) => finding.done = done,
                Err(error) => log::warn!("cannot put in order {}: {error}", finding.path.shown()),
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
            let kept = set_aside(store, &path)?;
            let body = SnapshotManifest {
                stack: stack.clone(),
                settings: Map::new(),
                config: None,
                extra: Map::new(),
            };
            disk::replace(&path, &Record::first(body))?;
            Ok(Some(format!("made anew from its top layer{kept}")))
        }
        Fix::Layer(id, kind, below) => {
            let _reading = store.lock_shared()?;
            let path = store.paths().layer_file(*id);
            let kept = set_aside(store, &path)?;
            let body = LayerManifest {
                unsynced: true,
                ..LayerManifest::new(*kind, below, &[])
            };
            disk::replace(&path, &Record::first(body))?;
            Ok(Some(format!("made anew from a stack that names it{kept}")))
        }
        Fix::Container(name) => set_right(store, name),
        Fix::Settle(name) => {
            drop(recover::open(store, name)?);
            Ok(Some("put in order, as the next command would".to_owned()))
        }
        Fix::Work(id) => {
            let _reading = store.lock_shared()?;
            disk::ensure_dir(&store.paths().layer_work(*id))?;
            Ok(Some("made anew, empty".to_owned()))
        }
        Fix::Accept(name, snapshot) => {
            durability::accept(&mut recover::open(store, name)?, *snapshot)?;
            Ok(Some("accepted as it is".to_owned()))
        }
        Fix::Collect => {
            let alone = store.lock_exclusive()?;
            let left = leftovers::find(store, Expiry::Respected)?;
            collect::remove_leftovers(store, alone, &left)?;
            Ok(Some("removed".to_owned()))
        }
    }
}

fn name_of(store: &Store, id: ContainerId) -> Result<ContainerName> {
    match store.container(id)? {
        Some(record) => Ok(record.body.name),
        None => Err(Error::not_found(format!("the container {id} is gone"))),
    }
}

/// Counters past all numbers that were given, and no parent that is not there.
fn set_right(store: &Store, name: &ContainerName) -> Result<Option<String>> {
    let mut container = recover::open(store, name)?;
    let mut next = container.manifest().clone();
    (next.next_snap, next.next_auto) = counters(&next);
    let known: Vec<_> = next.snapshots.iter().map(|snapshot| snapshot.id).collect();
    next.parent = next.parent.filter(|parent| known.contains(parent));
    for snapshot in &mut next.snapshots {
        snapshot.parent = snapshot.parent.filter(|parent| known.contains(parent));
    }
    if next != *container.manifest() {
        let making = Making::begin(store)?;
        container.commit(next, Some(making), |_| Ok(Swap::Done))?;
    }
    Ok(Some("set right".to_owned()))
}

/// Moves a file that can't be read out of the way; says where it went.
fn set_aside(store: &Store, path: &Path) -> Result<String> {
    if !disk::exists(path)? {
        return Ok(String::new());
    }
    let folder = store.paths().damaged();
    disk::ensure_private_dir(&folder)?;
    // The folder's name tells which layer or container it was; the number keeps several apart.
    let parts = path.iter().rev().take(2).collect::<Vec<_>>();
    let mut name = OsString::new();
    for part in parts.into_iter().rev() {
        name.push("-");
        name.push(part);
    }
    let mut to = folder.join("x");
    for number in 0_u32.. {
        let mut own = OsString::from(number.to_string());
        own.push(&name);
        to = folder.join(own);
        if !disk::exists(&to)? {
            break;
        }
    }
    disk::rename(path, &to)?;
    Ok(format!("; what was there is now {}", to.shown()))
}
