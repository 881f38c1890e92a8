//! Taking a snapshot.

use std::collections::BTreeMap;

use serde_json::Map;

use super::freeze;
use crate::container::{Container, durability};
use crate::error::{Error, Result};
use crate::lxc::{binding, snapshots};
use crate::store::disk;
use crate::store::making::Making;
use crate::store::manifest::{
    ContainerManifest, LayerId, SnapshotId, SnapshotKind, SnapshotManifest, SnapshotRef,
};
use crate::store::name::SnapshotName;
use crate::store::record::Record;

/// What somebody says about a snapshot that is to be taken.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// Its name; `None`: the next number.
    pub name: Option<SnapshotName>,
    /// A remark.
    pub comment: String,
    /// What it is sorted by.
    pub tags: BTreeMap<String, String>,
    /// It is not to be removed before somebody says otherwise.
    pub protected: bool,
    /// A timer or a hook makes it, and pruning may take it away again.
    pub scheduled: bool,
}

/// Takes a snapshot of what the container is now, and answers with its name.
pub fn take(container: &mut Container<'_>, wish: &Wish) -> Result<SnapshotName> {
    let store = container.store();
    let mut next = container.manifest().clone();
    let name = match &wish.name {
        Some(name) => {
            check_free(container, name)?;
            name.clone()
        }
        None => {
            next.next_snap = next.next_snap.max(after_lxc(&next)?);
            let name = SnapshotName::counted(next.next_snap);
            next.next_snap = next.next_snap.saturating_add(1);
            name
        }
    };
    let mut making = Making::begin(store)?;
    let frozen = freeze::plan(container, &mut making)?;
    let kind = match wish.scheduled {
        true => SnapshotKind::Scheduled,
        false => SnapshotKind::Manual,
    };
    let new = SnapshotRef {
        comment: wish.comment.clone(),
        tags: wish.tags.clone(),
        protected: wish.protected,
        ..write_file(container, &mut making, &name, kind, &frozen.state)?
    };
    let id = new.id;
    next.head = frozen.head;
    next.stack = frozen.stack;
    next.parent = Some(id);
    next.snapshots.push(new);
    let done = freeze::commit(container, next, Some(making));
    drop_if_unnamed(container, id)?;
    done.map(|()| name)
}

/// The number after those of the snapshots that LXC's own tools made of the same container: each name is
/// to mean one.
fn after_lxc(manifest: &ContainerManifest) -> Result<u64> {
    let Some(lxc) = &manifest.lxc else {
        return Ok(0);
    };
    let container = binding::of(lxc);
    snapshots::next_number(&snapshots::folder(&container)?)
}

/// Whether people may give a snapshot of the container this name.
pub(super) fn check_free(container: &Container<'_>, name: &SnapshotName) -> Result<()> {
    if name.is_reserved() {
        return Err(
            Error::usage(format!("{name} is a name that the counter gives")).hint(
                "leave --name out to get the next number, or choose a name that is not \
                 snap<number> or auto<number>",
            ),
        );
    }
    if container.manifest().snapshot(name).is_some() {
        return Err(Error::failed(format!(
            "a snapshot named {name} exists already in {}",
            container.name()
        ))
        .hint("choose another name"));
    }
    Ok(())
}

/// Writes a snapshot's file, and gives what is to name it: it does not count before the container's
/// manifest does.
pub(super) fn write_file(
    container: &Container<'_>,
    making: &mut Making<'_>,
    name: &SnapshotName,
    kind: SnapshotKind,
    stack: &[LayerId],
) -> Result<SnapshotRef> {
    let (store, id) = (container.store(), SnapshotId::fresh());
    let manifest = container.manifest();
    let Some(layer) = stack.first() else {
        return Err(Error::damaged("a state without any layer"));
    };
    let body = SnapshotManifest {
        stack: stack.to_vec(),
        settings: manifest.settings.clone(),
        config: crate::container::lxc::read_config_copy(container),
        extra: Map::new(),
    };
    let path = store.paths().snapshot_file(container.id(), id);
    disk::write_new(&path, &Record::first(body))?;
    making.add_unsynced(path);
    making.add_unsynced(store.paths().snapshots_dir(container.id()));
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

/// Removes the file of a snapshot that was not taken after all.
pub(super) fn drop_if_unnamed(container: &Container<'_>, id: SnapshotId) -> Result<()> {
    let store = container.store();
    let named = container.manifest().snapshots.iter().any(|s| s.id == id);
    // What waits in `container.json.next` may still come into force.
    if named || disk::exists(&store.paths().pending_file(container.id()))? {
        return Ok(());
    }
    disk::remove_if_exists(&store.paths().snapshot_file(container.id(), id))
}
