//! Takes a snapshot.

use std::collections::BTreeMap;

use serde_json::Map;

use super::freeze;
use crate::container::{Container, durability};
use crate::error::{Error, Result};
use crate::lxc::{binding, snapshots};
use crate::store::creation::Creation;
use crate::store::disk;
use crate::store::manifest::{
    ContainerManifest, LayerId, SnapshotId, SnapshotKind, SnapshotManifest, SnapshotRef,
};
use crate::store::name::SnapshotName;
use crate::store::record::Record;

/// The properties of a snapshot that is to be taken.
#[derive(Clone, Debug, Default)]
pub struct SnapshotRequest {
    /// The name; `None` for the next number.
    pub name: Option<SnapshotName>,
    /// The comment.
    pub comment: String,
    /// The tags.
    pub tags: BTreeMap<String, String>,
    /// Whether the snapshot is protected from removal.
    pub protected: bool,
    /// Whether a timer or a hook takes the snapshot, so that pruning may remove it.
    pub scheduled: bool,
}

/// Takes a snapshot of the current state of the container, and returns its name.
pub fn take(container: &mut Container<'_>, request: &SnapshotRequest) -> Result<SnapshotName> {
    let store = container.store();
    let mut next = container.manifest().clone();
    let name = match &request.name {
        Some(name) => {
            check_free(container, name)?;
            name.clone()
        }
        None => {
            next.next_snap = next.next_snap.max(next_after_lxc(&next)?);
            let (name, after) = next.free_counted();
            next.next_snap = after;
            name
        }
    };
    let mut creation = Creation::begin(store)?;
    let frozen = freeze::plan(container, &mut creation)?;
    let kind = match request.scheduled {
        true => SnapshotKind::Scheduled,
        false => SnapshotKind::Manual,
    };
    let new = SnapshotRef {
        comment: request.comment.clone(),
        tags: request.tags.clone(),
        protected: request.protected,
        ..write_file(container, &mut creation, &name, kind, &frozen.state)?
    };
    let id = new.id;
    next.head = frozen.head;
    next.stack = frozen.stack;
    next.parent = Some(id);
    next.snapshots.push(new);
    let done = freeze::commit(container, next, Some(creation));
    drop_if_unnamed(container, id)?;
    done.map(|()| name)
}

/// Returns the number that follows those of LXC's own snapshots of the same container, so that a name is unique
/// among both.
fn next_after_lxc(manifest: &ContainerManifest) -> Result<u64> {
    let Some(lxc) = &manifest.lxc else {
        return Ok(0);
    };
    let container = binding::from_link(lxc);
    snapshots::next_number(&snapshots::snapshots_dir(&container)?)
}

/// Fails if a user cannot give a snapshot of the container this name.
pub(super) fn check_free(container: &Container<'_>, name: &SnapshotName) -> Result<()> {
    if name.is_reserved() {
        return Err(
            Error::usage(format!("{name} is reserved for automatic numbering")).hint(
                "omit --name to get the next number, or choose a name other than snap<number> \
                 and auto<number>",
            ),
        );
    }
    if container.manifest().snapshot(name).is_some() {
        return Err(Error::failed(format!(
            "snapshot {}@{name} already exists",
            container.name()
        ))
        .hint("choose another name"));
    }
    Ok(())
}

/// Writes a snapshot's file, and returns the entry for the container's manifest.
///
/// The snapshot exists only once the manifest lists it.
pub(super) fn write_file(
    container: &Container<'_>,
    creation: &mut Creation<'_>,
    name: &SnapshotName,
    kind: SnapshotKind,
    stack: &[LayerId],
) -> Result<SnapshotRef> {
    let (store, id) = (container.store(), SnapshotId::fresh());
    let manifest = container.manifest();
    let Some(layer) = stack.first() else {
        return Err(Error::damaged("a state has no layer"));
    };
    let body = SnapshotManifest {
        stack: stack.to_vec(),
        settings: manifest.settings.clone(),
        config: crate::container::lxc::read_config_copy(container),
        received_config: None,
        extra: Map::new(),
    };
    let path = store.paths().snapshot_file(container.id(), id);
    disk::write_new(&path, &Record::first(body))?;
    creation.add_unsynced(path);
    creation.add_unsynced(store.paths().snapshots_dir(container.id()));
    Ok(SnapshotRef {
        id,
        name: name.clone(),
        kind,
        created: crate::store::now(),
        parent: manifest.parent,
        layer: *layer,
        comment: String::new(),
        tags: BTreeMap::new(),
        protected: false,
        settling: durability::settling_for(container, stack)?,
        extra: Map::new(),
    })
}

/// Removes the file of a snapshot that the container's manifest does not list because the commit failed.
pub(super) fn drop_if_unnamed(container: &Container<'_>, id: SnapshotId) -> Result<()> {
    let store = container.store();
    let is_listed = container.manifest().snapshots.iter().any(|s| s.id == id);
    // A pending manifest, `container.json.next`, may still be committed.
    if is_listed || disk::exists(&store.paths().pending_file(container.id()))? {
        return Ok(());
    }
    disk::remove_if_exists(&store.paths().snapshot_file(container.id(), id))
}
