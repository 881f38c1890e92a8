//! Taking a snapshot.

use serde_json::Map;

use crate::container::Container;
use crate::error::{Error, Result};
use crate::store::disk;
use crate::store::layers::Making;
use crate::store::manifest::{LayerId, SnapshotId, SnapshotKind, SnapshotManifest, SnapshotRef};
use crate::store::name::SnapshotName;
use crate::store::record::Record;

/// What somebody says about a snapshot that is to be taken.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// Its name; `None`: the next number.
    pub name: Option<SnapshotName>,
    /// A remark.
    pub comment: String,
    /// Have everything that was written put on the disk first, so that a power cut right afterwards
    /// leaves the snapshot whole.
    pub sync: bool,
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
            let name = SnapshotName::counted(next.next_snap);
            next.next_snap = next.next_snap.saturating_add(1);
            name
        }
    };
    if wish.sync {
        disk::sync_all(store.root())?;
    }
    let mut making = Making::begin(store)?;
    let frozen = container.plan_freeze(&mut making)?;
    let id = write_file(
        container,
        &mut making,
        &name,
        SnapshotKind::Manual,
        &frozen.state,
        &wish.comment,
    )?;
    next.head = frozen.head;
    next.stack = frozen.stack;
    next.parent = Some(id);
    next.snapshots.push(SnapshotRef {
        id,
        name: name.clone(),
        extra: Map::new(),
    });
    let done = container.commit_freeze(next, Some(making));
    drop_if_unnamed(container, id)?;
    done.map(|()| name)
}

fn check_free(container: &Container<'_>, name: &SnapshotName) -> Result<()> {
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

/// Writes a snapshot's file. It does not count before the container's manifest names it.
pub(super) fn write_file(
    container: &Container<'_>,
    making: &mut Making<'_>,
    name: &SnapshotName,
    kind: SnapshotKind,
    stack: &[LayerId],
    comment: &str,
) -> Result<SnapshotId> {
    let (store, id) = (container.store(), SnapshotId::fresh());
    let body = SnapshotManifest {
        name: name.clone(),
        kind,
        stack: stack.to_vec(),
        parent: container.manifest().parent,
        created: crate::store::now(),
        comment: comment.to_owned(),
        settings: container.manifest().settings.clone(),
        extra: Map::new(),
    };
    let path = store.snapshot_file(container.id(), id);
    disk::write_new(&path, &Record::first(body))?;
    making.will_sync(path);
    making.will_sync(store.snapshots_dir(container.id()));
    Ok(id)
}

/// Removes the file of a snapshot that was not taken after all.
pub(super) fn drop_if_unnamed(container: &Container<'_>, id: SnapshotId) -> Result<()> {
    let store = container.store();
    let named = container.manifest().snapshots.iter().any(|s| s.id == id);
    // What waits in `container.json.next` may still come into force.
    if named || disk::is_there(&store.pending_file(container.id()))? {
        return Ok(());
    }
    disk::remove_if_there(&store.snapshot_file(container.id(), id))
}
