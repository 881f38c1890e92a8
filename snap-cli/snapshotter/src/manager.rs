//! The index and the store, which the requests keep consistent.

use std::sync::{Mutex, MutexGuard, PoisonError};

use cowl::container::durability;
use cowl::lifecycle::containerd::{self as snapshots, LoadedSnapshot};
use cowl::store::containerd::ContainerdRecord;
use cowl::store::disk::Filesystem;
use cowl::store::lock::Lock;
use cowl::store::{Store, collect};
use cowl_layers::shown::Show as _;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::error::{RequestError, Result};
use crate::filter::Filters;
use crate::index::{Index, Obstacle, Part};

/// A request that uses the store, in two steps.
pub(crate) trait Operation: Send + 'static {
    /// The result of the first step.
    type Begun: Send + 'static;
    /// The result of the request.
    type Done: Send + 'static;

    /// Reserves the keys. Neither waits nor performs I/O; changes nothing if it fails.
    fn begin(&self, manager: &Manager, index: &mut Index) -> Result<Self::Begun, Obstacle>;

    /// Uses the store, and settles the keys.
    fn perform(self, manager: &Manager, begun: Self::Begun) -> Result<Self::Done>;

    /// Returns the error for a request that has waited too long for another one on a key.
    fn still_running(&self, key: &str) -> RequestError {
        RequestError::still_running(key)
    }
}

/// The snapshots of a store.
#[derive(Debug)]
pub(crate) struct Manager {
    store: Store,
    index: Mutex<Index>,
    /// Notified when a request has ended.
    ended: Notify,
    /// Opened before any write, so that each sync reports every writeback error since the last one.
    filesystem: Filesystem,
    /// Whether a sync has failed, so that the content of every active snapshot may be incomplete. Locked during a sync:
    /// the kernel reports an error to one caller only.
    failed: Mutex<bool>,
    /// Opened separately, so that its syncs hide no error from those of commits. Locked during a sync.
    early: Mutex<Filesystem>,
    /// Whether the store may contain snapshots whose manifests cannot be read. No keys are created then.
    incomplete: bool,
    /// Excludes another snapshotter on the same store.
    _alone: Lock,
}

impl Manager {
    /// Reads the snapshots of a store. `alone` is the lock that excludes other processes which manage them.
    pub(crate) fn open(store: Store, alone: Lock) -> cowl::Result<Self> {
        let filesystem = durability::open_filesystem(&store)?;
        let early = Mutex::new(durability::open_filesystem(&store)?);
        collect::collect_or_warn(&store);
        let loaded = snapshots::load(&store)?;
        // Other commands report containers that cannot be read.
        let names = store.names()?.into_iter().filter_map(|(_, name)| name.ok());
        let index = Index::new(loaded.snapshots, names);
        log::info!("{} snapshots in {}", index.len(), store.root().shown());
        Ok(Self {
            index: Mutex::new(index),
            ended: Notify::new(),
            filesystem,
            failed: Mutex::new(false),
            early,
            incomplete: loaded.incomplete,
            _alone: alone,
            store,
        })
    }

    /// Returns the store.
    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// Begins a request.
    pub(crate) fn begin<O: Operation>(&self, operation: &O) -> Result<O::Begun, Obstacle> {
        operation.begin(self, &mut self.index())
    }

    /// Returns the end of any request after this call.
    pub(crate) fn ended(&self) -> Notified<'_> {
        self.ended.notified()
    }

    /// Syncs the file system of the store. Fails if this or any earlier sync failed.
    pub(crate) fn sync(&self) -> cowl::Result<()> {
        sync_once(&self.failed, || self.filesystem.sync())
    }

    /// Returns whether a layer is being unpacked into a snapshot, which will be committed.
    pub(crate) fn is_unpacked(&self, key: &str) -> bool {
        let index = self.index();
        let found = index.get(key);
        !index.is_uncommitted(key) && found.is_ok_and(|found| found.record.is_unpacked())
    }

    /// Syncs the file system unless another early sync runs, so that less remains for the sync of a commit.
    pub(crate) fn sync_early(&self) {
        // The sync of the commit reports the error as well.
        if let Ok(filesystem) = self.early.try_lock()
            && let Err(error) = filesystem.sync()
        {
            log::warn!("{error}");
        }
    }

    /// Returns the properties of a snapshot.
    pub(crate) fn stat(&self, key: &str) -> Result<ContainerdRecord> {
        Ok(self.index().get_known(key)?.record.clone())
    }

    /// Returns up to `count` snapshots of a part after the key `after`, those that match, and the last key that was
    /// inspected.
    pub(crate) fn list(
        &self,
        filters: &Filters,
        part: Part,
        after: Option<&str>,
        count: usize,
    ) -> (Vec<ContainerdRecord>, Option<String>) {
        let index = self.index();
        let (mut found, mut last) = (Vec::new(), None);
        for snapshot in index.after(part, after, count) {
            last = Some(&snapshot.record.key);
            if filters.matches(&snapshot.record) {
                found.push(snapshot.record.clone());
            }
        }
        (found, last.cloned())
    }

    /// Searches the store for a snapshot that may not be in the index.
    pub(crate) fn find_in_store(&self, key: &str) -> Found {
        match snapshots::load(&self.store) {
            Ok(loaded) => {
                let mut all = loaded.snapshots.into_iter();
                match all.find(|found| found.record.key == key) {
                    Some(found) => Found::Yes(Box::new(found)),
                    None if loaded.incomplete => Found::Unknown,
                    None => Found::No,
                }
            }
            Err(error) => {
                log::error!("cannot search for the snapshot {}: {error}", key.shown());
                Found::Unknown
            }
        }
    }

    /// Fails if a new key could be that of a snapshot that cannot be read.
    pub(crate) fn refuse_unknown_keys(&self) -> Result<()> {
        match self.incomplete {
            false => Ok(()),
            true => Err(RequestError::Unavailable(
                "the manifest of a snapshot cannot be read, and a new key could be the same: see `cowl check` and the log \
                 of cowl-snapshotter, and restart it after a repair"
                    .to_owned(),
            )),
        }
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        // Each method of the index leaves it consistent.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the store contains a snapshot.
pub(crate) enum Found {
    Yes(Box<LoadedSnapshot>),
    No,
    /// The store, or a manifest that may be that of the snapshot, cannot be read.
    Unknown,
}

/// Syncs, and records in `failed` whether a sync has failed. The kernel reports an error once, but the lost data may belong
/// to any snapshot.
fn sync_once(failed: &Mutex<bool>, sync: impl FnOnce() -> cowl::Result<()>) -> cowl::Result<()> {
    let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
    if *failed {
        return Err(cowl::Error::failed(
            "the file system of the store has failed to write data, which may belong to this snapshot",
        )
        .hint("check the disk, and restart cowl-snapshotter"));
    }
    let synced = sync();
    *failed = synced.is_err();
    synced
}

/// A change of the index that a request has begun. Dropping it removes the keys, which must not exist in the store then.
///
/// After a panic, the state of the store is unknown. The keys then remain reserved until the program is restarted.
pub(crate) struct Change<'m> {
    manager: &'m Manager,
    keys: Vec<String>,
}

impl<'m> Change<'m> {
    pub(crate) fn new<'k>(manager: &'m Manager, keys: impl IntoIterator<Item = &'k str>) -> Self {
        Self {
            manager,
            keys: keys.into_iter().map(str::to_owned).collect(),
        }
    }

    /// Adds a reserved key.
    pub(crate) fn with(mut self, key: &str) -> Self {
        self.keys.push(key.to_owned());
        self
    }

    /// Leaves the keys reserved until the program is restarted, because the state of the store is unknown.
    ///
    /// Requests on them fail with UNAVAILABLE. So containerd neither considers the snapshot unknown nor creates it again.
    pub(crate) fn retain_keys(mut self) {
        log::error!(
            "the state of {} is unknown: restart cowl-snapshotter when the store can be read",
            self.keys
                .iter()
                .map(|key| key.shown().to_string())
                .collect::<Vec<_>>()
                .join(" and ")
        );
        let mut index = self.manager.index();
        for key in std::mem::take(&mut self.keys) {
            index.retain(&key);
        }
    }

    /// Records that the snapshots of the keys were removed; the keys remain reserved. Returns the change of these keys and
    /// of those of `other`.
    pub(crate) fn vacate_for(mut self, mut other: Self) -> Self {
        let mut index = self.manager.index();
        let keys = std::mem::take(&mut self.keys);
        for key in &keys {
            index.vacate(key);
        }
        other.keys.extend(keys);
        drop(index);
        other
    }

    /// Ends the change: the snapshot exists, and the other keys do not.
    pub(crate) fn settle(mut self, snapshot: LoadedSnapshot) {
        let mut index = self.manager.index();
        for key in std::mem::take(&mut self.keys) {
            if key != snapshot.record.key {
                index.remove(&key);
            }
        }
        index.settle(snapshot);
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        let mut index = self.manager.index();
        for key in &self.keys {
            match std::thread::panicking() {
                false => index.remove(key),
                true => index.retain(key),
            }
        }
        drop(index);
        self.manager.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn no_commit_succeeds_after_another_one_has_received_an_error_of_the_disk() {
        let failed = Mutex::new(false);
        sync_once(&failed, || Ok(())).unwrap();
        sync_once(&failed, || Err(cowl::Error::failed("EIO"))).unwrap_err();
        // The kernel reports the error only once.
        sync_once(&failed, || Ok(())).unwrap_err();
    }

    #[test]
    fn a_sync_waits_for_the_result_of_another_one() {
        let failed = Mutex::new(false);
        let (failed, (send, receive)) = (&failed, std::sync::mpsc::channel());
        std::thread::scope(|scope| {
            let first = scope.spawn(move || {
                sync_once(failed, || {
                    send.send(()).unwrap();
                    std::thread::sleep(Duration::from_millis(50));
                    Err(cowl::Error::failed("EIO"))
                })
            });
            receive.recv().unwrap();
            sync_once(failed, || Ok(())).unwrap_err();
            first.join().unwrap().unwrap_err();
        });
    }
}
