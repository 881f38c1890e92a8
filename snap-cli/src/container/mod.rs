//! One container: its lock, its manifest, its mount.
//!
//! A command that changes a container holds a [`Container`], which owns the lock and caches the manifest.
//!
//! Every change is committed by one rename: the next manifest is written to `container.json.next`, synced, and then
//! renamed over `container.json`. If the head of a mounted container changes, its daemon switches to the new head
//! after the write and before the rename (docs/decisions/0003). `crate::recover` opens containers after interrupted
//! operations.

pub mod browse;
pub mod daemon;
pub mod dead;
pub mod destroy;
pub mod detach;
pub mod durability;
pub mod external;
pub mod in_lxc;
pub(crate) mod kernel;
pub(crate) mod kernel_layers;
mod kernel_marks;
pub mod launch;
pub mod lxc;
pub mod mount;
mod mount_point;
pub(crate) mod moves;
pub(crate) mod pause;
pub mod query;
pub mod served;
pub mod state;
pub mod upgrade;

use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::store::bytes::Blob;
use crate::store::collect;
use crate::store::creation::Creation;
use crate::store::layers;
use crate::store::lock::Lock;
use crate::store::manifest::{ContainerId, ContainerManifest, SnapshotManifest, SnapshotRef};
use crate::store::name::{ContainerName, SnapshotName, nearest};
use crate::store::record::Record;
use crate::store::{Store, disk};
use crate::wait::wait_until;
use cowl_layers::shown::Show as _;
use state::Mounted;

/// The time within which an unmounted daemon must release its layers.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);

/// A locked container: no other command changes it while this value exists.
#[derive(Debug)]
pub struct Container<'s> {
    store: &'s Store,
    id: ContainerId,
    record: Record<ContainerManifest>,
    /// The LXC config that the next commit writes.
    config: Option<Blob>,
    lock: Lock,
}

impl<'s> Container<'s> {
    /// Locks the container `name` and reads its manifest.
    ///
    /// Neither completes nor rolls back an interrupted operation: commands open containers with
    /// `crate::recover::open`.
    pub(crate) fn lock(store: &'s Store, name: &ContainerName) -> Result<Self> {
        let id = store.find_id(name)?;
        let lock = store.lock_container(id)?;
        // Another command may have changed or destroyed it while this one waited.
        match store.container(id)? {
            Some(record) if record.body.name == *name => {
                Ok(Self::from_locked(store, id, record, lock))
            }
            Some(_) | None => {
                lock.remove()?;
                Err(Error::not_found(format!(
                    "another command has just destroyed or renamed the container {name}"
                )))
            }
        }
    }

    /// Locks the container `id` and reads its manifest, like [`Container::lock`].
    pub(crate) fn lock_id(store: &'s Store, id: ContainerId) -> Result<Self> {
        let lock = store.lock_container(id)?;
        match store.container(id)? {
            Some(record) => Ok(Self::from_locked(store, id, record, lock)),
            None => {
                lock.remove()?;
                Err(Error::not_found(format!(
                    "the container {id} does not exist any more"
                )))
            }
        }
    }

    /// Creates a handle from a lock that the caller acquired before it read the manifest.
    pub(crate) fn from_locked(
        store: &'s Store,
        id: ContainerId,
        record: Record<ContainerManifest>,
        lock: Lock,
    ) -> Self {
        Self {
            store,
            id,
            record,
            config: None,
            lock,
        }
    }

    /// Returns the lock and drops the rest of the handle.
    pub(crate) fn into_lock(self) -> Lock {
        self.lock
    }

    /// Returns the store.
    pub fn store(&self) -> &'s Store {
        self.store
    }

    /// Returns the id.
    pub fn id(&self) -> ContainerId {
        self.id
    }

    /// Returns the manifest.
    pub fn manifest(&self) -> &ContainerManifest {
        &self.record.body
    }

    /// Returns the name.
    pub fn name(&self) -> &ContainerName {
        &self.record.body.name
    }

    /// Returns whether the container is mounted. After recovery, this is never [`Mounted::Dead`].
    pub fn mounted(&self) -> Result<Mounted> {
        state::probe(self.store, self.id)
    }

    /// Makes the next commit also record `config` as the LXC config to be written.
    ///
    /// The manifest names this as a pending change outside the store; the caller completes it after the commit.
    pub(crate) fn write_config_with_next(&mut self, config: Blob) {
        self.config = Some(config);
    }

    /// Completes or rolls back a change that was interrupted before its commit.
    ///
    /// If a daemon is alive, the layer that it writes to is the head. Without a daemon, completing is always correct:
    /// a daemon that had switched may have written to the new head before it died, and one that had not switched wrote
    /// to the old head, which is intact below the new, empty one.
    pub(crate) fn resolve_pending(&mut self) -> Result<()> {
        let path = self.store.paths().pending_file(self.id);
        if !disk::exists(&path)? {
            return Ok(());
        }
        let next = match self.store.container_at(&path) {
            Ok(Some(next)) => next,
            // A partial write: the writer died before the file was complete, so nothing relies on it yet. If a daemon
            // writes to a layer other than the head, the file must have been complete once.
            Ok(None)
            | Err(Error {
                kind: Kind::Damaged,
                ..
            }) if self.writes_to_head()? => {
                disk::remove_if_exists(&path)?;
                collect::collect_or_warn(self.store);
                return Ok(());
            }
            Ok(None) => {
                return Err(Error::damaged(format!(
                    "{} is missing, and the daemon writes to a layer that only this file named",
                    path.shown()
                ))
                .hint("copy the files out of the mount before anything else"));
            }
            // The file may be intact, and the only one that names the layer that the daemon writes to.
            Err(error) => return Err(error),
        };
        let fits = next.generation == self.record.generation.saturating_add(1);
        let layers = next.body.stack.iter();
        let has_all_layers = layers
            .map(|id| disk::exists(&self.store.paths().layer_tree(*id)))
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .all(|exists| exists);
        let written = query::written_layer(self.store, self.id)?;
        let completes =
            fits && has_all_layers && written.is_none_or(|layer| layer == next.body.head);
        if completes {
            // The interrupted writer may not have synced. This is rare, so sync the whole file system.
            disk::sync_all(self.store.root())?;
            self.install_pending(next)?;
            moves::complete(self)?;
        } else {
            moves::abandon_or_warn(self, &next.body);
            disk::remove_if_exists(&path)?;
        }
        // Layers that only the other manifest named are unreferenced now.
        collect::collect_or_warn(self.store);
        Ok(())
    }

    /// Returns false if a living daemon writes to a layer other than the manifest's head.
    fn writes_to_head(&self) -> Result<bool> {
        let written = query::written_layer(self.store, self.id)?;
        Ok(written.is_none_or(|layer| layer == self.record.body.head))
    }

    /// Commits `body` as the new manifest. `creation` has created the layers and snapshots that it names.
    ///
    /// `between` runs after the new manifest is durable and before it takes effect. If `between` fails and its outcome
    /// is unknown, this method completes the change or rolls it back, as recovery by the next command would.
    pub fn commit(
        &mut self,
        mut body: ContainerManifest,
        creation: Option<Creation<'_>>,
        between: impl FnOnce(&Self) -> Result<Swap>,
    ) -> Result<()> {
        let head = self.record.body.written_head();
        if body.stack != self.record.body.stack || body.written_head() != head {
            kernel_layers::ensure_settled(self)?;
        }
        if body.written_head() != head {
            self.refuse_unseen_daemon()?;
        }
        let path = self.store.paths().pending_file(self.id);
        disk::remove_if_exists(&path)?;
        if let Some(config) = self.config.take() {
            body.moving = Some(external::begin_writing(self.store, self.id, config)?);
        }
        let next = self.record.next(body);
        let mut creation = creation;
        // Create everything first and then sync, references last: one journal commit covers all of it.
        let written = disk::write_new(&path, &next)
            .and_then(|()| creation.as_mut().map_or(Ok(()), Creation::sync))
            .and_then(|()| disk::sync_file(&path));
        if let Err(error) = written {
            disk::remove_if_exists(&path)?;
            return Err(error);
        }
        let before = self.record.generation;
        let done = match between(self) {
            Ok(Swap::Refused(error)) => {
                // The error can be that of the successor of a killed daemon, which finds what that one has left.
                moves::abandon_or_warn(self, &next.body);
                disk::remove_if_exists(&path)?;
                return Err(error);
            }
            Ok(Swap::Done) => self.install_pending(next),
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            // From here on, a manifest may name the new layers, or a daemon may write to them.
            if let Some(creation) = creation {
                creation.abandon();
            }
            if self.record.generation != before {
                return Err(error);
            }
            self.resolve_pending()?;
            if self.record.generation == before {
                return Err(error);
            }
            log::warn!("{error}; the change was completed nevertheless");
            return Ok(());
        }
        creation.map_or(Ok(()), Creation::finish)
    }

    /// Renames `container.json.next` over the manifest.
    ///
    /// If only the sync of the directory fails, the change is in effect nevertheless, and the layers that it names
    /// must be retained.
    fn install_pending(&mut self, next: Record<ContainerManifest>) -> Result<()> {
        let path = self.store.paths().container_file(self.id);
        disk::rename_unsynced(&self.store.paths().pending_file(self.id), &path)?;
        self.record = next;
        disk::sync_parent(&path).map_err(|error| {
            let name = self.name();
            error.hint(format!(
                "the change of {name} is in effect, but a power cut may revert it: check the disk"
            ))
        })
    }

    /// Fails with `Busy` if the head of an unmounted container cannot be frozen: a mount that is not visible here writes
    /// to it, or its mount by kernel overlayfs left work that cannot be completed.
    pub(crate) fn refuse_writers(&self) -> Result<()> {
        kernel_layers::ensure_settled(self)?;
        self.refuse_unseen_daemon()
    }

    /// Refuses to freeze a layer that an unknown daemon writes to.
    ///
    /// The run-time files of a daemon are invisible if another `/run` is mounted here or if they were removed.
    fn refuse_unseen_daemon(&self) -> Result<()> {
        let Some(head) = self.record.body.written_head() else {
            return Ok(());
        };
        if self.mounted()? != Mounted::No {
            return Ok(());
        }
        // A daemon that was just unmounted may not have released the layer yet.
        let deadline = Instant::now() + RELEASE_TIMEOUT;
        let released = || Ok::<_, Error>(!layers::is_written(self.store, head)?);
        if wait_until(deadline, daemon::PAUSE, released)? {
            return Ok(());
        }
        let name = self.name();
        Err(Error::busy(format!(
            "{name} is in use by a mount whose run-time files are not visible here (layer {head})"
        ))
        .hint(format!(
            "unmount it where it was mounted (umount PATH), then type: {}",
            self.store.session().command
        )))
    }

    /// Syncs the directory entry of `container.json.next`.
    pub fn sync_pending(&self) -> Result<()> {
        disk::sync_dir(&self.store.paths().container_dir(self.id))
    }

    /// Returns the snapshot `name` and its manifest.
    pub fn snapshot(&self, name: &SnapshotName) -> Result<(SnapshotRef, SnapshotManifest)> {
        find_snapshot(self.store, self.id, &self.record.body, name)
    }
}

/// The outcome of the step between writing a new manifest and renaming it into place.
#[derive(Debug)]
pub enum Swap {
    /// The step succeeded, or there was nothing to do.
    Done,
    /// The step failed and certainly changed nothing.
    Refused(Error),
}

/// Returns the snapshot `name` of a container and its manifest.
pub fn find_snapshot(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
    name: &SnapshotName,
) -> Result<(SnapshotRef, SnapshotManifest)> {
    let found = find_snapshot_ref(manifest, name)?;
    Ok((found.clone(), store.snapshot(id, found.id)?))
}

/// Returns the entry of the snapshot `name` in a container's manifest.
pub fn find_snapshot_ref<'m>(
    manifest: &'m ContainerManifest,
    name: &SnapshotName,
) -> Result<&'m SnapshotRef> {
    let container = &manifest.name;
    manifest.snapshot(name).ok_or_else(|| {
        let known = manifest.snapshots.iter().map(|s| s.name.as_str());
        let hint = match nearest(name.as_str(), known) {
            Some(near) => format!("did you mean {near}?"),
            None => format!("`cowl list {container}` shows its snapshots"),
        };
        let what = format!("{container} has no snapshot named {name}");
        Error::not_found(what).hint(hint)
    })
}
