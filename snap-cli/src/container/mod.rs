//! One container: its lock, its manifest, its mount. A command that changes a container holds a [`Container`],
//! which is its lock and its manifest.
//!
//! Every change is one rename: the next manifest is written to `container.json.next`, whole and durable, and
//! then replaces `container.json`. If the head of a mounted container changes, its daemon switches between the
//! two (docs/decisions/0003). Opening a container after an interrupted operation is `crate::recover`'s.

pub mod browse;
pub mod daemon;
pub mod dead;
pub mod destroy;
pub mod detach;
pub mod durability;
pub mod external;
pub mod lxc;
pub mod mount;
pub mod query;
pub mod state;

use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::store::bytes::Blob;
use crate::store::collect;
use crate::store::layers;
use crate::store::lock::Lock;
use crate::store::making::Making;
use crate::store::manifest::{ContainerId, ContainerManifest, SnapshotManifest, SnapshotRef};
use crate::store::name::{ContainerName, SnapshotName, nearest};
use crate::store::record::Record;
use crate::store::{Store, disk};
use cowl_layers::shown::Show as _;
use state::Mounted;

/// How long a daemon that was unmounted may take to release its layers.
const UNSEEN: Duration = Duration::from_secs(1);

/// A locked container: no other command changes it while this lives.
#[derive(Debug)]
pub struct Container<'s> {
    store: &'s Store,
    id: ContainerId,
    record: Record<ContainerManifest>,
    /// LXC's config as it is to be once the next change is committed.
    config: Option<Blob>,
    lock: Lock,
}

impl<'s> Container<'s> {
    /// Locks the container `name` and reads its manifest. An interrupted operation on it is left as it is:
    /// commands open containers with `crate::recover::open`.
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
                    "the container {name} was destroyed a moment ago"
                )))
            }
        }
    }

    /// Makes a handle of a container whose lock the caller has taken before it read the manifest.
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

    /// Gives up the handle, and keeps the lock.
    pub(crate) fn into_lock(self) -> Lock {
        self.lock
    }

    /// Its store.
    pub fn store(&self) -> &'s Store {
        self.store
    }

    /// Its id.
    pub fn id(&self) -> ContainerId {
        self.id
    }

    /// What its manifest says.
    pub fn manifest(&self) -> &ContainerManifest {
        &self.record.body
    }

    /// Its name.
    pub fn name(&self) -> &ContainerName {
        &self.record.body.name
    }

    /// Returns whether it is mounted. After recovery never [`Mounted::Dead`].
    pub fn mounted(&self) -> Result<Mounted> {
        state::look(self.store, self.id)
    }

    /// Has the next commit write LXC's config as well: `config`, as the change outside the store that the manifest
    /// names.
    pub(crate) fn write_config_with_next(&mut self, config: Blob) {
        self.config = Some(config);
    }

    /// Completes or drops a change that was interrupted before its commit.
    ///
    /// With a daemon alive, the daemon decides: what it writes to is the head. Without one, going on is
    /// always right: a daemon that had been told may have written to the new head before it died, and
    /// one that had not been told wrote to the old head, which is whole below the new, empty one.
    pub(crate) fn resolve_pending(&mut self) -> Result<()> {
        let path = self.store.paths().pending_file(self.id);
        if !disk::is_there(&path)? {
            return Ok(());
        }
        let next = match self.store.container_at(&path) {
            Ok(Some(next)) => next,
            // Torn: its writer died before it was whole, so before anything relied on it. A daemon that
            // writes to another layer than the head says that it was whole once.
            Ok(None)
            | Err(Error {
                kind: Kind::Damaged,
                ..
            }) if self.writes_to_head()? => {
                disk::remove_if_there(&path)?;
                collect::collect_after(self.store);
                return Ok(());
            }
            Ok(None) => {
                return Err(Error::damaged(format!(
                    "the change under way in {} is lost, and the mount writes to its layer",
                    path.shown()
                ))
                .hint("save what is in the mount before anything else"));
            }
            // It may be whole, and the only one that names what a daemon writes to.
            Err(error) => return Err(error),
        };
        let fits = next.generation == self.record.generation.saturating_add(1);
        let layers = next.body.stack.iter();
        let whole = layers
            .map(|id| disk::is_there(&self.store.paths().layer_tree(*id)))
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .all(|there| there);
        let written = query::written_layer(self.store, self.id)?;
        let goes_on = fits && whole && written.is_none_or(|layer| layer == next.body.head);
        if goes_on {
            // Its writer may not have come to that. Rare enough for the plainest way.
            disk::sync_all(self.store.root())?;
            self.put_in_force(next)?;
        } else {
            disk::remove_if_there(&path)?;
        }
        // What the other of the two named is nobody's now.
        collect::collect_after(self.store);
        Ok(())
    }

    /// Whether a living daemon, if there is one, writes to the head that the manifest names.
    fn writes_to_head(&self) -> Result<bool> {
        let written = query::written_layer(self.store, self.id)?;
        Ok(written.is_none_or(|layer| layer == self.record.body.head))
    }

    /// Changes the manifest. `making` has made what the new one names.
    ///
    /// `between` runs when the change is on the disk and not yet in force. When it fails without knowing
    /// what became of it, this finds out as the next command would.
    pub fn commit(
        &mut self,
        mut body: ContainerManifest,
        making: Option<Making<'_>>,
        between: impl FnOnce(&Self) -> Result<Swap>,
    ) -> Result<()> {
        self.refuse_unseen_daemon(&body)?;
        let path = self.store.paths().pending_file(self.id);
        disk::remove_if_there(&path)?;
        if let Some(config) = self.config.take() {
            body.moving = Some(external::begin_writing(self.store, self.id, config)?);
        }
        let next = self.record.next(body);
        let mut making = making;
        // All is made first and then synced, what is named before what names it: one commit of the
        // journal takes it all.
        let written = disk::write_new(&path, &next)
            .and_then(|()| making.as_mut().map_or(Ok(()), Making::sync))
            .and_then(|()| disk::sync_file(&path));
        if let Err(error) = written {
            disk::remove_if_there(&path)?;
            return Err(error);
        }
        let before = self.record.generation;
        let done = match between(self) {
            Ok(Swap::Refused(error)) => {
                disk::remove_if_there(&path)?;
                return Err(error);
            }
            Ok(Swap::Done) => self.put_in_force(next),
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            // From here on what was made may be named by a manifest, or written to by a daemon.
            if let Some(making) = making {
                making.leave();
            }
            if self.record.generation != before {
                return Err(error);
            }
            self.resolve_pending()?;
            if self.record.generation == before {
                return Err(error);
            }
            log::warn!("{error}; the command was finished all the same");
            return Ok(());
        }
        making.map_or(Ok(()), Making::done)
    }

    /// Renames the change that waits in `container.json.next` over the manifest. Where only the sync of the
    /// directory fails, the change is in force all the same, and what it names must stay.
    fn put_in_force(&mut self, next: Record<ContainerManifest>) -> Result<()> {
        let path = self.store.paths().container_file(self.id);
        disk::rename_unsynced(&self.store.paths().pending_file(self.id), &path)?;
        self.record = next;
        disk::sync_parent(&path).map_err(|error| {
            let name = self.name();
            error.hint(format!(
                "the change of {name} is in force, but a power cut may take it back: inspect the disk"
            ))
        })
    }

    /// Refuses to freeze a layer that a daemon writes to whose run-time files are not visible here: another
    /// `/run` is mounted, or they were removed.
    fn refuse_unseen_daemon(&self, next: &ContainerManifest) -> Result<()> {
        let head = self.record.body.head;
        if next.head == head || self.mounted()? != Mounted::No {
            return Ok(());
        }
        // A daemon that was unmounted a moment ago may not have released it yet.
        let until = Instant::now() + UNSEEN;
        while layers::is_written(self.store, head)? {
            if Instant::now() >= until {
                let name = self.name();
                return Err(Error::busy(format!(
                    "a mount that is not known here writes to {name} (layer {head})"
                ))
                .hint(format!(
                    "unmount it where it was mounted (umount PATH), then type: {}",
                    self.store.session().who
                )));
            }
            std::thread::sleep(daemon::PAUSE);
        }
        Ok(())
    }

    /// Puts the change that waits in `container.json.next` on the disk with its name.
    pub fn sync_pending(&self) -> Result<()> {
        disk::sync_dir(&self.store.paths().container_dir(self.id))
    }

    /// The snapshot of this name, with its file.
    pub fn snapshot(&self, name: &SnapshotName) -> Result<(SnapshotRef, SnapshotManifest)> {
        find_snapshot(self.store, self.id, &self.record.body, name)
    }
}

/// What became of the step between writing a change and putting it in force.
#[derive(Debug)]
pub enum Swap {
    /// It is done, or there was nothing to do.
    Done,
    /// Nothing was changed, for sure.
    Refused(Error),
}

/// The snapshot of this name of a container.
pub fn find_snapshot(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
    name: &SnapshotName,
) -> Result<(SnapshotRef, SnapshotManifest)> {
    let found = find_snapshot_ref(manifest, name)?;
    Ok((found.clone(), store.snapshot(id, found.id)?))
}

/// The same without its file.
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
