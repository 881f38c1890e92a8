//! Taking snapshots that LXC's own tools made into the store: each becomes a snapshot of cowl's, with its
//! name where that is free, its time and its remark. The files are copied, since they may lie on another
//! file system; LXC's folder goes when all of it is in the store and named.

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
use crate::store::disk::remove_tree;
use crate::store::making::Making;
use crate::store::manifest::{
    ContainerManifest, LayerId, LayerKind, SnapshotId, SnapshotKind, SnapshotManifest, SnapshotRef,
};
use crate::store::name::SnapshotName;
use crate::store::record::Record;
use crate::store::{Store, disk};
use crate::tree::error::OnProgress;
use crate::tree::measure;
use cowl_layers::shown::Show as _;

/// Where a snapshot's `extra` says which folder of LXC's it was.
const FROM: &str = "lxc_tree";

/// A snapshot that came in.
#[derive(Clone, Debug)]
pub struct Brought {
    /// Its name now.
    pub name: SnapshotName,
    /// What could not be taken over as it was.
    pub notes: Vec<String>,
}

/// By what a folder of LXC's is known again.
fn mark(tree: &LxcSnapshot) -> Result<Value> {
    let meta = std::fs::metadata(&tree.dir).map_err(|e| Error::at("look at", &tree.dir, e))?;
    let name = tree.name.as_encoded_bytes().escape_ascii().to_string();
    Ok(json!({ "name": name, "inode": meta.ino(), "taken": tree.taken }))
}

/// The snapshot that this folder of LXC's became already: whoever took it in was cut off before the folder
/// was gone.
pub fn became<'m>(
    manifest: &'m ContainerManifest,
    tree: &LxcSnapshot,
) -> Result<Option<&'m SnapshotRef>> {
    let mark = mark(tree)?;
    let mut all = manifest.snapshots.iter();
    Ok(all.find(|snapshot| snapshot.extra.get(FROM) == Some(&mark)))
}

/// Removes the folders that are in the store already.
pub fn finish(container: &Container<'_>, place: &LockedSnapshots) -> Result<()> {
    for tree in place.trees()? {
        if became(container.manifest(), &tree)?.is_some() {
            place.remove(&[tree])?;
        }
    }
    Ok(())
}

/// Takes one in.
pub fn bring(
    container: &mut Container<'_>,
    place: &LockedSnapshots,
    tree: &LxcSnapshot,
    progress: OnProgress<'_>,
) -> Result<Brought> {
    refuse_unfinished(tree)?;
    let shown = tree.name.as_encoded_bytes().escape_ascii().to_string();
    refuse_base(&tree.dir, &shown)?;
    let store = container.store();
    let mut making = Making::begin(store)?;
    let base = making.layer(LayerKind::Base, &[], &[])?;
    let notes = fill(store, base, &tree.rootfs()?, progress)?;
    // It must not be named before its data is there.
    making.sync_content()?;
    if let Err(error) = crate::store::measure::measured(store, base) {
        log::debug!("cannot measure a layer: {error}");
    }
    let mut next = container.manifest().clone();
    let name = free_name(&mut next, tree);
    let id = SnapshotId::fresh();
    let home = place.container().dir().join("rootfs");
    let body = SnapshotManifest {
        stack: vec![base],
        settings: next.settings.clone(),
        config: Some(Blob(layout::with_folder(&tree.config()?, &home))),
        extra: Map::new(),
    };
    let path = store.paths().snapshot_file(container.id(), id);
    disk::write_new(&path, &Record::first(body))?;
    making.will_sync(path);
    making.will_sync(store.paths().snapshots_dir(container.id()));
    insert(&mut next, new_ref(id, &name, base, tree)?);
    let done = container.commit(next, Some(making), |_| Ok(Swap::Done));
    super::take::drop_if_unnamed(container, id)?;
    done?;
    place.remove(std::slice::from_ref(tree))?;
    Ok(Brought { name, notes })
}

fn fill(
    store: &Store,
    base: LayerId,
    from: &Rootfs,
    progress: OnProgress<'_>,
) -> Result<Vec<String>> {
    let tree = store.paths().layer_tree(base);
    let Rootfs::Folder(path) = from else {
        // What an overlay shows is made a plain folder first, in which nothing is a mark.
        let plain = store.paths().layer_work(base);
        let mut notes = copy(from, &plain, progress)?;
        notes.extend(fill(store, base, &Rootfs::Folder(plain.clone()), progress)?);
        remove_tree(&plain)?;
        std::fs::create_dir(&plain).map_err(|e| Error::at("make the folder", &plain, e))?;
        return Ok(notes);
    };
    let before = measure(path)?.looks;
    let imported = import::from_path(path, &tree, store.space(), progress)?;
    if measure(path)?.looks != before {
        return Err(Error::failed(format!(
            "{} changed while it was copied; nothing was changed",
            path.shown()
        ))
        .hint("try again when nobody writes to it"));
    }
    let notes = imported.notes.iter();
    Ok(notes
        .map(|(path, why)| format!("{}: {why}", path.escape_ascii()))
        .collect())
}

/// Its own name where that is free, else the next number.
fn free_name(next: &mut ContainerManifest, tree: &LxcSnapshot) -> SnapshotName {
    if let Some(number) = layout::number(&tree.name) {
        next.next_snap = next.next_snap.max(number.saturating_add(1));
    }
    match SnapshotName::parse(&tree.name) {
        Ok(own) if next.snapshot(&own).is_none() => own,
        Ok(_) | Err(_) => {
            let name = SnapshotName::counted(next.next_snap);
            next.next_snap = next.next_snap.saturating_add(1);
            name
        }
    }
}

fn new_ref(
    id: SnapshotId,
    name: &SnapshotName,
    layer: LayerId,
    tree: &LxcSnapshot,
) -> Result<SnapshotRef> {
    let zone = TimeZone::system();
    let taken = tree
        .taken
        .as_deref()
        .and_then(|shown| layout::moment(shown, &zone));
    let comment = tree.comment()?;
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
        extra: Map::from_iter([(FROM.to_owned(), mark(tree)?)]),
    })
}

/// Puts it among the others by its time: the list is in the order in which they were taken.
fn insert(next: &mut ContainerManifest, new: SnapshotRef) {
    let time = |text: &str| text.parse::<jiff::Timestamp>().ok();
    let at = next
        .snapshots
        .iter()
        .position(|known| time(&known.created) > time(&new.created));
    next.snapshots
        .insert(at.unwrap_or(next.snapshots.len()), new);
}
