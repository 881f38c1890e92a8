//! Commits that containerd may not have recorded. No I/O.
//!
//! containerd requests a commit within a transaction of its database, and does not know the result if the transaction
//! is rolled back: it then knows the key of the active snapshot, otherwise that of the committed one. Until a request
//! shows which of them containerd knows, the snapshot exists under both keys.

use std::collections::BTreeMap;
use std::ops::Bound;

use cowl::lifecycle::containerd::LoadedSnapshot;
use cowl::store::containerd::ContainerdRecord;

/// A commit in the store.
#[derive(Debug)]
struct StoredCommit {
    /// The active snapshot as it was. Its container is the one that is committed now.
    active: LoadedSnapshot,
    /// The key of the committed snapshot.
    committed: String,
    /// Whether containerd has recorded the commit, or no longer knows the active snapshot.
    is_answered: bool,
}

/// The commits of a store, each under the key of its active snapshot.
#[derive(Debug, Default)]
pub(crate) struct Commits {
    commits: BTreeMap<String, StoredCommit>,
}

impl Commits {
    /// Adds the commit that a snapshot of the store results from.
    ///
    /// Of several commits with the same key, only the latest can be unanswered: the active snapshot of a later one was
    /// created when containerd no longer knew that of the earlier one.
    pub(crate) fn load(&mut self, snapshot: &LoadedSnapshot) {
        let active = snapshot.record.committed_from.as_deref();
        let known = active.and_then(|active| self.active(active));
        let before = snapshot.record.before_commit();
        if known
            .zip(before)
            .is_none_or(|(known, before)| is_later(&before, &known.record))
        {
            self.add(snapshot);
        }
    }

    /// Adds the commit that a snapshot results from, if it does.
    pub(crate) fn add(&mut self, snapshot: &LoadedSnapshot) {
        let Some(before) = snapshot.record.before_commit() else {
            return;
        };
        let commit = StoredCommit {
            committed: snapshot.record.key.clone(),
            is_answered: false,
            active: LoadedSnapshot {
                record: before,
                ..snapshot.clone()
            },
        };
        self.commits
            .insert(commit.active.record.key.clone(), commit);
    }

    /// Removes the commit that a snapshot results from, because the snapshot has been removed or has another key.
    pub(crate) fn remove(&mut self, record: &ContainerdRecord) {
        if let Some(active) = self
            .find(record)
            .map(|commit| commit.active.record.key.clone())
        {
            self.commits.remove(&active);
        }
    }

    /// Records that containerd knows a committed snapshot.
    pub(crate) fn answer(&mut self, committed: &ContainerdRecord) {
        if let Some(active) = &committed.committed_from
            && let Some(commit) = self.commits.get_mut(active)
            && commit.committed == committed.key
        {
            commit.is_answered = true;
        }
    }

    /// Records that containerd does not know an active snapshot. Returns false if no commit has removed it.
    pub(crate) fn answer_active(&mut self, active: &str) -> bool {
        let commit = self.commits.get_mut(active);
        commit.map(|commit| commit.is_answered = true).is_some()
    }

    /// Returns the active snapshot of an unanswered commit.
    pub(crate) fn active(&self, key: &str) -> Option<&LoadedSnapshot> {
        self.unanswered(key).map(|commit| &commit.active)
    }

    /// Returns the key of the committed snapshot of an unanswered commit.
    pub(crate) fn committed(&self, active: &str) -> Option<&str> {
        self.unanswered(active)
            .map(|commit| commit.committed.as_str())
    }

    /// Returns the key of the active snapshot if a committed one results from an unanswered commit.
    pub(crate) fn active_of(&self, committed: &ContainerdRecord) -> Option<&str> {
        let commit = self.find(committed).filter(|commit| !commit.is_answered)?;
        Some(&commit.active.record.key)
    }

    /// Returns the active snapshots of unanswered commits after the key `after`, in the order of keys.
    pub(crate) fn after(&self, after: Option<&str>) -> impl Iterator<Item = &LoadedSnapshot> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let commits = self.commits.range::<str, _>((from, Bound::Unbounded));
        commits
            .filter(|(_, commit)| !commit.is_answered)
            .map(|(_, commit)| &commit.active)
    }

    fn find(&self, committed: &ContainerdRecord) -> Option<&StoredCommit> {
        let found = self.commits.get(committed.committed_from.as_deref()?);
        found.filter(|commit| commit.committed == committed.key)
    }

    fn unanswered(&self, active: &str) -> Option<&StoredCommit> {
        let found = self.commits.get(active);
        found.filter(|commit| !commit.is_answered)
    }
}

/// Returns whether the commit of `a` is later than that of `b`.
///
/// The clock may have been set back between them, so it decides only if neither of them was undone: then the key was
/// used for two snapshots. A time that cannot be read is the earliest.
fn is_later(a: &ContainerdRecord, b: &ContainerdRecord) -> bool {
    let order = |record: &ContainerdRecord| {
        let time = record.created.parse::<jiff::Timestamp>().ok();
        (record.undone, time)
    };
    order(a) > order(b)
}
