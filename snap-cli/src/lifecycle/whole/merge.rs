//! Adds received snapshots to the list of a container that has snapshots of its own. No I/O.

use std::collections::HashSet;

use jiff::Timestamp;

use super::import::next_after;
use crate::store::manifest::{ContainerManifest, SnapshotRef};
use crate::store::name::SnapshotName;

/// A snapshot that was added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddedSnapshot {
    /// The name that it had where it was sent from.
    pub sent_as: SnapshotName,
    /// Its name in the list.
    pub name: SnapshotName,
}

/// Adds snapshots that the container does not have, and returns them in the order in which they were sent.
///
/// A snapshot retains its name if that is free. Otherwise a numbered one gets the next number, and another one gets a number
/// at its end. The list remains sorted by time, and nothing else changes.
pub(super) fn add(target: &mut ContainerManifest, sent: Vec<SnapshotRef>) -> Vec<AddedSnapshot> {
    let mut names: HashSet<SnapshotName> =
        target.snapshots.iter().map(|s| s.name.clone()).collect();
    // A number of the container that it does not use any more is not free either.
    let (next_snap, next_auto) = (target.next_snap, target.next_auto);
    let mut added = Vec::new();
    let mut new: Vec<SnapshotRef> = Vec::new();
    for mut snapshot in sent {
        let sent_as = snapshot.name.clone();
        let is_used = |name: &SnapshotName| {
            let is_old = |prefix, next| (1..=next).contains(&next_after(name, prefix));
            let has_no_number = next_after(name, "snap") == 0 && next_after(name, "auto") == 0;
            let is_old = || is_old("snap", next_snap) || is_old("auto", next_auto);
            // A number that is too large would leave none for the snapshots that follow.
            names.contains(name) || name.is_reserved() && (has_no_number || is_old())
        };
        if is_used(&sent_as) {
            snapshot.name = free_name(target, &names, &sent_as);
        }
        names.insert(snapshot.name.clone());
        target.next_snap = target.next_snap.max(next_after(&snapshot.name, "snap"));
        target.next_auto = target.next_auto.max(next_after(&snapshot.name, "auto"));
        added.push(AddedSnapshot {
            sent_as,
            name: snapshot.name.clone(),
        });
        new.push(snapshot);
    }
    // The text of a time omits zeros at the end of the fraction, so it has another order.
    let time = |snapshot: &SnapshotRef| snapshot.created.parse::<Timestamp>().ok();
    for snapshot in new {
        let later = target
            .snapshots
            .iter()
            .position(|own| time(own) > time(&snapshot));
        let at = later.unwrap_or(target.snapshots.len());
        target.snapshots.insert(at, snapshot);
    }
    let known: HashSet<_> = target
        .snapshots
        .iter()
        .map(|snapshot| snapshot.id)
        .collect();
    for snapshot in &mut target.snapshots {
        snapshot.parent = snapshot.parent.filter(|parent| known.contains(parent));
    }
    added
}

/// Returns a free name for a snapshot whose name is used.
fn free_name(
    target: &ContainerManifest,
    used: &HashSet<SnapshotName>,
    name: &SnapshotName,
) -> SnapshotName {
    let is_free = |name: &SnapshotName| !used.contains(name);
    let first = |from: u64, named: &dyn Fn(u64) -> SnapshotName| {
        // One of so many numbers is free, whatever the counter is.
        let numbers = (from..=u64::MAX).chain(0..from);
        numbers.map(named).find(is_free)
    };
    let found = match name.as_str() {
        text if !name.is_reserved() => {
            let numbers = 2..=used.len() + 2;
            let mut names = numbers.filter_map(|number| {
                let end = format!("-{number}");
                let length = text.len().min(crate::store::name::MAX_NAME - end.len());
                let begin = text.get(..length)?.trim_end_matches('.');
                SnapshotName::parse(format!("{begin}{end}")).ok()
            });
            names.find(is_free)
        }
        text if text.starts_with("auto") => first(target.next_auto, &SnapshotName::automatic),
        _ => None,
    };
    let found = found.or_else(|| first(target.next_snap, &SnapshotName::counted));
    found.unwrap_or_else(|| name.clone())
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
    fn extreme_names_are_free_in_the_end() {
        let long = "x".repeat(64);
        let most = format!("snap{}", u64::MAX);
        let own = [(long.as_str(), "1"), (most.as_str(), "2")];
        let mut target = container(&own, u64::MAX, 0);
        let sent = own.iter().map(|(name, at)| snapshot(name, at)).collect();
        let added = add(&mut target, sent);
        assert_eq!(added[0].name.as_str(), format!("{}-2", "x".repeat(62)));
        assert_eq!(added[1].name.as_str(), "snap0");
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
}
