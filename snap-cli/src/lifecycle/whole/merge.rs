//! Merges received snapshots with those of a container that exists. No I/O.

use std::collections::{BTreeSet, HashMap, HashSet};

use serde_json::Map;

use super::super::foreign::{self, Names};
use crate::store::manifest::{ContainerManifest, ReceivedSnapshot, SnapshotId, SnapshotRef};
use crate::store::name::SnapshotName;

/// The number of removed snapshots that a container remembers: the identities of more take more space than they save.
const MAX_REMOVED: usize = 4096;

/// A snapshot that was added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddedSnapshot {
    /// The name that it had where it was sent from.
    pub sent_as: SnapshotName,
    /// Its name in the list.
    pub name: SnapshotName,
}

/// A snapshot of the container whose properties were changed where it was sent from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangedSnapshot {
    /// Its name in the list.
    pub name: SnapshotName,
    /// The changes that were applied, as words.
    pub changes: Vec<&'static str>,
    /// The properties whose change was not applied, because they are those of this store.
    pub retained: Vec<&'static str>,
}

/// Adds snapshots that the container does not have, and returns them in the order in which they were sent.
///
/// Their names follow the rules of [`Names::assign`]. The list remains sorted by time.
pub(super) fn add(target: &mut ContainerManifest, sent: Vec<SnapshotRef>) -> Vec<AddedSnapshot> {
    let mut names = Names::of(target);
    let (mut added, mut new) = (Vec::new(), Vec::new());
    // One that was removed here has a record.
    let ids: HashSet<_> = sent.iter().map(|snapshot| snapshot.id).collect();
    target.received.retain(|known| !ids.contains(&known.id));
    for mut snapshot in sent {
        let sent_as = snapshot.name.clone();
        snapshot.name = names.assign(sent_as.as_str());
        added.push(AddedSnapshot {
            sent_as,
            name: snapshot.name.clone(),
        });
        target.received.push(record_of(&snapshot));
        new.push(snapshot);
    }
    (target.next_snap, target.next_auto) = names.counters();
    foreign::insert(target, new);
    added
}

/// Applies the changes of comments and protection, and new tags, since the last transfer to the snapshots that the
/// container has.
///
/// A comment that was changed here as well remains as it is. So does the protection once it was set or removed here. Tags are
/// only added: pruning may depend on the others (`--keep-tag`), and the sender must not decide what is pruned here. If
/// nothing was recorded about a snapshot, nothing changes, and later changes are applied.
///
/// A change that is not applied is returned once: the user may want to repeat it here.
pub(super) fn follow(target: &mut ContainerManifest, sent: &[SnapshotRef]) -> Vec<ChangedSnapshot> {
    let records = target.received.iter().enumerate();
    let records: HashMap<_, _> = records.map(|(at, known)| (known.id, at)).collect();
    let own = target.snapshots.iter().enumerate();
    let own: HashMap<_, _> = own.map(|(at, known)| (known.id, at)).collect();
    let mut changed = Vec::new();
    for sent in sent {
        let own = own
            .get(&sent.id)
            .and_then(|at| target.snapshots.get_mut(*at));
        let Some(own) = own else { continue };
        let record = records
            .get(&sent.id)
            .and_then(|at| target.received.get_mut(*at));
        let Some(record) = record else {
            target.received.push(ReceivedSnapshot {
                own_protection: own.protected,
                ..record_of(sent)
            });
            continue;
        };
        let retained = retained(own, record, sent);
        let changes = follow_one(own, record, sent);
        if !changes.is_empty() || !retained.is_empty() {
            changed.push(ChangedSnapshot {
                name: own.name.clone(),
                changes,
                retained,
            });
        }
    }
    changed
}

/// Returns the properties that the sender has changed since the last transfer, and that [`follow_one`] does not change.
fn retained(own: &SnapshotRef, last: &ReceivedSnapshot, sent: &SnapshotRef) -> Vec<&'static str> {
    let mut retained = Vec::new();
    if sent.comment != last.comment && own.comment != last.comment && own.comment != sent.comment {
        retained.push("comment");
    }
    let keys: BTreeSet<&String> = last.tags.keys().chain(sent.tags.keys()).collect();
    let is_retained = |key: &&String| {
        let [own, last, sent] = [&own.tags, &last.tags, &sent.tags].map(|tags| tags.get(*key));
        let is_added = last.is_none() && own.is_none();
        sent != last && own != sent && !is_added
    };
    if keys.iter().any(is_retained) {
        retained.push("tags");
    }
    let is_own = last.own_protection || own.protected != last.protected;
    if is_own && sent.protected != last.protected && own.protected != sent.protected {
        retained.push("protection");
    }
    retained
}

/// Applies the changes of one snapshot, records what was sent, and returns the changes.
fn follow_one(
    own: &mut SnapshotRef,
    last: &mut ReceivedSnapshot,
    sent: &SnapshotRef,
) -> Vec<&'static str> {
    let mut changes = Vec::new();
    if own.comment == last.comment && own.comment != sent.comment {
        own.comment.clone_from(&sent.comment);
        changes.push("comment");
    }
    let before = own.tags.len();
    for (key, value) in &sent.tags {
        // One that was sent before and is absent was removed here.
        if !last.tags.contains_key(key) && !own.tags.contains_key(key) {
            own.tags.insert(key.clone(), value.clone());
        }
    }
    if own.tags.len() != before {
        changes.push("tags");
    }
    // A version that does not know the field can have changed the protection.
    last.own_protection |= own.protected != last.protected;
    if !last.own_protection && own.protected != sent.protected {
        own.protected = sent.protected;
        changes.push(match own.protected {
            true => "protection added",
            false => "protection removed",
        });
    }
    last.comment.clone_from(&sent.comment);
    last.tags.clone_from(&sent.tags);
    last.protected = sent.protected;
    changes
}

/// Returns the record of a snapshot that has the properties that were sent.
pub(super) fn record_of(sent: &SnapshotRef) -> ReceivedSnapshot {
    ReceivedSnapshot {
        id: sent.id,
        comment: sent.comment.clone(),
        tags: sent.tags.clone(),
        protected: sent.protected,
        own_protection: false,
        extra: Map::new(),
    }
}

/// Returns the snapshots that were received and are not in the list any more.
pub(super) fn removed(target: &ContainerManifest) -> Vec<SnapshotId> {
    let present: HashSet<_> = target.snapshots.iter().map(|known| known.id).collect();
    let ids = target.received.iter().map(|known| known.id);
    ids.filter(|id| !present.contains(id)).collect()
}

/// Reduces the records of removed snapshots to their ids, and forgets the oldest ones if there are too many.
pub(super) fn limit_records(target: &mut ContainerManifest) {
    let removed: HashSet<_> = removed(target).into_iter().collect();
    let mut excess = removed.len().saturating_sub(MAX_REMOVED);
    target.received.retain_mut(|known| {
        if !removed.contains(&known.id) {
            return true;
        }
        let is_forgotten = excess > 0;
        excess = excess.saturating_sub(1);
        known.comment.clear();
        known.tags.clear();
        (known.protected, known.own_protection) = (false, false);
        !is_forgotten
    });
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::*;
    use crate::store::manifest::{LayerId, SnapshotId, SnapshotKind};
    use crate::store::name::ContainerName;

    fn snapshot(name: &str, created: &str) -> SnapshotRef {
        SnapshotRef {
            id: SnapshotId::fresh(),
            name: SnapshotName::parse(name).unwrap(),
            kind: SnapshotKind::Manual,
            created: format!("{created}T00:00:00Z"),
            parent: None,
            layer: LayerId::fresh(),
            comment: "c".to_owned(),
            tags: [("k".to_owned(), "v".to_owned())].into(),
            protected: true,
            settling: None,
            extra: Map::new(),
        }
    }

    fn container(own: &[(&str, &str)], next_snap: u64, next_auto: u64) -> ContainerManifest {
        let (head, base) = (LayerId::fresh(), LayerId::fresh());
        let name = ContainerName::parse("web").unwrap();
        let mut manifest = ContainerManifest::new(name, head, &[base]);
        manifest.snapshots = own.iter().map(|(name, at)| snapshot(name, at)).collect();
        (manifest.next_snap, manifest.next_auto) = (next_snap, next_auto);
        manifest
    }

    #[test]
    fn names_are_retained_if_they_are_free() {
        let mut target = container(&[("snap0", "2026-01-01"), ("good", "2026-01-05")], 2, 1);
        let before = target.clone();
        let sent: Vec<_> = [
            ("snap0", "2026-01-02"),
            ("snap1", "2026-01-03"),
            ("snap2", "2026-01-04"),
            ("snap9", "2026-01-06"),
            ("auto0", "2026-01-07"),
            ("auto5", "2026-01-08"),
            ("good", "2026-01-09"),
            ("fine", "2026-01-10"),
        ]
        .iter()
        .map(|(name, at)| snapshot(name, at))
        .collect();
        let added = add(&mut target, sent.clone());
        let names: Vec<_> = added
            .iter()
            .map(|a| (a.sent_as.as_str(), a.name.as_str()))
            .collect();
        // snap1 and auto0 were used by snapshots that were removed. The number that snap0 gets is then used as well.
        assert_eq!(
            names,
            [
                ("snap0", "snap2"),
                ("snap1", "snap3"),
                ("snap2", "snap4"),
                ("snap9", "snap9"),
                ("auto0", "auto1"),
                ("auto5", "auto5"),
                ("good", "good-2"),
                ("fine", "fine"),
            ]
        );
        assert_eq!((target.next_snap, target.next_auto), (10, 6));
        let times: Vec<_> = target.snapshots.iter().map(|s| &s.created).collect();
        assert!(times.is_sorted());
        // Its own snapshots are unchanged, and the new ones have their comments, tags and protection.
        for own in &before.snapshots {
            assert!(target.snapshots.contains(own));
        }
        for (sent, added) in sent.iter().zip(&added) {
            let found = target.snapshot(&added.name).unwrap();
            let expected = SnapshotRef {
                name: added.name.clone(),
                ..sent.clone()
            };
            assert_eq!(*found, expected);
        }
        assert_eq!((target.stack, target.head), (before.stack, before.head));
    }

    #[test]
    fn parents_that_were_not_sent_are_cleared() {
        let mut target = container(&[("snap0", "1")], 1, 0);
        let own = target.snapshots[0].id;
        let mut one = snapshot("a", "2");
        one.parent = Some(own);
        let mut two = snapshot("b", "3");
        two.parent = Some(SnapshotId::fresh());
        add(&mut target, vec![one, two]);
        assert_eq!(target.snapshots[1].parent, Some(own));
        assert_eq!(target.snapshots[2].parent, None);
    }

    #[test]
    fn snapshots_are_sorted_by_time_and_not_by_its_text() {
        let mut target = container(&[("a", "2026-01-01")], 0, 0);
        target.snapshots[0].created = "2026-01-01T00:00:00.687Z".to_owned();
        let mut earlier = snapshot("b", "2026-01-01");
        earlier.created = "2026-01-01T00:00:00.6Z".to_owned();
        add(&mut target, vec![earlier]);
        let names: Vec<_> = target.snapshots.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["b", "a"]);
    }

    /// Returns a container that has received `a`, with what was sent.
    fn target() -> (ContainerManifest, SnapshotRef) {
        let mut target = container(&[], 0, 0);
        let sent = SnapshotRef {
            protected: false,
            ..snapshot("a", "2026-01-01")
        };
        add(&mut target, vec![sent.clone()]);
        (target, sent)
    }

    #[test]
    fn changes_of_the_sender_are_applied_unless_there_are_own_ones() {
        let (mut target, mut sent) = target();
        assert_eq!(follow(&mut target, std::slice::from_ref(&sent)), []);
        sent.comment = "new".to_owned();
        sent.tags = [("k", "w"), ("n", "1")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
        sent.protected = true;
        let changed = follow(&mut target, std::slice::from_ref(&sent));
        assert_eq!(changed[0].changes, ["comment", "tags", "protection added"]);
        assert_eq!(changed[0].retained, ["tags"]);
        let own = &mut target.snapshots[0];
        assert_eq!(own.comment, sent.comment);
        // A tag is added, and none is changed.
        let tag = |own: &SnapshotRef, key: &str| own.tags.get(key).cloned();
        assert_eq!(tag(own, "k").as_deref(), Some("v"));
        assert_eq!(tag(own, "n").as_deref(), Some("1"));
        assert!(own.protected);
        // Changed here: the comment, and tags. One was removed.
        own.comment = "mine".to_owned();
        own.tags.remove("n");
        own.tags.insert("own".to_owned(), String::new());
        sent.comment = "newer".to_owned();
        sent.tags.remove("k");
        sent.tags.insert("own".to_owned(), "other".to_owned());
        sent.protected = false;
        let changed = follow(&mut target, std::slice::from_ref(&sent));
        assert_eq!(changed[0].changes, ["protection removed"]);
        assert_eq!(changed[0].retained, ["comment", "tags"]);
        let own = &target.snapshots[0];
        assert_eq!(own.comment, "mine");
        assert_eq!(own.tags.keys().collect::<Vec<_>>(), ["k", "own"]);
        assert_eq!(
            [tag(own, "k").unwrap(), tag(own, "own").unwrap()],
            ["v", ""]
        );
        assert!(!own.protected);
        // Nothing is applied twice.
        let before = target.clone();
        assert_eq!(follow(&mut target, &[sent]), []);
        assert_eq!(target, before);
    }

    #[test]
    fn the_protection_of_the_target_remains() {
        for noted in [true, false] {
            let (mut target, mut sent) = target();
            target.snapshots[0].protected = true;
            target.received[0].own_protection = noted;
            // The sender protects it, too, and then not any more.
            for protected in [true, false, true, false] {
                sent.protected = protected;
                let changed = follow(&mut target, std::slice::from_ref(&sent));
                let retained: Vec<_> = changed.iter().flat_map(|c| &c.retained).collect();
                let expected: &[&&str] = if protected { &[] } else { &[&"protection"] };
                assert_eq!(retained, expected);
                assert!(changed.iter().all(|c| c.changes.is_empty()));
                assert!(target.snapshots[0].protected);
            }
        }
        // A snapshot of which nothing was recorded, protected on both sides.
        let (mut target, mut sent) = target();
        target.received.clear();
        for protected in [true, false] {
            target.snapshots[0].protected = true;
            sent.protected = protected;
            follow(&mut target, std::slice::from_ref(&sent));
            assert!(target.snapshots[0].protected);
        }
    }

    #[test]
    fn removed_snapshots_are_remembered_up_to_a_limit() {
        let (mut target, sent) = target();
        assert_eq!(removed(&target), []);
        target.snapshots.clear();
        limit_records(&mut target);
        assert_eq!(removed(&target), [sent.id]);
        assert_eq!(
            (
                target.received[0].comment.as_str(),
                target.received[0].tags.len()
            ),
            ("", 0)
        );
        let more = (0..MAX_REMOVED).map(|_| record_of(&snapshot("x", "2026-01-01")));
        target.received.extend(more);
        let present = record_of(&sent);
        target.snapshots.push(sent);
        limit_records(&mut target);
        assert_eq!(target.received.len(), MAX_REMOVED + 1);
        assert_eq!(target.received[0].id, present.id);
        target.snapshots.clear();
        limit_records(&mut target);
        assert_eq!(removed(&target).len(), MAX_REMOVED);
        assert!(!removed(&target).contains(&present.id));
    }
}
