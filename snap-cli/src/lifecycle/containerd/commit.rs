//! The end of an active snapshot: by its commit or its removal.

use std::collections::BTreeMap;
use std::path::Path;

use cowl_layers::shown::Show as _;
use cowl_layers::sys::mount::unmount_lazily;
use jiff::Timestamp;
use rustix::io::Errno;

use super::record;
use crate::container::detach::{self, Ending};
use crate::container::mount::AfterUnmount;
use crate::container::state::Mounted;
use crate::container::{Container, Swap, browse, destroy, durability};
use crate::error::{Error, Kind, Result};
use crate::host::mountinfo::{self, Mount};
use crate::host::users::Device;
use crate::recover;
use crate::store::containerd::{ContainerdKind, ContainerdRecord};
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
/// container are removed; their layers remain.
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
    end_mounts(&container)?;
    // Before the sync: what a hidden mount writes afterwards would not be durable.
    container.refuse_writers()?;
    sync()?;
    {
        // The layers are not collected meanwhile.
        let _reading = store.lock_shared()?;
        for layer in synced::unsynced(store, &container.manifest().stack)? {
            synced::record_synced(store, layer)?;
        }
    }
    let now = Timestamp::now().to_string();
    let next = ContainerdRecord {
        key: request.key,
        kind: ContainerdKind::Committed,
        labels: request.labels,
        created: now.clone(),
        updated: now,
        frozen: true,
        ..old
    };
    let epoch = durability::epoch(store)?;
    let manifest = container.manifest().clone();
    let snapshots: Vec<_> = manifest
        .snapshots
        .iter()
        .map(|snapshot| snapshot.id)
        .collect();
    let manifest = ContainerManifest {
        name: request.name,
        parent: None,
        undo: None,
        snapshots: Vec::new(),
        // The sync has made the state below durable, too.
        settling: manifest
            .settling
            .filter(|marker| !marker.is_pending(&epoch)),
        containerd: Some(Box::new(next.clone())),
        ..manifest
    };
    container.commit(manifest, None, |_| Ok(Swap::Done))?;
    // The commit is in effect. A garbage collection removes what remains.
    for snapshot in snapshots {
        let path = store.paths().snapshot_file(id, snapshot);
        warn_on_error(disk::remove_if_exists(&path));
    }
    warn_on_error(mount_points::remove(store.paths(), id));
    Ok(next)
}

/// Removes a snapshot. Its layers remain until [`crate::store::collect::collect`] finds that nothing uses them.
///
/// Fails with `Busy` while the snapshot is in use, and if a command has taken protected snapshots of it.
pub fn remove(store: &Store, id: ContainerId) -> Result<()> {
    let container = recover::open_to_unmount_for_containerd(store, id)?;
    record(&container)?;
    refuse_protected(&container)?;
    end_mounts(&container)?;
    container.refuse_writers()?;
    deleted::discard(store, id)?;
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

/// Unmounts a container and the snapshots of it that commands have mounted.
///
/// containerd commits while its bind mounts still exist, and leaves them behind if it is killed. They are detached unless
/// a process uses the file system, in any mount namespace.
fn end_mounts(container: &Container<'_>) -> Result<()> {
    if let Mounted::Alive(state) = container.mounted()?
        && let Some(device) = state.device()?
        && detach::users(state.pid, Some(device))?.is_empty()
    {
        detach_binds(device, &state.mountpoint)?;
    }
    let ended = container
        .unmount(AfterUnmount::StayUnmounted)
        .and_then(|_| browse::close(container, Ending::Orderly, |_| true));
    match ended {
        // The hint of the error concerns commands.
        Err(error) if error.kind == Kind::Busy => {
            Err(error.hint("end its task, and unmount it where it is mounted"))
        }
        done => done.map(drop),
    }
}

/// Detaches the mounts of a file system except the one at `mount_point`. Those below other mounts remain.
fn detach_binds(device: Device, mount_point: &Path) -> Result<()> {
    let mounts = mountinfo::read()?;
    let is_bind = |mount: &&Mount| mount.device == device && mount.at != mount_point;
    // The last one first: a later mount may be in an earlier one.
    for bind in mounts.iter().rev().filter(is_bind) {
        let now = mountinfo::read()?;
        if mountinfo::topmost(&now, &bind.at).is_none_or(|top| top.id != bind.id) {
            continue;
        }
        log::info!("detaching {}, which nothing uses", bind.at.shown());
        match unmount_lazily(&bind.at).map_err(cowl_layers::Error::errno) {
            // containerd has unmounted it in the meantime.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(error) => {
                return Err(Error::at("unmount", &bind.at, std::io::Error::from(error)));
            }
        }
    }
    Ok(())
}

fn warn_on_error(done: Result<()>) {
    if let Err(error) = done {
        log::warn!("{error}");
    }
}
