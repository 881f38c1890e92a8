//! Imports the snapshots that LXC's own tools made: each becomes a snapshot in the store.
//!
//! An imported snapshot has the same name if that is free, and the original time and comment. The files are
//! copied, because they may be on another file system. LXC's directory is removed when all of its content is in
//! the store and referenced.

use std::os::unix::fs::MetadataExt as _;

use jiff::tz::TimeZone;
use serde_json::{Map, Value, json};

use crate::archive::import;
use crate::container::Container;
use crate::container::Swap;
use crate::error::{Error, Result};
use crate::lxc::copy::copy;
use crate::lxc::layout::{self, Rootfs};
use crate::lxc::locked::{LockedSnapshots, refuse_base, refuse_unfinished};
use crate::lxc::snapshots::LxcSnapshot;
use crate::store::bytes::Blob;
use crate::store::creation::Creation;
use crate::store::disk::remove_tree;
use crate::store::manifest::{
    ContainerManifest, LayerId, LayerKind, SnapshotId, SnapshotKind, SnapshotManifest, SnapshotRef,
};
use crate::store::name::SnapshotName;
use crate::store::record::Record;
use crate::store::{Store, disk};
use crate::tree::error::OnProgress;
use crate::tree::measure;
use crate::tree::omissions::Unsupported;
use cowl_layers::shown::Show as _;

/// The key in a snapshot's `extra` that identifies the LXC directory that it was imported from.
const SOURCE_KEY: &str = "lxc_tree";

/// An imported snapshot.
#[derive(Clone, Debug)]
pub struct ImportedSnapshot {
    /// The name in the store.
    pub name: SnapshotName,
    /// Properties that were not imported unchanged.
    pub notes: Vec<String>,
}

/// Returns a value that identifies a snapshot directory of LXC.
fn source_id(snapshot: &LxcSnapshot) -> Result<Value> {
    let meta =
        std::fs::metadata(&snapshot.dir).map_err(|e| Error::at("inspect", &snapshot.dir, e))?;
    let name = snapshot.name.as_encoded_bytes().escape_ascii().to_string();
    Ok(json!({ "name": name, "inode": meta.ino(), "taken": snapshot.taken }))
}

/// Returns the snapshot that an LXC snapshot was imported as, if it was.
///
/// Both exist if an import was interrupted before it removed LXC's directory.
pub fn find_imported<'m>(
    manifest: &'m ContainerManifest,
    snapshot: &LxcSnapshot,
) -> Result<Option<&'m SnapshotRef>> {
    let source_id = source_id(snapshot)?;
    let mut all = manifest.snapshots.iter();
    Ok(all.find(|imported| imported.extra.get(SOURCE_KEY) == Some(&source_id)))
}

/// Removes the LXC snapshots that are in the store already, to complete interrupted imports.
pub fn remove_imported(container: &Container<'_>, lxc_snapshots: &LockedSnapshots) -> Result<()> {
    for snapshot in lxc_snapshots.list()? {
        if find_imported(container.manifest(), &snapshot)?.is_some() {
            lxc_snapshots.remove(&[snapshot])?;
        }
    }
    Ok(())
}

/// Imports one LXC snapshot and removes its directory.
pub fn import_snapshot(
    container: &mut Container<'_>,
    lxc_snapshots: &LockedSnapshots,
    snapshot: &LxcSnapshot,
    progress: OnProgress<'_>,
) -> Result<ImportedSnapshot> {
    refuse_unfinished(snapshot)?;
    refuse_base(&snapshot.dir, &snapshot.name.shown().to_string())?;
    let store = container.store();
    let mut creation = Creation::begin(store)?;
    let base = creation.create_layer(LayerKind::Base, &[], &[])?;
    let notes = fill(store, base, &snapshot.rootfs()?, progress)?;
    // The data must be durable before a manifest references it.
    creation.sync_content()?;
    if let Err(error) = crate::store::measure::measured(store, base) {
        log::debug!("cannot measure a layer: {error}");
    }
    let mut next = container.manifest().clone();
    let name = free_name(&mut next, snapshot);
    let id = SnapshotId::fresh();
    let home = lxc_snapshots.container().dir().join("rootfs");
    let body = SnapshotManifest {
        stack: vec![base],
        settings: next.settings.clone(),
        config: Some(Blob(layout::with_rootfs_dir(&snapshot.config()?, &home))),
        received_config: None,
        extra: Map::new(),
    };
    let path = store.paths().snapshot_file(container.id(), id);
    disk::write_new(&path, &Record::first(body))?;
    creation.add_unsynced(path);
    creation.add_unsynced(store.paths().snapshots_dir(container.id()));
    insert(&mut next, new_ref(id, &name, base, snapshot)?);
    let done = container.commit(next, Some(creation), |_| Ok(Swap::Done));
    super::take::drop_if_unnamed(container, id)?;
    done?;
    lxc_snapshots.remove(std::slice::from_ref(snapshot))?;
    Ok(ImportedSnapshot { name, notes })
}

fn fill(
    store: &Store,
    base: LayerId,
    from: &Rootfs,
    progress: OnProgress<'_>,
) -> Result<Vec<String>> {
    let tree = store.paths().layer_tree(base);
    let Rootfs::Dir(path) = from else {
        // First copy the merged tree of the overlay to a plain directory, which has no markers.
        let plain = store.paths().layer_work(base);
        let mut notes = copy(from, &plain, progress)?;
        notes.extend(fill(store, base, &Rootfs::Dir(plain.clone()), progress)?);
        remove_tree(&plain)?;
        std::fs::create_dir(&plain).map_err(|e| Error::at("create the directory", &plain, e))?;
        return Ok(notes);
    };
    let before = measure(path)?.metadata_digest;
    let imported = import::from_path(path, &tree, store.space(), Unsupported::Refuse, progress)?;
    if measure(path)?.metadata_digest != before {
        return Err(Error::failed(format!(
            "cannot copy {}: it changed during the copy",
            path.shown()
        ))
        .hint("stop all processes that write to it, then retry"));
    }
    Ok(imported.notes.lines())
}

/// Returns the name of the LXC snapshot if that is free, or else the next number.
fn free_name(next: &mut ContainerManifest, snapshot: &LxcSnapshot) -> SnapshotName {
    if let Some(number) = layout::parse_number(&snapshot.name) {
        next.next_snap = next.next_snap.max(number.saturating_add(1));
    }
    match SnapshotName::parse(&snapshot.name) {
        Ok(own) if next.snapshot(&own).is_none() => own,
        Ok(_) | Err(_) => {
            let (name, after) = next.free_counted();
            next.next_snap = after;
            name
        }
    }
}

fn new_ref(
    id: SnapshotId,
    name: &SnapshotName,
    layer: LayerId,
    snapshot: &LxcSnapshot,
) -> Result<SnapshotRef> {
    let zone = TimeZone::system();
    let taken = snapshot
        .taken
        .as_deref()
        .and_then(|shown| layout::parse_time(shown, &zone));
    let comment = snapshot.comment()?;
    let comment = match std::str::from_utf8(&comment) {
        Ok(text) => text.trim_end().to_owned(),
        Err(_) => comment.trim_ascii_end().escape_ascii().to_string(),
    };
    Ok(SnapshotRef {
        id,
        name: name.clone(),
        kind: SnapshotKind::Manual,
        created: taken.map_or_else(crate::store::now, |taken| taken.to_string()),
        parent: None,
        layer,
        comment,
        tags: std::collections::BTreeMap::new(),
        protected: false,
        settling: None,
        extra: Map::from_iter([(SOURCE_KEY.to_owned(), source_id(snapshot)?)]),
    })
}

/// Inserts a snapshot by its time: the list is in the order of creation.
fn insert(next: &mut ContainerManifest, new: SnapshotRef) {
    let time = |text: &str| text.parse::<jiff::Timestamp>().ok();
    let at = next
        .snapshots
        .iter()
        .position(|other| time(&other.created) > time(&new.created));
    next.snapshots
        .insert(at.unwrap_or(next.snapshots.len()), new);
}
