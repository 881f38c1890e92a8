//! Reserved keys, commits and names.

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
            labels_before: None,
            snapshots_before: 0,
            undone: 0,
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
    let reserve =
        |index: &mut Index, key: &str| index.reserve(key, ContainerdKind::Active, None).map(drop);
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
    assert_eq!(keys(&index, Part::Existing), ["base"]);
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
    assert_eq!(refusal(index.begin_split("active")), "wait");
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
    // The transaction of containerd was rolled back, and the number in its keys may have increased since.
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
    assert_eq!(refusal(index.begin_commit("active", "new3")), "not found");
    // Another snapshot with the key of the first one.
    create(&mut index, "active", active, None);
    assert_eq!(
        refusal(index.begin_commit("active", "new2")),
        "already exists"
    );
    assert!(!index.begin_commit("active", "new5").unwrap().is_in_effect);
}

/// Returns the keys of a part.
fn keys(index: &Index, part: Part) -> Vec<&str> {
    let found = index.after(part, None, 99).into_iter();
    found.map(|one| one.record.key.as_str()).collect()
}

/// Returns a committed snapshot that was the active snapshot `from`.
fn committed(key: &str, from: &str, created: &str, name: ContainerName) -> LoadedSnapshot {
    let mut committed = snapshot(key, ContainerdKind::Committed, Some("base"), name);
    committed.record.committed_from = Some(from.to_owned());
    committed.record.labels = [("label".to_owned(), "after".to_owned())].into();
    committed.record.labels_before = Some([("label".to_owned(), "before".to_owned())].into());
    committed.record.created = created.to_owned();
    committed
}

/// Returns an index with the snapshot `new`, which was committed from `ns/1/web`.
fn with_unanswered_commit() -> Index {
    let mut index = Index::default();
    create(&mut index, "base", ContainerdKind::Committed, None);
    let (active, base) = (ContainerdKind::Active, Some("base"));
    assert_eq!(create(&mut index, "ns/1/web", active, base), "ctr.ns.web");
    let name = index.begin_commit("ns/1/web", "new").unwrap().name;
    index.remove("ns/1/web");
    index.settle(committed("new", "ns/1/web", "", name));
    index
}

#[test]
fn an_unanswered_commit_exists_under_both_keys() {
    let mut index = with_unanswered_commit();
    assert!(index.is_uncommitted("ns/1/web"));
    assert_eq!(keys(&index, Part::Uncommitted), ["ns/1/web"]);
    assert_eq!(keys(&index, Part::Existing), ["base", "new"]);
    let (new, web) = (index.get("new").unwrap(), index.get("ns/1/web").unwrap());
    assert_eq!(new.id, web.id);
    assert_eq!(web.record.kind, ContainerdKind::Active);
    assert_eq!(Some(&web.record.labels), new.record.labels_before.as_ref());
    assert_eq!(web.record.undone, 1);
    assert_eq!(web.record.committed_from, None);
    let child = index.reserve("x", ContainerdKind::Active, Some("ns/1/web"));
    assert_eq!(refusal(child), "not found");

    // A request that waited for the commit does not report that the snapshot does not exist.
    assert_eq!(refusal(index.begin_change("ns/1/web")), "other");

    // A change of the committed snapshot by another program is no answer.
    let again = index.begin_change("new").unwrap();
    index.settle(again);
    assert!(index.is_uncommitted("ns/1/web"));

    // containerd removes what it does not know: here, the active snapshot.
    let removal = index.begin_removal("ns/1/web").unwrap();
    assert!(matches!(removal, RemovalBegun::Committed), "{removal:?}");
    assert_eq!(keys(&index, Part::Uncommitted), [""; 0]);
    assert!(index.get("ns/1/web").is_err());
    let removal = index.begin_removal("new").unwrap();
    assert!(matches!(removal, RemovalBegun::Snapshot(_)), "{removal:?}");
    index.remove("new");
    assert_eq!(refusal(index.begin_removal("ns/1/web")), "not found");
    index.begin_removal("base").unwrap();
}

#[test]
fn the_removal_of_an_unanswered_commit_restores_the_active_snapshot() {
    let mut index = with_unanswered_commit();
    let begin = |index: &mut Index| match index.begin_removal("new").unwrap() {
        RemovalBegun::Split(begun) => begun,
        other => panic!("{other:?}"),
    };
    let begun = begin(&mut index);
    assert_eq!(
        (&*begun.active, begun.name.as_str()),
        ("ns/1/web", "ctr.ns.web")
    );
    // containerd inspects it meanwhile.
    index.get("ns/1/web").unwrap();
    for key in ["new", "ns/1/web"] {
        assert_eq!(refusal(index.begin_removal(key)), "wait");
    }
    assert_eq!(refusal(index.begin_commit("ns/1/web", "new2")), "wait");
    // It fails.
    index.remove("ns/1/web");
    index.settle(begun.committed);
    assert!(index.is_uncommitted("ns/1/web"));

    let begun = begin(&mut index);
    let active = ContainerdKind::Active;
    index.settle(snapshot("ns/1/web", active, Some("base"), begun.name));
    index.remove("new");
    assert_eq!(keys(&index, Part::Existing), ["base", "ns/1/web"]);
    assert_eq!(keys(&index, Part::Uncommitted), [""; 0]);
    assert_eq!(refusal(index.begin_removal("base")), "precondition");
    index.begin_removal("ns/1/web").unwrap();
    index.remove("ns/1/web");
    assert_eq!((index.names.len(), index.children.len()), (1, 0));
}

/// Ends a commit that replaces a snapshot, as a request does.
fn replace(index: &mut Index, from: &str, begun: CommitBegun) {
    index.vacate("new");
    assert_eq!(refusal(index.begin_removal("new")), "wait");
    index.remove(from);
    index.settle(committed("new", from, "", begun.name));
}

#[test]
fn a_commit_replaces_the_snapshot_with_its_key_that_containerd_has_not_recorded() {
    let web = "ns/1/web";
    let mut index = with_unanswered_commit();
    let begun = index.begin_split(web).unwrap().unwrap();
    let mut active = snapshot(web, ContainerdKind::Active, Some("base"), begun.name);
    index.settle(begun.committed);
    // The key was used for another snapshot.
    index.settle(active.clone());
    assert_eq!(refusal(index.begin_commit(web, "new")), "already exists");
    active.record.undone = 1;
    index.settle(active);
    create(&mut index, "ns/2/db", ContainerdKind::Active, Some("base"));
    assert_eq!(
        refusal(index.begin_commit("ns/3/x", "new")),
        "not found",
        "nothing was begun"
    );
    let begun = index.begin_commit(web, "new").unwrap();
    assert!(!begun.is_in_effect && begun.found.record.key == web);
    let replaced = begun.replaced.as_ref().unwrap();
    assert!(matches!(replaced, RemovalBegun::Snapshot(old) if old.record.key == "new"));
    replace(&mut index, web, begun);
    assert!(index.is_uncommitted(web));
    assert_eq!(keys(&index, Part::Existing), ["base", "new", "ns/2/db"]);

    // Another snapshot gets the same key: the first one is restored before.
    let begun = index.begin_commit("ns/2/db", "new").unwrap();
    let Some(RemovalBegun::Split(split)) = &begun.replaced else {
        panic!("{begun:?}");
    };
    assert_eq!(split.active, web);
    let restored = snapshot(
        web,
        ContainerdKind::Active,
        Some("base"),
        split.name.clone(),
    );
    index.settle(restored);
    replace(&mut index, "ns/2/db", begun);
    assert!(index.is_uncommitted("ns/2/db") && !index.is_uncommitted(web));
    assert_eq!(keys(&index, Part::Existing), ["base", "new", web]);
    assert_eq!((index.names.len(), index.children["base"]), (3, 2));

    // containerd knows it.
    index.get_known("new").unwrap();
    assert_eq!(refusal(index.begin_commit(web, "new")), "already exists");
}

#[test]
fn snapshots_of_commands_are_retained_until_a_commit_is_answered() {
    let mut index = with_unanswered_commit();
    let mut new = index.begin_change("new").unwrap();
    new.record.snapshots_before = 2;
    index.settle(new);
    assert!(index.begin_cleanup().is_empty());
    index.get_known("new").unwrap();
    let mut begun = index.begin_cleanup();
    assert_eq!(begun.len(), 1);
    assert_eq!(refusal(index.begin_removal("new")), "wait");
    assert!(index.begin_cleanup().is_empty());
    let mut new = begun.remove(0);
    new.record.snapshots_before = 0;
    index.settle(new);
    assert!(index.begin_cleanup().is_empty());
    assert!(!index.is_uncommitted("ns/1/web"));
}

#[test]
fn a_request_on_the_committed_snapshot_answers_a_commit() {
    type Request = fn(&mut Index);
    let requests: [Request; 3] = [
        |index| drop(index.get_known("new").unwrap().clone()),
        |index| drop(create(index, "x", ContainerdKind::View, Some("new"))),
        // The number in the keys of containerd makes them unique, so that it does not know the first one.
        |index| drop(create(index, "ns/1/web", ContainerdKind::Active, None)),
    ];
    for request in requests {
        let mut index = with_unanswered_commit();
        request(&mut index);
        assert_eq!(keys(&index, Part::Uncommitted), [""; 0]);
        assert!(index.begin_split("ns/1/web").unwrap().is_none());
        if index.get("ns/1/web").is_err() {
            assert_eq!(refusal(index.begin_commit("ns/1/web", "n")), "not found");
            // A collection that has listed it before must not fail.
            let removal = index.begin_removal("ns/1/web").unwrap();
            assert!(matches!(removal, RemovalBegun::Committed), "{removal:?}");
        }
    }
}

#[test]
fn commits_are_unanswered_after_a_start_unless_the_store_contains_an_answer() {
    let name = |key: &str| digest_name(key).unwrap();
    let active =
        |key: &str, parent: &str| snapshot(key, ContainerdKind::Active, Some(parent), name(key));
    let commit = |key: &str, from: &str, time: &str| committed(key, from, time, name(key));
    let base = snapshot("base", ContainerdKind::Committed, None, name("base"));
    let undone = |mut commit: LoadedSnapshot| {
        commit.record.undone = 1;
        commit
    };
    let (early, late) = ("2026-11-30T00:00:00.09Z", "2026-11-30T00:00:00.1Z");
    for (snapshots, expected) in [
        (vec![commit("a", "x", early)], &["x"][..]),
        (vec![commit("a", "x", early), active("b", "a")], &[]),
        (vec![commit("a", "x", early), active("x", "base")], &[]),
        // An older version did not record the key.
        (vec![base.clone()], &[]),
        (
            vec![commit("a", "x", early), commit("b", "x", late)],
            &["x"],
        ),
        // The clock was set back.
        (
            vec![commit("a", "x", late), undone(commit("b", "x", early))],
            &["x"],
        ),
        (
            vec![undone(commit("b", "x", early)), commit("c", "x", late)],
            &["x"],
        ),
        (
            vec![commit("a", "x", ""), commit("b", "y", early)],
            &["x", "y"],
        ),
    ] {
        let count = snapshots.len();
        let mut index = Index::new([vec![base.clone()], snapshots].concat(), []);
        assert_eq!(keys(&index, Part::Uncommitted), expected);
        if count == 2 && expected == ["x"] {
            let begun = index.begin_split("x").unwrap().unwrap();
            assert_eq!(begun.committed.record.key, "b");
        }
    }
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
        let part = index.after(Part::Existing, last.as_deref(), 100);
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
