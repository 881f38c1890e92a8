//! The end of an active snapshot: by its commit or its removal.

use std::collections::BTreeMap;

use cowl_layers::points::point;
use jiff::Timestamp;

use super::record;
use super::unmounted::EndedMounts;
use crate::container::{Container, Swap, destroy, durability};
use crate::error::{Error, Result};
use crate::recover;
use crate::snapshot::remove::Protected;
use crate::store::containerd::{ContainerdKind, ContainerdRecord};
use crate::store::creation::Creation;
use crate::store::manifest::{ContainerId, ContainerManifest};
use crate::store::name::ContainerName;
use crate::store::{Store, deleted, disk, mount_points, orphans, synced};

/// The properties of a snapshot after its commit.
#[derive(Debug)]
pub struct CommitRequest {
    /// The new name of the container. It must be unused.
    pub name: ContainerName,
    /// The new key.
    pub key: String,
    /// The labels, which replace those of the active snapshot.
    pub labels: BTreeMap<String, String>,
}

/// Commits an active snapshot: unmounts it and freezes its layers. Returns its new record.
///
/// All layers that were written since the parent belong to the committed snapshot. Snapshots that commands took of the
/// container remain until [`drop_snapshots`], in case the commit has to be undone.
///
/// The content is synced by `sync` before the commit takes effect. Fails with `Busy` while the snapshot is in use.
pub fn commit(
    store: &Store,
    id: ContainerId,
    request: CommitRequest,
    sync: impl FnOnce() -> Result<()>,
) -> Result<ContainerdRecord> {
    let mut container = recover::open_to_unmount_for_containerd(store, id)?;
    let old = record(&container)?.clone();
    if old.kind != ContainerdKind::Active {
        return Err(Error::failed(format!("{} is not active", container.name())));
    }
    refuse_protected(&container)?;
    let epoch = durability::epoch(store)?;
    point("commit opened");
    let ended = EndedMounts::end(&container)?;
    point("commit unmounted");
    let synced = sync_layers(&container, sync);
    let ended = ended.or_restore(&container, synced)?;
    point("commit synced");
    let mut manifest = container.manifest().clone();
    // The sync has made these states durable, too.
    let markers = manifest.snapshots.iter_mut().map(|one| &mut one.settling);
    for marker in markers.chain([&mut manifest.settling]) {
        marker.take_if(|marker| marker.is_pending(&epoch));
    }
    let now = Timestamp::now().to_string();
    let next = ContainerdRecord {
        key: request.key,
        kind: ContainerdKind::Committed,
        committed_from: Some(old.key),
        labels_before: Some(old.labels),
        snapshots_before: manifest.snapshots.len() as u64,
        labels: request.labels,
        created: now.clone(),
        updated: now,
        frozen: true,
        ..old
    };
    let manifest = ContainerManifest {
        name: request.name,
        containerd: Some(Box::new(next.clone())),
        ..manifest
    };
    let committed = container.commit(manifest, None, |_| {
        point("commit written");
        Ok(Swap::Done)
    });
    let pending = store.paths().pending_file(id);
    match committed {
        // It is committed, or a recovery may commit it.
        Err(error)
            if container.manifest().written_head().is_none()
                || disk::exists(&pending).unwrap_or(true) =>
        {
            return Err(error);
        }
        done => ended.or_restore(&container, done)?,
    };
    point("commit in effect");
    if let Err(error) = mount_points::remove(store.paths(), id) {
        log::warn!("{error}");
    }
    point("commit done");
    Ok(next)
}

/// Repeats a commit that is in effect: gives the committed snapshot the properties of the later request. Returns its new
/// record.
///
/// containerd requests a commit within a transaction. If it does not receive the reply, it does not know the result, and
/// a later request may have another key.
pub fn commit_again(
    store: &Store,
    id: ContainerId,
    request: CommitRequest,
) -> Result<ContainerdRecord> {
    let mut container = recover::open_for_containerd(store, id)?;
    let old = record(&container)?.clone();
    if old.kind != ContainerdKind::Committed {
        let name = container.name();
        return Err(Error::failed(format!("{name} is not committed")));
    }
    let next = ContainerdRecord {
        key: request.key,
        labels: request.labels,
        ..old
    };
    let manifest = ContainerManifest {
        name: request.name,
        containerd: Some(Box::new(next.clone())),
        ..container.manifest().clone()
    };
    // Also if nothing differs: the first commit may have failed to sync the directory.
    container.commit(manifest, None, |_| Ok(Swap::Done))?;
    Ok(next)
}

/// Removes the snapshots that commands had taken of a committed snapshot before its commit, which will not be undone.
/// Returns its new record.
pub fn drop_snapshots(store: &Store, id: ContainerId) -> Result<ContainerdRecord> {
    let mut container = recover::open_for_containerd(store, id)?;
    let next = ContainerdRecord {
        snapshots_before: 0,
        ..record(&container)?.clone()
    };
    if next.kind != ContainerdKind::Committed {
        let name = container.name();
        return Err(Error::failed(format!("{name} is not committed")));
    }
    let mut creation = Creation::begin(store)?;
    // It removes the files as well.
    creation.request_sweep();
    let manifest = ContainerManifest {
        parent: None,
        undo: None,
        snapshots: Vec::new(),
        containerd: Some(Box::new(next.clone())),
        ..container.manifest().clone()
    };
    container.commit(manifest, Some(creation), |_| Ok(Swap::Done))?;
    Ok(next)
}

/// Makes the layers of an unmounted container durable, and records that.
fn sync_layers(container: &Container<'_>, sync: impl FnOnce() -> Result<()>) -> Result<()> {
    let store = container.store();
    // Before the sync: what a hidden mount writes afterwards would not be durable.
    container.refuse_writers()?;
    sync()?;
    // The layers are not collected meanwhile.
    let _reading = store.lock_shared()?;
    for layer in synced::unsynced(store, &container.manifest().stack)? {
        synced::record_synced(store, layer)?;
    }
    Ok(())
}

/// Removes a snapshot. Its layers remain until [`crate::store::collect::collect`] finds that nothing uses them.
///
/// Fails with `Busy` while the snapshot is in use, and if a command has taken protected snapshots of it, unless
/// `protected` permits their removal.
pub fn remove(store: &Store, id: ContainerId, protected: Protected) -> Result<()> {
    let container = recover::open_to_unmount_for_containerd(store, id)?;
    record(&container)?;
    if protected == Protected::Refuse {
        refuse_protected(&container)?;
    }
    let ended = EndedMounts::end(&container)?;
    point("removal unmounted");
    let removed = container
        .refuse_writers()
        .and_then(|()| deleted::discard(store, id));
    match store.container(id) {
        Ok(Some(_)) => drop(ended.or_restore(&container, removed)?),
        Ok(None) | Err(_) => removed?,
    }
    point("removal in effect");
    orphans::remove_for(store, id);
    container.into_lock().remove()
}

/// Returns an error of the kind `Busy` if a command has taken protected snapshots of the container. containerd then
/// continues with other snapshots and retries later.
fn refuse_protected(container: &Container<'_>) -> Result<()> {
    destroy::refuse_protected(container).map_err(|error| {
        let name = container.name();
        Error::busy(error.what).hint(format!(
            "remove the protection (cowl protect {name}@SNAP --off), or clone the snapshot first: cowl clone \
             {name}@SNAP NEW"
        ))
    })
}
