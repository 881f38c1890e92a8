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

/// Returns a service whose store has the committed snapshot `base`, and the container of that.
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
            labels: Labels::new(),
        },
    )
    .unwrap();
    let request = snapshots::CommitRequest {
        name: name("ctr.base"),
        key: "base".to_owned(),
        labels: Labels::new(),
    };
    snapshots::commit(&store, id, request, || Ok(())).unwrap();
    let alone = store.lock_containerd().unwrap();
    let manager = Arc::new(Manager::open(store, alone).unwrap());
    (Arc::new(Service::new(manager)), id)
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
        let listed = service.manager.list(&all, None, 9).0;
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
