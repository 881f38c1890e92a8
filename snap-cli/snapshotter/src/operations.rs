//! The requests that use the store.

use std::collections::BTreeMap;

use cowl::container::launch::reap_daemons;
use cowl::lifecycle::containerd::{
    self as snapshots, CommitRequest, LoadedSnapshot, PrepareRequest, SnapshotBind,
};
use cowl::snapshot::remove::Protected;
use cowl::store::containerd::{ContainerdKind, ContainerdRecord};
use cowl::store::manifest::{ContainerId, Measured};
use cowl_layers::shown::Show as _;

use crate::error::{RequestError, Result};
use crate::index::{CommitBegun, Index, Obstacle, RemovalBegun, Reservation, SplitBegun};
use crate::manager::{Change, Found, Manager, Operation};

/// The maximum length of a key in bytes.
const MAX_KEY: usize = 4096;

/// The maximum length of the key and the value of a label in bytes, which containerd has as well.
const MAX_LABEL: usize = 4096;

/// The maximum length of all labels of a snapshot in bytes. A list of 100 snapshots fits into a message.
const MAX_LABELS: usize = 64 << 10;

/// The labels of a snapshot.
pub(crate) type Labels = BTreeMap<String, String>;

/// Creates an active snapshot or a view. Returns the mount that shows it.
#[derive(Debug)]
pub(crate) struct Prepare {
    pub key: String,
    pub kind: ContainerdKind,
    pub parent: Option<String>,
    pub labels: Labels,
}

impl Operation for Prepare {
    type Begun = Reservation;
    type Done = SnapshotBind;

    fn begin(&self, manager: &Manager, index: &mut Index) -> Result<Reservation, Obstacle> {
        check_key(&self.key)?;
        check_labels(&self.labels)?;
        manager.refuse_unknown_keys()?;
        index.reserve(&self.key, self.kind, self.parent.as_deref())
    }

    fn perform(self, manager: &Manager, begun: Reservation) -> Result<SnapshotBind> {
        let store = manager.store();
        let change = Change::new(manager, [&*self.key]);
        let Reservation { name, parent } = begun;
        let request = PrepareRequest {
            name: name.clone(),
            key: self.key.clone(),
            kind: self.kind,
            parent: parent.zip(self.parent),
            labels: self.labels,
        };
        let (id, record) = match snapshots::prepare(store, request) {
            Ok(prepared) => prepared,
            Err(error) => {
                settle_failed_creation(manager, change, &self.key);
                return Err(error.into());
            }
        };
        match snapshots::mounts(store, id) {
            Ok(bind) => {
                change.settle(LoadedSnapshot { id, name, record });
                Ok(bind)
            }
            Err(error) => {
                // The caller considers the key unused.
                if let Err(error) = snapshots::remove(store, id, Protected::Refuse) {
                    log::error!("cannot remove the unusable snapshot {name}: {error}");
                    change.settle(LoadedSnapshot { id, name, record });
                }
                Err(error.into())
            }
        }
    }
}

/// Recreates the active snapshot of a commit that containerd may not have recorded.
#[derive(Debug)]
pub(crate) struct Split {
    pub key: String,
}

impl Operation for Split {
    type Begun = Option<SplitBegun>;
    type Done = ();

    fn begin(&self, manager: &Manager, index: &mut Index) -> Result<Self::Begun, Obstacle> {
        if index.is_uncommitted(&self.key) {
            manager.refuse_unknown_keys()?;
        }
        index.begin_split(&self.key)
    }

    fn perform(self, manager: &Manager, begun: Self::Begun) -> Result<()> {
        let Some(begun) = begun else {
            return Ok(());
        };
        let change = Change::new(manager, [&*begun.committed.record.key]);
        let done = split(manager, &begun);
        change.settle(begun.committed);
        done
    }
}

/// Creates the active snapshot of a split. The caller must settle the committed one.
fn split(manager: &Manager, begun: &SplitBegun) -> Result<()> {
    let SplitBegun {
        name,
        active,
        committed,
    } = begun;
    let change = Change::new(manager, [&**active]);
    match snapshots::uncommit(manager.store(), committed.id, name) {
        Ok((id, record)) => {
            log::info!(
                "{} exists again: containerd may not have recorded its commit as {}",
                active.shown(),
                committed.record.key.shown()
            );
            let name = name.clone();
            change.settle(LoadedSnapshot { id, name, record });
            Ok(())
        }
        Err(error) => {
            settle_failed_creation(manager, change, active);
            Err(error.into())
        }
    }
}

/// Ends the change of a key whose snapshot could not be created. If only a sync failed, the snapshot exists.
fn settle_failed_creation(manager: &Manager, change: Change<'_>, key: &str) {
    match manager.find_in_store(key) {
        Found::Yes(found) => change.settle(*found),
        Found::No => {}
        Found::Unknown => change.retain_keys(),
    }
}

/// Returns the mount that shows an active snapshot or a view.
#[derive(Debug)]
pub(crate) struct Mounts {
    pub key: String,
}

impl Operation for Mounts {
    type Begun = LoadedSnapshot;
    type Done = SnapshotBind;

    fn begin(&self, _: &Manager, index: &mut Index) -> Result<LoadedSnapshot, Obstacle> {
        let key = &self.key;
        if index.get(key)?.record.kind == ContainerdKind::Committed {
            let what = format!("the snapshot {} is neither active nor a view", key.shown());
            return Err(RequestError::Precondition(what).into());
        }
        index.begin_change(key)
    }

    fn perform(self, manager: &Manager, found: LoadedSnapshot) -> Result<SnapshotBind> {
        let change = Change::new(manager, [&*self.key]);
        let bind = snapshots::mounts(manager.store(), found.id);
        change.settle(found);
        Ok(bind?)
    }
}

/// Commits an active snapshot under a new key.
#[derive(Debug)]
pub(crate) struct Commit {
    pub key: String,
    pub new: String,
    pub labels: Labels,
}

impl Operation for Commit {
    type Begun = CommitBegun;
    type Done = ();

    fn begin(&self, manager: &Manager, index: &mut Index) -> Result<CommitBegun, Obstacle> {
        check_key(&self.new)?;
        check_labels(&self.labels)?;
        manager.refuse_unknown_keys()?;
        index.begin_commit(&self.key, &self.new)
    }

    fn perform(self, manager: &Manager, begun: CommitBegun) -> Result<()> {
        let store = manager.store();
        let CommitBegun {
            name,
            found,
            is_in_effect,
            replaced,
        } = begun;
        let change = Change::new(manager, [&*found.record.key]);
        let change = match replaced {
            None => change.with(&self.new),
            Some(replaced) => {
                log::info!(
                    "{} is replaced: containerd has not recorded its commit",
                    self.new.shown()
                );
                match remove(manager, &self.new, replaced) {
                    Ok(removed) => removed.vacate_for(change),
                    Err(error) => {
                        change.settle(found);
                        return Err(error);
                    }
                }
            }
        };
        let request = CommitRequest {
            name: name.clone(),
            key: self.new,
            labels: self.labels,
        };
        let id = found.id;
        let committed = if is_in_effect {
            log::info!(
                "repeating the commit of {}, which is in effect",
                self.key.shown()
            );
            snapshots::commit_again(store, id, request)
        } else {
            snapshots::commit(store, id, request, || manager.sync())
        };
        reap_daemons();
        let error = match committed {
            Ok(record) => {
                change.settle(LoadedSnapshot { id, name, record });
                return Ok(());
            }
            Err(error) => error,
        };
        // A commit that failed late may be in effect.
        match snapshots::reload(store, id) {
            Ok(Some(now)) => change.settle(now),
            Ok(None) => {}
            Err(unknown) => {
                log::error!("cannot read the snapshot {}: {unknown}", self.key.shown());
                change.retain_keys();
            }
        }
        Err(RequestError::in_use(error))
    }
}

/// Removes a snapshot without children. [`CleanUp`] frees its space.
#[derive(Debug)]
pub(crate) struct Remove {
    pub key: String,
}

impl Operation for Remove {
    type Begun = RemovalBegun;
    type Done = ();

    fn begin(&self, manager: &Manager, index: &mut Index) -> Result<RemovalBegun, Obstacle> {
        let permitted = match index.is_unanswered(&self.key) {
            // Its removal would create a key.
            true => manager.refuse_unknown_keys().map_err(Obstacle::from),
            false => Ok(()),
        };
        let begun = permitted.and_then(|()| index.begin_removal(&self.key));
        begun.map_err(|why| match why {
            Obstacle::Refused(RequestError::NotFound(other)) if other != self.key => {
                let (key, other) = (self.key.shown(), other.shown());
                let what = format!("the snapshot {key} needs {other}, which does not exist");
                RequestError::Precondition(what).into()
            }
            Obstacle::Refused(error) => error.removal_not_begun().into(),
            wait @ Obstacle::Wait(_) => wait,
        })
    }

    fn still_running(&self, key: &str) -> RequestError {
        RequestError::still_running(key).removal_not_begun()
    }

    fn perform(self, manager: &Manager, begun: RemovalBegun) -> Result<()> {
        remove(manager, &self.key, begun).map(drop)
    }
}

/// Performs a removal. If it fails, the snapshot is settled. Otherwise returns the change, whose end releases the key.
fn remove<'m>(manager: &'m Manager, key: &str, begun: RemovalBegun) -> Result<Change<'m>> {
    let store = manager.store();
    let (found, split_first) = match begun {
        RemovalBegun::Committed => return Ok(Change::new(manager, [])),
        RemovalBegun::Snapshot(found) => (found, None),
        RemovalBegun::Split(begun) => (begun.committed.clone(), Some(begun)),
    };
    let change = Change::new(manager, [key]);
    if let Some(begun) = split_first
        && let Err(error) = split(manager, &begun)
    {
        log::warn!("the snapshot {} remains: {error}", key.shown());
        change.settle(found);
        return Err(RequestError::Precondition(error.to_string()));
    }
    let done = snapshots::remove(store, found.id, Protected::Refuse);
    reap_daemons();
    match (done, snapshots::reload(store, found.id)) {
        (Ok(()), _) => Ok(change),
        (Err(error), Ok(None)) => {
            log::warn!(
                "{error}; the snapshot {} is removed nevertheless",
                key.shown()
            );
            Ok(change)
        }
        (Err(error), Ok(Some(_)) | Err(_)) => {
            log::warn!("the snapshot {} remains: {error}", key.shown());
            change.settle(found);
            Err(RequestError::not_removed(&error))
        }
    }
}

/// Replaces the labels of a snapshot by the result of `edit`.
#[derive(Debug)]
pub(crate) struct Update<E> {
    pub key: String,
    pub edit: E,
}

impl<E: FnOnce(Labels) -> Labels + Send + 'static> Operation for Update<E> {
    type Begun = LoadedSnapshot;
    type Done = ContainerdRecord;

    fn begin(&self, _: &Manager, index: &mut Index) -> Result<LoadedSnapshot, Obstacle> {
        index.get_known(&self.key)?;
        index.begin_change(&self.key)
    }

    fn perform(self, manager: &Manager, mut found: LoadedSnapshot) -> Result<ContainerdRecord> {
        let change = Change::new(manager, [&*self.key]);
        let labels = (self.edit)(found.record.labels.clone());
        let done = check_labels(&labels)
            .and_then(|()| Ok(snapshots::update(manager.store(), found.id, labels)?));
        if let Ok(record) = &done {
            found.record = record.clone();
        }
        change.settle(found);
        done
    }
}

/// Measures the disk space that a snapshot uses in addition to its parent.
#[derive(Debug)]
pub(crate) struct Usage {
    pub key: String,
}

impl Operation for Usage {
    type Begun = (ContainerId, Option<ContainerId>);
    type Done = Measured;

    fn begin(&self, _: &Manager, index: &mut Index) -> Result<Self::Begun, Obstacle> {
        let found = index.get(&self.key)?;
        let parent = found.record.parent.as_deref();
        let parent = parent.map(|parent| index.get(parent).map(|found| found.id));
        Ok((found.id, parent.transpose()?))
    }

    fn perform(self, manager: &Manager, (id, parent): Self::Begun) -> Result<Measured> {
        Ok(snapshots::usage(manager.store(), id, parent)?)
    }
}

/// Frees the space of removed snapshots, and of what committed ones retained in case containerd did not know them.
#[derive(Debug)]
pub(crate) struct CleanUp;

impl Operation for CleanUp {
    type Begun = Vec<LoadedSnapshot>;
    type Done = ();

    fn begin(&self, _: &Manager, index: &mut Index) -> Result<Self::Begun, Obstacle> {
        Ok(index.begin_cleanup())
    }

    fn perform(self, manager: &Manager, begun: Self::Begun) -> Result<()> {
        reap_daemons();
        let change = |found: LoadedSnapshot| (Change::new(manager, [&*found.record.key]), found);
        let changes: Vec<_> = begun.into_iter().map(change).collect();
        for (change, mut found) in changes {
            match snapshots::drop_snapshots(manager.store(), found.id) {
                Ok(record) => found.record = record,
                Err(error) => log::warn!("{error}; the next collection repeats it"),
            }
            change.settle(found);
        }
        cowl::store::collect::collect_waiting(manager.store())?;
        Ok(())
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
