//! The index of snapshots by key, in memory. No I/O.
//!
//! A key is reserved before the store is changed, and settled afterwards. So two requests never create the same key,
//! and a parent is never removed while a child is created.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;

use cowl::lifecycle::containerd::LoadedSnapshot;
use cowl::store::containerd::{ContainerdKind, active_names, digest_name};
use cowl::store::manifest::ContainerId;
use cowl::store::name::ContainerName;

use crate::error::{RequestError, Result};

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
}

/// The snapshots of a store.
#[derive(Debug, Default)]
pub(crate) struct Index {
    slots: BTreeMap<String, Slot>,
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
        index
    }

    /// Returns the number of snapshots.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Returns a snapshot, or its last known state.
    ///
    /// containerd inspects each snapshot that it knows to list them, and ends the list with any error except NOT_FOUND.
    pub(crate) fn get(&self, key: &str) -> Result<&LoadedSnapshot> {
        match self.slots.get(key) {
            Some(Slot::Settled(found) | Slot::Changing(found)) => Ok(found),
            Some(Slot::Unknown {
                last: Some(last), ..
            }) => Ok(last),
            Some(Slot::Unknown { last: None, .. }) => Err(RequestError::Unknown(key.to_owned())),
            Some(Slot::Reserved { .. }) | None => Err(RequestError::NotFound(key.to_owned())),
        }
    }

    /// Returns up to `count` snapshots after the key `after`, in the order of keys. Those whose state is unknown are
    /// omitted: containerd removes a snapshot that is listed and that it does not know.
    pub(crate) fn after(
        &self,
        after: Option<&str>,
        count: usize,
    ) -> impl Iterator<Item = &LoadedSnapshot> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let slots = self.slots.range::<str, _>((from, Bound::Unbounded));
        slots.filter_map(|(_, slot)| slot.snapshot()).take(count)
    }

    /// Reserves the key of a new snapshot.
    pub(crate) fn reserve(
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
    /// If the snapshot was committed already, and no other one is based on it, the request is a repetition: containerd
    /// has not received the reply to the first one. It may have another new key then, which replaces the first.
    pub(crate) fn begin_commit(&mut self, key: &str, new: &str) -> Result<CommitBegun, Obstacle> {
        if !self.slots.contains_key(key)
            && let Some(committed) = self.committed_from(key)
        {
            return self.begin_commit_again(&committed, new);
        }
        // First, as in containerd.
        self.check_unused(new)?;
        let found = self.settled(key)?.clone();
        if found.record.kind != ContainerdKind::Active {
            let what = format!("the snapshot {key:?} is not active");
            return Err(RequestError::Precondition(what).into());
        }
        let name = self.reserve_committed(new)?;
        self.slots
            .insert(key.to_owned(), Slot::Changing(found.clone()));
        Ok(CommitBegun {
            name,
            found,
            is_in_effect: false,
        })
    }

    /// Returns the key of the committed snapshot that was the active snapshot `key`.
    fn committed_from(&self, key: &str) -> Option<String> {
        let all = self.slots.values().filter_map(Slot::snapshot);
        let mut all = all.map(|found| &found.record);
        let found = all.find(|record| record.committed_from.as_deref() == Some(key));
        found.map(|record| record.key.clone())
    }

    fn begin_commit_again(&mut self, committed: &str, new: &str) -> Result<CommitBegun, Obstacle> {
        let found = self.settled(committed)?.clone();
        let name = if committed == new {
            found.name.clone()
        } else {
            self.check_unused(new)?;
            if self.children.contains_key(committed) {
                // A snapshot that containerd has used is one that it knows.
                let what = format!("the snapshot is committed as {committed:?}, and in use");
                return Err(RequestError::Precondition(what).into());
            }
            self.reserve_committed(new)?
        };
        self.slots
            .insert(committed.to_owned(), Slot::Changing(found.clone()));
        Ok(CommitBegun {
            name,
            found,
            is_in_effect: true,
        })
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
        let found = self.settled(key)?.clone();
        self.slots
            .insert(key.to_owned(), Slot::Changing(found.clone()));
        Ok(found)
    }

    /// Begins the removal of a snapshot, and returns it. Fails if it has children.
    pub(crate) fn begin_removal(&mut self, key: &str) -> Result<LoadedSnapshot, Obstacle> {
        self.settled(key)?;
        if let Some(count) = self.children.get(key) {
            let what = format!("cannot remove the snapshot {key:?}: it has {count} children");
            return Err(RequestError::Precondition(what).into());
        }
        self.begin_change(key)
    }

    /// Removes a key, if its reservation failed or its snapshot was removed or has another key now.
    pub(crate) fn remove(&mut self, key: &str) {
        let Some((parent, name)) = self.slots.remove(key).map(Slot::into_claims) else {
            return;
        };
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
        self.remove(&snapshot.record.key.clone());
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
mod tests {
    use cowl::store::containerd::ContainerdRecord;

    use super::*;
    use crate::filter::Filters;

    fn snapshot(
        key: &str,
        kind: ContainerdKind,
        parent: Option<&str>,
        name: ContainerName,
    ) -> LoadedSnapshot {
        LoadedSnapshot {
            id: ContainerId::fresh(),
            name,
            record: ContainerdRecord {
                key: key.to_owned(),
                kind,
                parent: parent.map(str::to_owned),
                labels: BTreeMap::new(),
                created: String::new(),
                updated: String::new(),
                committed_from: None,
                frozen: kind == ContainerdKind::Committed,
                extra: Default::default(),
            },
        }
    }

    /// Creates a snapshot as a request does.
    fn create(index: &mut Index, key: &str, kind: ContainerdKind, parent: Option<&str>) -> String {
        let reservation = index.reserve(key, kind, parent).unwrap();
        let name = reservation.name.clone();
        index.settle(snapshot(key, kind, parent, reservation.name));
        name.to_string()
    }

    fn refusal<T: std::fmt::Debug>(done: Result<T, Obstacle>) -> &'static str {
        match done.unwrap_err() {
            Obstacle::Wait(_) => "wait",
            Obstacle::Refused(RequestError::NotFound(_)) => "not found",
            Obstacle::Refused(RequestError::AlreadyExists(_)) => "already exists",
            Obstacle::Refused(RequestError::Precondition(_)) => "precondition",
            Obstacle::Refused(RequestError::Unknown(_)) => "unknown",
            Obstacle::Refused(_) => "other",
        }
    }

    #[test]
    fn a_key_is_reserved_until_its_request_ends() {
        let mut index = Index::default();
        create(&mut index, "base", ContainerdKind::Committed, None);
        index
            .reserve("ns/1/web", ContainerdKind::Active, Some("base"))
            .unwrap();
        let reserve = |index: &mut Index, key: &str| {
            index.reserve(key, ContainerdKind::Active, None).map(drop)
        };
        assert_eq!(refusal(reserve(&mut index, "ns/1/web")), "wait");
        assert_eq!(refusal(index.begin_removal("ns/1/web")), "wait");
        // The child that is being created protects its parent.
        assert_eq!(refusal(index.begin_removal("base")), "precondition");
        assert!(index.get("ns/1/web").is_err());
        index.remove("ns/1/web");
        assert_eq!(refusal(index.begin_removal("ns/1/web")), "not found");
        index.begin_removal("base").unwrap();
        // A parent that is being removed gets no children.
        let child = index.reserve("child", ContainerdKind::Active, Some("base"));
        assert_eq!(refusal(child), "wait");
        index.remove("base");
        assert_eq!(
            (index.len(), index.names.len(), index.children.len()),
            (0, 0, 0)
        );
    }

    #[test]
    fn a_key_with_an_unknown_result_remains_reserved() {
        let mut index = Index::default();
        create(&mut index, "base", ContainerdKind::Committed, None);
        let active = ContainerdKind::Active;
        let name = create(&mut index, "ns/1/web", active, Some("base"));
        index.begin_commit("ns/1/web", "new").unwrap();
        for key in ["ns/1/web", "new"] {
            index.retain(key);
        }
        // containerd knows this one, and inspects it with all others to list them.
        let last = index.get("ns/1/web").unwrap();
        assert_eq!(
            (&*last.record.key, last.name.as_str()),
            ("ns/1/web", &*name)
        );
        assert_eq!(refusal(index.get("new").map_err(Obstacle::from)), "unknown");
        for key in ["ns/1/web", "new"] {
            assert_eq!(refusal(index.begin_change(key)), "unknown");
            assert_eq!(refusal(index.begin_removal(key)), "unknown");
            assert_eq!(refusal(index.reserve(key, active, None)), "unknown");
            assert_eq!(refusal(index.reserve("x", active, Some(key))), "unknown");
        }
        let listed: Vec<_> = index.after(None, 9).map(|one| &one.record.key).collect();
        assert_eq!(listed, ["base"]);
        // Its snapshot may exist, with this parent and this name.
        assert_eq!(refusal(index.begin_removal("base")), "precondition");
        assert_ne!(create(&mut index, "ns/2/web", active, Some("base")), name);
    }

    #[test]
    fn a_commit_moves_a_snapshot_to_another_key() {
        let mut index = Index::default();
        create(&mut index, "base", ContainerdKind::Committed, None);
        create(&mut index, "active", ContainerdKind::Active, Some("base"));
        assert_eq!(
            refusal(index.begin_commit("active", "base")),
            "already exists"
        );
        assert_eq!(refusal(index.begin_commit("base", "new")), "precondition");
        let begun = index.begin_commit("active", "new").unwrap();
        assert!(!begun.is_in_effect);
        let name = begun.name;
        assert_eq!(refusal(index.begin_commit("active", "other")), "wait");
        assert_eq!(refusal(index.begin_change("active")), "wait");
        index.remove("active");
        index.remove("new");
        index.settle(snapshot(
            "new",
            ContainerdKind::Committed,
            Some("base"),
            name,
        ));
        assert!(index.get("active").is_err());
        assert_eq!(
            refusal(index.begin_commit("unknown", "new")),
            "already exists"
        );
        assert_eq!(refusal(index.begin_commit("unknown", "other")), "not found");
        assert_eq!(refusal(index.begin_removal("base")), "precondition");
        index.begin_removal("new").unwrap();
        index.remove("new");
        index.begin_removal("base").unwrap();
    }

    #[test]
    fn a_commit_is_repeated_if_containerd_does_not_know_its_result() {
        let mut index = Index::default();
        let active = ContainerdKind::Active;
        create(&mut index, "active", active, None);
        let done = |index: &mut Index, new: &str, old: &[&str]| {
            let begun = index.begin_commit("active", new).unwrap();
            let is_in_effect = begun.is_in_effect;
            let mut after = snapshot(new, ContainerdKind::Committed, None, begun.name);
            after.record.committed_from = Some("active".to_owned());
            for key in old.iter().copied().chain([new]) {
                index.remove(key);
            }
            index.settle(after);
            is_in_effect
        };
        assert!(!done(&mut index, "new", &["active"]));
        assert!(done(&mut index, "new", &[]));
        let first = index.get("new").unwrap().name.clone();
        // The transaction of containerd was undone, and the number in its keys may have increased since.
        assert!(done(&mut index, "new2", &["new"]));
        assert!(index.get("new").is_err());
        assert_ne!(index.get("new2").unwrap().name, first);
        assert_eq!((index.len(), index.names.len()), (1, 1));
        // While the repetition runs.
        index.begin_commit("active", "new3").unwrap();
        assert_eq!(refusal(index.begin_commit("active", "new4")), "wait");
        assert_eq!(refusal(index.begin_removal("new2")), "wait");
        index.remove("new3");
        let name = index.get("new2").unwrap().name.clone();
        let mut again = snapshot("new2", ContainerdKind::Committed, None, name);
        again.record.committed_from = Some("active".to_owned());
        index.settle(again);
        create(&mut index, "child", active, Some("new2"));
        assert_eq!(
            refusal(index.begin_commit("active", "new3")),
            "precondition"
        );
        // Another snapshot with the key of the first one.
        create(&mut index, "active", active, None);
        assert_eq!(
            refusal(index.begin_commit("active", "new2")),
            "already exists"
        );
        assert!(!index.begin_commit("active", "new5").unwrap().is_in_effect);
    }

    #[test]
    fn names_are_not_assigned_twice() {
        let taken = ContainerName::parse("ctr.ns.web").unwrap();
        let mut index = Index::new(Vec::new(), [taken]);
        create(&mut index, "base", ContainerdKind::Committed, None);
        let mut create = |key: &str| create(&mut index, key, ContainerdKind::Active, Some("base"));
        let first = create("ns/1/web");
        assert_ne!(first, "ctr.ns.web");
        assert_eq!(create("ns/2/db"), "ctr.ns.db");
        let again = create("ns/3/db");
        assert!(again != "ctr.ns.db" && again != first, "{again}");
    }

    #[test]
    fn a_million_snapshots_are_listed_in_parts() {
        const COUNT: usize = 1_000_000;
        let name = ContainerName::parse("ctr.x").unwrap();
        let all = (0..COUNT).map(|number| {
            let key = format!("ns/{number}/x");
            snapshot(&key, ContainerdKind::Active, None, name.clone())
        });
        let index = Index::new(all.collect(), []);
        let filters = Filters::parse(&["name~=/00000\\/x$/".to_owned()]).unwrap();
        let (mut last, mut found, mut seen) = (None::<String>, 0, 0);
        loop {
            let part: Vec<_> = index.after(last.as_deref(), 100).collect();
            let Some(end) = part.last() else {
                break;
            };
            last = Some(end.record.key.clone());
            seen += part.len();
            found += part
                .iter()
                .filter(|one| filters.matches(&one.record))
                .count();
        }
        assert_eq!((seen, found), (COUNT, 9));
    }
}
