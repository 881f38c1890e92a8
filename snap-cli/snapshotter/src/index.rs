//! The index of snapshots by key, in memory. No I/O.
//!
//! A key is reserved before the store is changed, and settled afterwards. So two requests never create the same key,
//! and a parent is never removed while a child is created.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;

use cowl::lifecycle::containerd::LoadedSnapshot;
use cowl::store::containerd::{ContainerdKind, ContainerdRecord, active_names, digest_name};
use cowl::store::manifest::ContainerId;
use cowl::store::name::ContainerName;
use cowl_layers::points::is_disabled;

use crate::error::{RequestError, Result};
use crate::unanswered::Commits;

/// The state of a key.
#[derive(Debug)]
enum Slot {
    /// A request is creating the snapshot, below it the parent.
    Reserved {
        parent: Option<String>,
        name: ContainerName,
    },
    /// The snapshot exists.
    Settled(LoadedSnapshot),
    /// A request is committing, changing or removing the snapshot.
    Changing(LoadedSnapshot),
    /// The result of a request is unknown, until the program is restarted.
    Unknown {
        parent: Option<String>,
        name: ContainerName,
        /// The last known state; `None` if the snapshot was being created.
        last: Option<Box<LoadedSnapshot>>,
    },
}

impl Slot {
    fn snapshot(&self) -> Option<&LoadedSnapshot> {
        match self {
            Self::Reserved { .. } | Self::Unknown { .. } => None,
            Self::Settled(snapshot) | Self::Changing(snapshot) => Some(snapshot),
        }
    }

    fn name(&self) -> &ContainerName {
        match self {
            Self::Reserved { name, .. } | Self::Unknown { name, .. } => name,
            Self::Settled(snapshot) | Self::Changing(snapshot) => &snapshot.name,
        }
    }

    /// Returns the key of the parent and the name of the container.
    fn into_claims(self) -> (Option<String>, ContainerName) {
        match self {
            Self::Reserved { parent, name } | Self::Unknown { parent, name, .. } => (parent, name),
            Self::Settled(found) | Self::Changing(found) => (found.record.parent, found.name),
        }
    }
}

/// The reason why a request cannot start.
#[derive(Debug)]
pub(crate) enum Obstacle {
    /// Another request on the same key has to finish first.
    Wait(String),
    /// The request fails.
    Refused(RequestError),
}

impl From<RequestError> for Obstacle {
    fn from(error: RequestError) -> Self {
        Self::Refused(error)
    }
}

/// A reserved key.
#[derive(Debug)]
pub(crate) struct Reservation {
    /// The name of the container to create.
    pub name: ContainerName,
    /// The container of the parent.
    pub parent: Option<ContainerId>,
}

/// A commit that has begun.
#[derive(Debug)]
pub(crate) struct CommitBegun {
    /// The name of the container after the commit.
    pub name: ContainerName,
    /// The snapshot.
    pub found: LoadedSnapshot,
    /// Whether an earlier request has committed the snapshot, and its client does not know that.
    pub is_in_effect: bool,
    /// The removal of the snapshot that has the new key, and that containerd does not know.
    pub replaced: Option<RemovalBegun>,
}

/// An unanswered commit whose two snapshots are about to exist.
#[derive(Debug)]
pub(crate) struct SplitBegun {
    /// The name of the container to create for the active snapshot.
    pub name: ContainerName,
    /// The key of the active snapshot.
    pub active: String,
    /// The committed snapshot.
    pub committed: LoadedSnapshot,
}

/// A removal that has begun.
#[derive(Debug)]
pub(crate) enum RemovalBegun {
    /// The key is that of an active snapshot that was committed: nothing has to be done.
    Committed,
    /// The snapshot has to be removed.
    Snapshot(LoadedSnapshot),
    /// It is a committed one, and containerd may know it by the key of the active snapshot.
    Split(SplitBegun),
}

/// A part of the snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// The active snapshots of unanswered commits.
    Uncommitted,
    /// All others.
    Existing,
}

/// The snapshots of a store.
#[derive(Debug, Default)]
pub(crate) struct Index {
    slots: BTreeMap<String, Slot>,
    commits: Commits,
    /// The number of children of each key that has any, those that are being created included.
    children: HashMap<String, usize>,
    /// The names of containers that cannot be assigned.
    names: HashSet<ContainerName>,
}

impl Index {
    /// Creates an index of snapshots. `names` are the names of all containers.
    pub(crate) fn new(
        snapshots: Vec<LoadedSnapshot>,
        names: impl IntoIterator<Item = ContainerName>,
    ) -> Self {
        let mut index = Self {
            names: names.into_iter().collect(),
            ..Self::default()
        };
        for snapshot in snapshots {
            let key = snapshot.record.key.clone();
            if let Some(Slot::Settled(known)) = index.slots.get(&key) {
                log::error!(
                    "two containers have the same key, {} and {}: only the first is used",
                    known.name,
                    snapshot.name
                );
                continue;
            }
            index.insert(snapshot);
        }
        index.find_unanswered();
        index
    }

    /// Finds the commits that containerd may not have recorded: no other snapshot has the key of the active one, and no
    /// snapshot was created on the committed one.
    fn find_unanswered(&mut self) {
        for snapshot in self.slots.values().filter_map(Slot::snapshot) {
            let ContainerdRecord {
                key,
                committed_from,
                ..
            } = &snapshot.record;
            let Some(active) = committed_from else {
                continue;
            };
            if !self.slots.contains_key(active) && !self.children.contains_key(key) {
                self.commits.load(snapshot);
            }
        }
    }

    /// Returns the number of snapshots.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Returns a snapshot, or its last known state.
    ///
    /// containerd inspects each snapshot that it knows to list them, and ends the list with any error except NOT_FOUND.
    pub(crate) fn get(&self, key: &str) -> Result<&LoadedSnapshot> {
        let unknown = match self.slots.get(key) {
            Some(Slot::Settled(found) | Slot::Changing(found)) => return Ok(found),
            Some(Slot::Unknown {
                last: Some(last), ..
            }) => return Ok(last),
            Some(Slot::Unknown { last: None, .. }) => RequestError::Unknown(key.to_owned()),
            Some(Slot::Reserved { .. }) | None => RequestError::NotFound(key.to_owned()),
        };
        self.commits.active(key).ok_or(unknown)
    }

    /// Returns a snapshot that containerd has named in a request: if it is a committed one, containerd has recorded the
    /// commit.
    pub(crate) fn get_known(&mut self, key: &str) -> Result<&LoadedSnapshot> {
        self.answer(key);
        self.get(key)
    }

    /// Returns whether a snapshot is the active one of an unanswered commit.
    pub(crate) fn is_uncommitted(&self, key: &str) -> bool {
        !self.slots.contains_key(key) && self.commits.active(key).is_some()
    }

    /// Returns whether a snapshot is the committed one of an unanswered commit.
    pub(crate) fn is_unanswered(&self, key: &str) -> bool {
        let found = self.slots.get(key).and_then(Slot::snapshot);
        found.is_some_and(|found| self.commits.active_of(&found.record).is_some())
    }

    /// Records that containerd knows a snapshot.
    fn answer(&mut self, key: &str) {
        if let Some(found) = self.slots.get(key).and_then(Slot::snapshot) {
            self.commits.answer(&found.record);
        }
    }

    /// Returns up to `count` snapshots of a part after the key `after`, in the order of keys. Those whose state is unknown
    /// are omitted: containerd removes a snapshot that is listed and that it does not know.
    pub(crate) fn after(
        &self,
        part: Part,
        after: Option<&str>,
        count: usize,
    ) -> Vec<&LoadedSnapshot> {
        match part {
            Part::Uncommitted => self.commits.after(after).take(count).collect(),
            Part::Existing => {
                let from = after.map_or(Bound::Unbounded, Bound::Excluded);
                let slots = self.slots.range::<str, _>((from, Bound::Unbounded));
                let snapshots = slots.filter_map(|(_, slot)| slot.snapshot());
                snapshots.take(count).collect()
            }
        }
    }

    /// Reserves the key of a new snapshot.
    pub(crate) fn reserve(
        &mut self,
        key: &str,
        kind: ContainerdKind,
        parent: Option<&str>,
    ) -> Result<Reservation, Obstacle> {
        let reservation = self.reserve_slot(key, kind, parent)?;
        // containerd creates only what it does not know, on what it knows.
        self.commits.answer_active(key);
        if let Some(parent) = parent {
            self.answer(parent);
        }
        Ok(reservation)
    }

    fn reserve_slot(
        &mut self,
        key: &str,
        kind: ContainerdKind,
        parent: Option<&str>,
    ) -> Result<Reservation, Obstacle> {
        self.check_unused(key)?;
        let parent_id = match parent {
            None => None,
            Some(parent) => Some(self.usable_parent(parent)?),
        };
        let candidates = match (kind, parent) {
            (ContainerdKind::Active, Some(_)) => active_names(key),
            _ => digest_name(key).into_iter().collect(),
        };
        let name = self.assign(key, candidates)?;
        if let Some(parent) = parent {
            *self.children.entry(parent.to_owned()).or_default() += 1;
        }
        let slot = Slot::Reserved {
            parent: parent.map(str::to_owned),
            name: name.clone(),
        };
        self.slots.insert(key.to_owned(), slot);
        Ok(Reservation {
            name,
            parent: parent_id,
        })
    }

    /// Reserves the key that an active snapshot gets by its commit.
    ///
    /// If the snapshot is already committed, and containerd may not have recorded that, the request is a repetition.
    /// Its new key may differ then, and replaces the first.
    pub(crate) fn begin_commit(&mut self, key: &str, new: &str) -> Result<CommitBegun, Obstacle> {
        let again = match self.slots.contains_key(key) {
            true => None,
            false => self.commits.committed(key).map(str::to_owned),
        };
        let is_in_effect = again.is_some();
        if again.as_deref() == Some(new) {
            let found = self.begin_change(new)?;
            return Ok(CommitBegun {
                name: found.name.clone(),
                found,
                is_in_effect,
                replaced: None,
            });
        }
        let unrecorded = self.unrecorded(new).map(|found| found.name.clone());
        if unrecorded.is_none() {
            // First, as in containerd.
            self.check_unused(new)?;
        }
        let from = again.as_deref().unwrap_or(key);
        let found = self.settled(from)?.clone();
        if !is_in_effect && found.record.kind != ContainerdKind::Active {
            let what = format!("the snapshot {key:?} is not active");
            return Err(RequestError::Precondition(what).into());
        }
        let (name, replaced) = match unrecorded {
            Some(name) => (name, Some(self.begin_removal(new)?)),
            None => (self.reserve_committed(new)?, None),
        };
        self.slots
            .insert(from.to_owned(), Slot::Changing(found.clone()));
        Ok(CommitBegun {
            name,
            found,
            is_in_effect,
            replaced,
        })
    }

    /// Returns the committed snapshot with a key that containerd is about to assign, if it results from a commit that
    /// containerd has not recorded: together with that commit, containerd has rolled back the counter that makes its
    /// keys unique.
    fn unrecorded(&self, key: &str) -> Option<&LoadedSnapshot> {
        let Some(Slot::Settled(found)) = self.slots.get(key) else {
            return None;
        };
        if self.children.contains_key(key) {
            return None;
        }
        let active = self.slots.get(found.record.committed_from.as_deref()?);
        let is_undone = active
            .and_then(Slot::snapshot)
            .is_some_and(|active| active.record.undone > found.record.undone);
        let is_unanswered = self.commits.active_of(&found.record).is_some();
        (is_undone || is_unanswered).then_some(found)
    }

    /// Records the removal of a snapshot whose key another one is about to get. The name remains reserved as well.
    pub(crate) fn vacate(&mut self, key: &str) {
        let Some(name) = self.slots.get(key).map(Slot::name).cloned() else {
            return;
        };
        self.remove(key);
        self.names.insert(name.clone());
        let slot = Slot::Reserved { parent: None, name };
        self.slots.insert(key.to_owned(), slot);
    }

    /// Reserves the key of a committed snapshot. Returns the name of its container.
    fn reserve_committed(&mut self, key: &str) -> Result<ContainerName> {
        let name = self.assign(key, digest_name(key).into_iter().collect())?;
        let slot = Slot::Reserved {
            parent: None,
            name: name.clone(),
        };
        self.slots.insert(key.to_owned(), slot);
        Ok(name)
    }

    /// Begins the change of a snapshot, and returns it.
    pub(crate) fn begin_change(&mut self, key: &str) -> Result<LoadedSnapshot, Obstacle> {
        if self.is_uncommitted(key) {
            // Not NOT_FOUND: containerd may know it.
            let what = format!("the snapshot {key:?} has been committed; repeat the request");
            return Err(RequestError::Unavailable(what).into());
        }
        let found = self.settled(key)?.clone();
        self.slots
            .insert(key.to_owned(), Slot::Changing(found.clone()));
        Ok(found)
    }

    /// Begins the removal of a snapshot. Fails if it has children.
    ///
    /// containerd requests the removal only of a snapshot that it does not know. So if it is a committed one, and
    /// containerd may know it by the key of the active one, the active one must exist again first.
    pub(crate) fn begin_removal(&mut self, key: &str) -> Result<RemovalBegun, Obstacle> {
        if !self.slots.contains_key(key) && self.commits.answer_active(key) {
            return Ok(RemovalBegun::Committed);
        }
        let found = self.settled(key)?;
        if let Some(count) = self.children.get(key) {
            let what = format!("cannot remove the snapshot {key:?}: it has {count} children");
            return Err(RequestError::Precondition(what).into());
        }
        match self.commits.active_of(&found.record).map(str::to_owned) {
            Some(active) if !is_disabled("split of an unanswered commit") => {
                self.begin_split_of(&active, key).map(RemovalBegun::Split)
            }
            _ => self.begin_change(key).map(RemovalBegun::Snapshot),
        }
    }

    /// Begins to recreate the active snapshot of an unanswered commit. Returns `None` for any other snapshot.
    pub(crate) fn begin_split(&mut self, active: &str) -> Result<Option<SplitBegun>, Obstacle> {
        match self.slots.get(active) {
            None => {}
            Some(Slot::Settled(_) | Slot::Unknown { .. }) => return Ok(None),
            // It may be a commit whose client has gone.
            Some(Slot::Reserved { .. } | Slot::Changing(_)) => {
                return Err(Obstacle::Wait(active.to_owned()));
            }
        }
        let committed = self.commits.committed(active).map(str::to_owned);
        let begun = committed.map(|committed| self.begin_split_of(active, &committed));
        begun.transpose()
    }

    fn begin_split_of(&mut self, active: &str, committed: &str) -> Result<SplitBegun, Obstacle> {
        let found = self.settled(committed)?;
        let parent = found.record.parent.clone();
        let reservation = self.reserve_slot(active, ContainerdKind::Active, parent.as_deref())?;
        Ok(SplitBegun {
            name: reservation.name,
            active: active.to_owned(),
            committed: self.begin_change(committed)?,
        })
    }

    /// Begins to change all committed snapshots that retain the snapshots of commands, and whose commit will not be undone.
    pub(crate) fn begin_cleanup(&mut self) -> Vec<LoadedSnapshot> {
        let settled = self.slots.values().filter_map(|slot| match slot {
            Slot::Settled(found) if found.record.snapshots_before > 0 => Some(found),
            _ => None,
        });
        let answered = settled.filter(|found| self.commits.active_of(&found.record).is_none());
        let found: Vec<_> = answered.cloned().collect();
        for one in &found {
            let slot = Slot::Changing(one.clone());
            self.slots.insert(one.record.key.clone(), slot);
        }
        found
    }

    /// Removes a key, if its reservation failed or its snapshot was removed or has another key now.
    pub(crate) fn remove(&mut self, key: &str) {
        let Some(slot) = self.slots.remove(key) else {
            return;
        };
        if let Some(snapshot) = slot.snapshot() {
            self.commits.remove(&snapshot.record);
        }
        self.release_claims(slot);
    }

    fn release_claims(&mut self, slot: Slot) {
        let (parent, name) = slot.into_claims();
        self.names.remove(&name);
        let Some(parent) = parent else {
            return;
        };
        if let Some(count) = self.children.get_mut(&parent) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.children.remove(&parent);
            }
        }
    }

    /// Records that the result of the request on a key is unknown. The name and the parent remain reserved.
    pub(crate) fn retain(&mut self, key: &str) {
        if let Some(slot) = self.slots.remove(key) {
            let last = slot.snapshot().cloned().map(Box::new);
            let (parent, name) = slot.into_claims();
            let slot = Slot::Unknown { parent, name, last };
            self.slots.insert(key.to_owned(), slot);
        }
    }

    /// Records the current state of a snapshot: its key is no longer reserved, and no request changes it.
    pub(crate) fn settle(&mut self, snapshot: LoadedSnapshot) {
        let record = &snapshot.record;
        let was = self.slots.remove(&record.key);
        let was_from = was.as_ref().and_then(Slot::snapshot);
        let was_from = was_from.and_then(|was| was.record.committed_from.as_ref());
        if was_from != record.committed_from.as_ref() {
            self.commits.add(&snapshot);
        }
        // A later removal of this snapshot must not reveal that of an earlier commit.
        self.commits.answer_active(&record.key);
        if let Some(slot) = was {
            self.release_claims(slot);
        }
        self.insert(snapshot);
    }

    fn insert(&mut self, snapshot: LoadedSnapshot) {
        if let Some(parent) = &snapshot.record.parent {
            *self.children.entry(parent.clone()).or_default() += 1;
        }
        self.names.insert(snapshot.name.clone());
        let key = snapshot.record.key.clone();
        self.slots.insert(key, Slot::Settled(snapshot));
    }

    /// Returns a snapshot that no request is changing.
    fn settled(&self, key: &str) -> Result<&LoadedSnapshot, Obstacle> {
        match self.slots.get(key) {
            None => Err(RequestError::NotFound(key.to_owned()).into()),
            Some(Slot::Settled(snapshot)) => Ok(snapshot),
            Some(Slot::Unknown { .. }) => Err(RequestError::Unknown(key.to_owned()).into()),
            Some(Slot::Reserved { .. } | Slot::Changing(_)) => Err(Obstacle::Wait(key.to_owned())),
        }
    }

    fn check_unused(&self, key: &str) -> Result<(), Obstacle> {
        match self.slots.get(key) {
            None => Ok(()),
            Some(Slot::Settled(_)) => Err(RequestError::AlreadyExists(key.to_owned()).into()),
            Some(Slot::Unknown { .. }) => Err(RequestError::Unknown(key.to_owned()).into()),
            // It may fail, or be removed.
            Some(Slot::Reserved { .. } | Slot::Changing(_)) => Err(Obstacle::Wait(key.to_owned())),
        }
    }

    fn usable_parent(&self, parent: &str) -> Result<ContainerId, Obstacle> {
        let found = self.settled(parent)?;
        match found.record.kind {
            ContainerdKind::Committed => Ok(found.id),
            ContainerdKind::Active | ContainerdKind::View => {
                let what = format!("the parent {parent:?} is not a committed snapshot");
                Err(RequestError::Invalid(what).into())
            }
        }
    }

    fn assign(&mut self, key: &str, candidates: Vec<ContainerName>) -> Result<ContainerName> {
        let free = candidates
            .into_iter()
            .find(|name| !self.names.contains(name));
        let name = free.ok_or_else(|| {
            RequestError::Unavailable(format!("no name is free for a container for {key:?}"))
        })?;
        self.names.insert(name.clone());
        Ok(name)
    }
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
