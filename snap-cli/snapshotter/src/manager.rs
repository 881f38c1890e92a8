//! Runs the requests: keeps the index consistent with the store, and serializes requests on the same snapshot.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cowl::container::durability;
use cowl::container::launch::reap_daemons;
use cowl::lifecycle::containerd::{
    self as snapshots, CommitRequest, LoadedSnapshot, PrepareRequest, SnapshotBind,
};
use cowl::store::containerd::{ContainerdKind, ContainerdRecord};
use cowl::store::disk::Filesystem;
use cowl::store::lock::Lock;
use cowl::store::manifest::Measured;
use cowl::store::{Store, collect};
use cowl_layers::shown::Show as _;

use crate::error::{RequestError, Result};
use crate::filter::Filters;
use crate::index::{Index, Obstacle, Reservation};

/// The time for which a request waits for another one on the same snapshot.
const PATIENCE: Duration = Duration::from_secs(60);

/// The maximum length of a key in bytes.
const MAX_KEY: usize = 4096;

/// The maximum length of the key and the value of a label in bytes, which containerd has as well.
const MAX_LABEL: usize = 4096;

/// The maximum length of all labels of a snapshot in bytes. A list of 100 snapshots fits into a message.
const MAX_LABELS: usize = 64 << 10;

/// The snapshots of a store, and the requests on them.
#[derive(Debug)]
pub(crate) struct Manager {
    store: Store,
    index: Mutex<Index>,
    /// Notified when a request has ended.
    ended: Condvar,
    /// Opened before any write, so that each sync reports every writeback error since the last one.
    filesystem: Filesystem,
    /// Whether a sync has failed, so that the content of every active snapshot may be incomplete. Locked during a sync:
    /// the kernel reports an error to one caller only.
    failed: Mutex<bool>,
    /// Whether the store may contain snapshots whose manifests cannot be read. No keys are created then.
    incomplete: bool,
    /// Excludes another snapshotter on the same store.
    _alone: Lock,
}

impl Manager {
    /// Reads the snapshots of a store. `alone` is the lock that excludes other processes which manage them.
    pub(crate) fn open(store: Store, alone: Lock) -> cowl::Result<Self> {
        let filesystem = durability::open_filesystem(&store)?;
        collect::collect_or_warn(&store);
        let loaded = snapshots::load(&store)?;
        // Other commands report containers that cannot be read.
        let names = store.names()?.into_iter().filter_map(|(_, name)| name.ok());
        let index = Index::new(loaded.snapshots, names);
        log::info!("{} snapshots in {}", index.len(), store.root().shown());
        Ok(Self {
            index: Mutex::new(index),
            ended: Condvar::new(),
            filesystem,
            failed: Mutex::new(false),
            incomplete: loaded.incomplete,
            _alone: alone,
            store,
        })
    }

    /// Creates an active snapshot or a view. Returns the mount that shows it.
    pub(crate) fn prepare(
        &self,
        key: &str,
        kind: ContainerdKind,
        parent: Option<&str>,
        labels: BTreeMap<String, String>,
    ) -> Result<SnapshotBind> {
        check_key(key)?;
        check_labels(&labels)?;
        self.refuse_unknown_keys()?;
        let reservation = self.begin(|index| index.reserve(key, kind, parent))?;
        let change = Change::new(self, [key]);
        let Reservation {
            name,
            parent: below,
        } = reservation;
        let request = PrepareRequest {
            name: name.clone(),
            key: key.to_owned(),
            kind,
            parent: below.zip(parent.map(str::to_owned)),
            labels,
        };
        let (id, record) = match snapshots::prepare(&self.store, request) {
            Ok(prepared) => prepared,
            Err(error) => {
                // If only a sync failed, the snapshot exists.
                match self.find_in_store(key) {
                    Found::Yes(found) => change.settle(*found),
                    Found::No => {}
                    Found::Unknown => change.retain_keys(),
                }
                return Err(error.into());
            }
        };
        match snapshots::mounts(&self.store, id) {
            Ok(bind) => {
                change.settle(LoadedSnapshot { id, name, record });
                Ok(bind)
            }
            Err(error) => {
                // The caller considers the key unused.
                if let Err(error) = snapshots::remove(&self.store, id) {
                    log::error!("cannot remove the unusable snapshot {name}: {error}");
                    change.settle(LoadedSnapshot { id, name, record });
                }
                Err(error.into())
            }
        }
    }

    /// Returns the mount that shows an active snapshot or a view.
    pub(crate) fn mounts(&self, key: &str) -> Result<SnapshotBind> {
        let found = self.begin(|index| {
            if index.get(key)?.record.kind == ContainerdKind::Committed {
                let what = format!("the snapshot {} is neither active nor a view", key.shown());
                return Err(RequestError::Precondition(what).into());
            }
            index.begin_change(key)
        })?;
        let change = Change::new(self, [key]);
        let id = found.id;
        let bind = snapshots::mounts(&self.store, id);
        change.settle(found);
        Ok(bind?)
    }

    /// Commits an active snapshot under a new key.
    pub(crate) fn commit(
        &self,
        key: &str,
        new: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<()> {
        check_key(new)?;
        check_labels(&labels)?;
        self.refuse_unknown_keys()?;
        let (name, found) = self.begin(|index| index.begin_commit(key, new))?;
        let change = Change::new(self, [key, new]);
        let request = CommitRequest {
            name: name.clone(),
            key: new.to_owned(),
            labels,
        };
        let id = found.id;
        let committed = snapshots::commit(&self.store, id, request, || self.sync());
        reap_daemons();
        let error = match committed {
            Ok(record) => {
                change.settle(LoadedSnapshot { id, name, record });
                return Ok(());
            }
            Err(error) => error,
        };
        // A commit that failed late may be in effect.
        match snapshots::reload(&self.store, id) {
            Ok(Some(now)) => change.settle(now),
            Ok(None) => {}
            Err(unknown) => {
                log::error!("cannot read the snapshot {}: {unknown}", key.shown());
                change.retain_keys();
            }
        }
        Err(RequestError::in_use(error))
    }

    /// Syncs the file system of the store. Fails if this or any earlier sync failed.
    fn sync(&self) -> cowl::Result<()> {
        sync_once(&self.failed, || self.filesystem.sync())
    }

    /// Removes a snapshot without children. [`Manager::clean_up`] frees its space.
    pub(crate) fn remove(&self, key: &str) -> Result<()> {
        let found = self.begin(|index| index.begin_removal(key))?;
        let change = Change::new(self, [key]);
        let done = snapshots::remove(&self.store, found.id);
        reap_daemons();
        match (done, snapshots::reload(&self.store, found.id)) {
            (Ok(()), _) => Ok(()),
            (Err(error), Ok(None)) => {
                log::warn!(
                    "{error}; the snapshot {} is removed nevertheless",
                    key.shown()
                );
                Ok(())
            }
            (Err(error), Ok(Some(_)) | Err(_)) => {
                log::warn!("the snapshot {} remains: {error}", key.shown());
                change.settle(found);
                Err(RequestError::not_removed(&error))
            }
        }
    }

    /// Returns the properties of a snapshot.
    pub(crate) fn stat(&self, key: &str) -> Result<ContainerdRecord> {
        Ok(self.index().get(key)?.record.clone())
    }

    /// Replaces the labels of a snapshot by the result of `edit`.
    pub(crate) fn update(
        &self,
        key: &str,
        edit: impl FnOnce(BTreeMap<String, String>) -> BTreeMap<String, String>,
    ) -> Result<ContainerdRecord> {
        let mut found = self.begin(|index| index.begin_change(key))?;
        let change = Change::new(self, [key]);
        let labels = edit(found.record.labels.clone());
        let done = check_labels(&labels)
            .and_then(|()| Ok(snapshots::update(&self.store, found.id, labels)?));
        if let Ok(record) = &done {
            found.record = record.clone();
        }
        change.settle(found);
        done
    }

    /// Returns up to `count` snapshots after the key `after`, those that match, and the last key that was inspected.
    pub(crate) fn list(
        &self,
        filters: &Filters,
        after: Option<&str>,
        count: usize,
    ) -> (Vec<ContainerdRecord>, Option<String>) {
        let index = self.index();
        let (mut found, mut last) = (Vec::new(), None);
        for snapshot in index.after(after, count) {
            last = Some(&snapshot.record.key);
            if filters.matches(&snapshot.record) {
                found.push(snapshot.record.clone());
            }
        }
        (found, last.cloned())
    }

    /// Returns the disk space that a snapshot uses in addition to its parent.
    pub(crate) fn usage(&self, key: &str) -> Result<Measured> {
        let (id, parent) = {
            let index = self.index();
            let found = index.get(key)?;
            let parent = found.record.parent.as_deref();
            (
                found.id,
                parent.map(|parent| index.get(parent).map(|found| found.id)),
            )
        };
        Ok(snapshots::usage(&self.store, id, parent.transpose()?)?)
    }

    /// Frees the space of removed snapshots.
    pub(crate) fn clean_up(&self) -> Result<()> {
        reap_daemons();
        collect::collect_waiting(&self.store)?;
        Ok(())
    }

    /// Searches the store for a snapshot that may not be in the index.
    fn find_in_store(&self, key: &str) -> Found {
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
    fn refuse_unknown_keys(&self) -> Result<()> {
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

    /// Begins a request. Waits while another request on the same snapshot runs.
    fn begin<T>(&self, mut begin: impl FnMut(&mut Index) -> Result<T, Obstacle>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        let mut index = self.index();
        loop {
            let key = match begin(&mut index) {
                Ok(begun) => return Ok(begun),
                Err(Obstacle::Refused(error)) => return Err(error),
                Err(Obstacle::Wait(key)) => key,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(RequestError::Unavailable(format!(
                    "another request on the snapshot {} is still running",
                    key.shown()
                )));
            }
            let waited = self.ended.wait_timeout(index, left);
            index = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Whether the store contains a snapshot.
enum Found {
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
struct Change<'m> {
    manager: &'m Manager,
    keys: Vec<String>,
}

impl<'m> Change<'m> {
    fn new<'k>(manager: &'m Manager, keys: impl IntoIterator<Item = &'k str>) -> Self {
        Self {
            manager,
            keys: keys.into_iter().map(str::to_owned).collect(),
        }
    }

    /// Leaves the keys reserved until the program is restarted, because the state of the store is unknown.
    ///
    /// Requests on them fail with UNAVAILABLE. So containerd neither considers the snapshot unknown, and removes it, nor
    /// creates it again.
    fn retain_keys(mut self) {
        log::error!(
            "the state of {} is unknown: restart cowl-snapshotter when the store can be read",
            self.keys
                .iter()
                .map(|key| key.shown().to_string())
                .collect::<Vec<_>>()
                .join(" and ")
        );
        self.keys.clear();
    }

    /// Ends the change: the snapshot exists, and the other keys do not.
    fn settle(mut self, snapshot: LoadedSnapshot) {
        let mut index = self.manager.index();
        for key in std::mem::take(&mut self.keys) {
            index.remove(&key);
        }
        index.settle(snapshot);
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let mut index = self.manager.index();
            for key in &self.keys {
                index.remove(key);
            }
        }
        self.manager.ended.notify_all();
    }
}

fn check_key(key: &str) -> Result<()> {
    match key.len() {
        0 => Err(RequestError::Invalid("the key is empty".to_owned())),
        1..=MAX_KEY => Ok(()),
        length => Err(RequestError::Invalid(format!(
            "the key has {length} bytes, more than {MAX_KEY}"
        ))),
    }
}

fn check_labels(labels: &BTreeMap<String, String>) -> Result<()> {
    let mut total = 0;
    for (key, value) in labels {
        let length = key.len() + value.len();
        if length > MAX_LABEL {
            return Err(RequestError::Invalid(format!(
                "the label {} and its value have {length} bytes, more than {MAX_LABEL}",
                key.chars().take(64).collect::<String>().shown()
            )));
        }
        total += length;
    }
    match total > MAX_LABELS {
        true => Err(RequestError::Invalid(format!(
            "the labels have {total} bytes, more than {MAX_LABELS}"
        ))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
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
