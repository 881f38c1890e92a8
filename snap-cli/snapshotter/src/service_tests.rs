//! Requests that wait for others, and requests whose result is unknown.

use std::task::Poll;

use cowl::lifecycle::containerd as snapshots;
use cowl::store::manifest::ContainerId;
use cowl::store::name::ContainerName;
use cowl::store::{Session, Store};
use tonic::Code;

use super::*;
use crate::manager::Change;

fn open(dir: &std::path::Path) -> Store {
    let session = Session {
        command: "test".to_owned(),
        patience: Duration::from_secs(1),
        mounts: Default::default(),
        program: Some("/nowhere/cowl".into()),
    };
    Store::open_or_make(&dir.join("store"), session).unwrap()
}

fn label(value: &str) -> Labels {
    Labels::from([("label".to_owned(), value.to_owned())])
}

/// Returns a service whose store has the committed snapshot `base`, which was the active snapshot `active`, and the
/// container of that.
fn with_base(dir: &std::path::Path) -> (Arc<Service>, ContainerId) {
    let store = open(dir);
    let name = |text| ContainerName::parse(text).unwrap();
    let (id, _) = snapshots::prepare(
        &store,
        snapshots::PrepareRequest {
            name: name("ctr.active"),
            key: "active".to_owned(),
            kind: ContainerdKind::Active,
            parent: None,
            labels: label("before"),
        },
    )
    .unwrap();
    let request = snapshots::CommitRequest {
        name: name("ctr.base"),
        key: "base".to_owned(),
        labels: label("after"),
    };
    snapshots::commit(&store, id, request, || Ok(())).unwrap();
    drop(store);
    (serve(dir), id)
}

/// Returns a service of the store in a directory.
fn serve(dir: &std::path::Path) -> Arc<Service> {
    let store = open(dir);
    let alone = store.lock_containerd().unwrap();
    let manager = Manager::open(store, alone).unwrap();
    Arc::new(Service::new(Arc::new(manager)))
}

/// Returns the keys and kinds of the snapshots in the store.
fn stored(dir: &std::path::Path) -> Vec<(String, ContainerdKind)> {
    let all = snapshots::load(&open(dir)).unwrap().snapshots.into_iter();
    let mut all: Vec<_> = all.map(|one| (one.record.key, one.record.kind)).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn update(key: &str) -> Update<impl FnOnce(Labels) -> Labels + Send + use<>> {
    Update {
        key: key.to_owned(),
        edit: |labels| labels,
    }
}

fn run<T>(work: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().build().unwrap().block_on(work)
}

/// Lets the other tasks run until they wait.
async fn let_others_run() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[test]
fn requests_that_wait_for_a_key_do_not_delay_those_on_other_keys() {
    let dir = tempfile::tempdir().unwrap();
    let (service, _) = with_base(dir.path());
    run(async {
        let Ok(held) = service.manager.begin(&update("base")) else {
            panic!("the key is reserved");
        };
        let waiting: Vec<_> = (0..2 * MAX_RUNNING)
            .map(|_| {
                let service = Arc::clone(&service);
                tokio::spawn(async move { service.run(update("base")).await.map(drop) })
            })
            .collect();
        let_others_run().await;
        assert_eq!(service.running.available_permits(), MAX_RUNNING);
        let key = "base".to_owned();
        service.run(Usage { key }).await.unwrap();
        Change::new(&service.manager, ["base"]).settle(held);
        for one in waiting {
            one.await.unwrap().unwrap();
        }
    });
}

#[test]
fn a_client_that_disconnects_while_it_waits_leaves_no_key_reserved() {
    let dir = tempfile::tempdir().unwrap();
    let (service, _) = with_base(dir.path());
    run(async {
        let Ok(held) = service.manager.begin(&update("base")) else {
            panic!("the key is reserved");
        };
        {
            let mut waiting = std::pin::pin!(service.run(update("base")));
            std::future::poll_fn(|context| {
                assert!(waiting.as_mut().poll(context).is_pending());
                Poll::Ready(())
            })
            .await;
        }
        Change::new(&service.manager, ["base"]).settle(held);
        service.run(update("base")).await.unwrap();
    });
}

#[test]
fn a_snapshot_with_an_unknown_result_is_neither_created_again_nor_ends_a_collection() {
    let dir = tempfile::tempdir().unwrap();
    let (service, base) = with_base(dir.path());
    let manifest = open(dir.path()).paths().container_file(base);
    let intact = std::fs::read(&manifest).unwrap();
    let key = || "ns/1/web".to_owned();
    let prepare = |key: String| Prepare {
        key,
        kind: ContainerdKind::Active,
        parent: Some("base".to_owned()),
        labels: Labels::new(),
    };
    run(async {
        // The new snapshot may be one whose manifest cannot be read.
        std::fs::write(&manifest, "{").unwrap();
        service.run(prepare(key())).await.unwrap_err();
        std::fs::write(&manifest, intact).unwrap();
        let stat = service.manager.stat(&key()).map(drop);
        for (done, code) in [
            (stat.map_err(Status::from), Code::Unavailable),
            (
                service.run(Usage { key: key() }).await.map(drop),
                Code::Unavailable,
            ),
            (
                service.run(prepare(key())).await.map(drop),
                Code::Unavailable,
            ),
            (
                service.run(update("ns/1/web")).await.map(drop),
                Code::Unavailable,
            ),
            (
                service.run(Mounts { key: key() }).await.map(drop),
                Code::Unavailable,
            ),
            (
                service.run(Remove { key: key() }).await,
                Code::FailedPrecondition,
            ),
            // It may be the parent of the snapshot.
            (
                service
                    .run(Remove {
                        key: "base".to_owned(),
                    })
                    .await,
                Code::FailedPrecondition,
            ),
        ] {
            assert_eq!(done.unwrap_err().code(), code);
        }
        let all = Filters::parse(&[]).unwrap();
        let listed = service.manager.list(&all, Part::Existing, None, 9).0;
        assert_eq!(listed.len(), 1, "{listed:?}");
    });
}

#[test]
fn a_commit_whose_reply_was_lost_is_repeated_with_the_same_or_another_key() {
    let dir = tempfile::tempdir().unwrap();
    let (service, id) = with_base(dir.path());
    let commit = |new: &str| Commit {
        key: "active".to_owned(),
        new: new.to_owned(),
        labels: Labels::from([("requested".to_owned(), new.to_owned())]),
    };
    let stored = || {
        let all = snapshots::load(&open(dir.path())).unwrap().snapshots;
        let [one] = all.as_slice() else {
            panic!("{all:?}");
        };
        assert_eq!((one.id, one.record.kind), (id, ContainerdKind::Committed));
        assert_eq!(one.record.committed_from.as_deref(), Some("active"));
        assert_eq!(one.record.labels.get("requested"), Some(&one.record.key));
        (one.record.key.clone(), one.name.clone())
    };
    run(async {
        service.run(commit("base")).await.unwrap();
        let (key, first) = stored();
        assert_eq!(key, "base");
        service.run(commit("again")).await.unwrap();
        let (key, second) = stored();
        assert!(key == "again" && first != second, "{key} {second}");
        let gone = service.manager.stat("base").unwrap_err();
        assert_eq!(Status::from(gone).code(), Code::NotFound);
        service.run(commit("again")).await.unwrap();
        assert_eq!(stored().0, "again");
    });
}

#[test]
fn a_commit_whose_reply_was_lost_is_undone_by_the_removal_of_its_result() {
    let dir = tempfile::tempdir().unwrap();
    let (service, base) = with_base(dir.path());
    let manifest = open(dir.path()).paths().container_file(base);
    let intact = std::fs::read(&manifest).unwrap();
    let remove = |key: &str| Remove {
        key: key.to_owned(),
    };
    let (active, committed) = (ContainerdKind::Active, ContainerdKind::Committed);
    run(async {
        // Its labels are needed.
        std::fs::write(&manifest, "{").unwrap();
        let refused = service.run(remove("base")).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        // containerd must not create it again.
        let key = "active".to_owned();
        let unknown = service.mounts(Request::new(KeyRequest {
            key,
            ..Default::default()
        }));
        assert_eq!(unknown.await.unwrap_err().code(), Code::Unavailable);
        std::fs::write(&manifest, intact).unwrap();
    });
    assert_eq!(stored(dir.path()), [("base".to_owned(), committed)]);
    // containerd inspects the active snapshot, to list it.
    service.manager.stat("active").unwrap();
    drop(service);

    let service = serve(dir.path());
    run(async {
        service.run(remove("base")).await.unwrap();
        assert_eq!(stored(dir.path()), [("active".to_owned(), active)]);
        let stat = service.manager.stat("active").unwrap();
        assert_eq!(stat.kind, active);
        assert_eq!(stat.labels, label("before"));
        service.run(remove("active")).await.unwrap();
        let gone = service.run(remove("active")).await.unwrap_err();
        assert_eq!(gone.code(), Code::NotFound);
        service.run(CleanUp).await.unwrap();
    });
    assert_eq!(stored(dir.path()), []);
    for objects in ["layers", "containers", "trash"] {
        let left = dir.path().join("store").join(objects);
        assert_eq!(left.read_dir().unwrap().count(), 0, "{objects}");
    }
}

#[test]
fn both_snapshots_of_an_unanswered_commit_exist_once_containerd_uses_the_active_one() {
    let dir = tempfile::tempdir().unwrap();
    let (service, _) = with_base(dir.path());
    let key = |key: &str| key.to_owned();
    let (active, committed) = (ContainerdKind::Active, ContainerdKind::Committed);
    run(async {
        let listed = |part| {
            let all = Filters::parse(&[]).unwrap();
            service.manager.list(&all, part, None, 9).0
        };
        let usage = service.run(Usage { key: key("active") }).await.unwrap();
        assert_eq!(
            usage,
            service.run(Usage { key: key("base") }).await.unwrap()
        );
        assert_eq!(listed(Part::Uncommitted).len(), 1);
        service.split("active").await.unwrap();
        let both = [(key("active"), active), (key("base"), committed)];
        assert_eq!(stored(dir.path()), both);
        assert_eq!(listed(Part::Uncommitted), []);
        // Neither changes anything.
        service.split("active").await.unwrap();
        service.split("base").await.unwrap();
        service.run(update("active")).await.unwrap();
        let commit = Commit {
            key: key("active"),
            new: key("again"),
            labels: Labels::new(),
        };
        service.run(commit).await.unwrap();
        let both = [(key("again"), committed), (key("base"), committed)];
        assert_eq!(stored(dir.path()), both);
        // containerd knows neither: it removes what the list contains first.
        for key in ["active", "base", "again"].map(key) {
            service.run(Remove { key }).await.unwrap();
        }
    });
    assert_eq!(stored(dir.path()), []);
}

#[test]
fn a_commit_is_repeated_with_the_same_key_after_containerd_has_used_the_active_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let (service, _) = with_base(dir.path());
    let store = open(dir.path());
    let found = |key: &str| {
        let mut all = snapshots::load(&store).unwrap().snapshots.into_iter();
        all.find(|one| one.record.key == key).unwrap()
    };
    let stack = |id| store.container(id).unwrap().unwrap().body.stack;
    let commit = |key: &str| Commit {
        key: key.to_owned(),
        new: "base".to_owned(),
        labels: label("again"),
    };
    let both = [
        ("active".to_owned(), ContainerdKind::Active),
        ("base".to_owned(), ContainerdKind::Committed),
    ];
    run(async {
        for restart in [false, true] {
            service.split("active").await.unwrap();
            assert_eq!(stored(dir.path()), both);
            let active = found("active").id;
            let head = stack(active)[0];
            if !restart {
                service.run(commit("active")).await.unwrap();
                assert_eq!(found("base").id, active);
                assert_eq!(stack(active)[0], head);
                assert_eq!(stored(dir.path()), both[1..]);
                assert_eq!(found("base").record.labels, label("again"));
            }
        }
    });
    drop(service);

    // Another snapshot gets the key of a commit that is unanswered again: its active snapshot is restored.
    let service = serve(dir.path());
    run(async {
        service.run(commit("active")).await.unwrap();
        let other = Prepare {
            key: "other".to_owned(),
            kind: ContainerdKind::Active,
            parent: None,
            labels: Labels::new(),
        };
        let (key, kind) = (other.key.clone(), other.kind);
        let Ok(begun) = service.manager.begin(&other) else {
            panic!("the key is unused");
        };
        let (id, record) = snapshots::prepare(
            &store,
            snapshots::PrepareRequest {
                name: begun.name.clone(),
                key: key.clone(),
                kind,
                parent: None,
                labels: Labels::new(),
            },
        )
        .unwrap();
        let name = begun.name;
        Change::new(&service.manager, [&*key]).settle(snapshots::LoadedSnapshot {
            id,
            name,
            record,
        });
        service.run(commit("other")).await.unwrap();
        assert_eq!(stored(dir.path()), both);
        assert_eq!(found("base").id, id);
    });
}

#[test]
fn no_active_snapshot_is_restored_while_it_may_be_one_whose_manifest_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let (service, _) = with_base(dir.path());
    run(service.split("active")).unwrap();
    drop(service);
    let found = snapshots::load(&open(dir.path())).unwrap().snapshots;
    let active = found.iter().find(|one| one.record.key == "active").unwrap();
    let manifest = open(dir.path()).paths().container_file(active.id);
    let intact = std::fs::read(&manifest).unwrap();
    std::fs::write(&manifest, "{").unwrap();
    let service = serve(dir.path());
    let remove = || Remove {
        key: "base".to_owned(),
    };
    run(async {
        let refused = service.split("active").await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{refused}");
        // containerd continues its collection.
        let refused = service.run(remove()).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    });
    drop(service);
    assert_eq!(stored(dir.path()).len(), 1);

    std::fs::write(&manifest, intact).unwrap();
    let service = serve(dir.path());
    run(service.run(remove())).unwrap();
    let left = [("active".to_owned(), ContainerdKind::Active)];
    assert_eq!(stored(dir.path()), left);
}
