//! Detection of leftovers: an interrupted command must leave no unreferenced object in a store.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowl::store::{collect, deleted, identity, received};
use cowl::tree::digest_portable;

use crate::library;

/// Asserts that the store at `path` contains no unreferenced object. A store that does not exist yet is clean.
#[track_caller]
pub(crate) fn assert_none(path: &Path, label: &str) {
    let Ok(store) = library::open(path) else {
        return;
    };
    let mut layers = BTreeSet::new();
    let mut files = BTreeSet::new();
    for (id, record) in store.containers().unwrap() {
        let manifest = record.unwrap().body;
        layers.extend(manifest.stack.iter().map(ToString::to_string));
        files.insert(store.paths().container_file(id));
        for snapshot in &manifest.snapshots {
            let stack = store.snapshot(id, snapshot.id).unwrap().stack;
            layers.extend(stack.iter().map(ToString::to_string));
            files.insert(store.paths().snapshot_file(id, snapshot.id));
        }
    }
    for deleted in deleted::list(&store).unwrap() {
        let manifest = deleted::manifest(&store, &deleted).unwrap().body;
        layers.extend(manifest.stack.iter().map(ToString::to_string));
        for snapshot in &manifest.snapshots {
            let stack = store.snapshot_in(&deleted.dir, snapshot.id).unwrap().stack;
            layers.extend(stack.iter().map(ToString::to_string));
        }
    }
    // Complete layers of an interrupted transfer are retained.
    for waiting in received::list(&store).unwrap() {
        let tree = store.paths().layer_tree(waiting.id);
        let identity = identity::recorded(&store, waiting.id).unwrap().unwrap();
        let digest = digest_portable(&tree, store.space(), &mut |_| ()).unwrap();
        assert_eq!(digest, identity.digest, "{label}");
        layers.insert(waiting.id.to_string());
    }
    // A process that is killed holds its locks until it has ended, and a background sync of a snapshot excludes the
    // collection of garbage: then a later command removes the layer.
    let start = Instant::now();
    let is_clean = || {
        let locks = names(&path.join("locks"));
        names(&path.join("layers")) == layers
            && !locks.iter().any(|name| name.starts_with("making"))
            && names(&path.join("trash")).is_empty()
    };
    while !is_clean() && start.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(50));
        collect::collect_or_warn(&store);
    }
    assert_eq!(names(&path.join("layers")), layers, "{label}: layers");
    let locks = names(&path.join("locks"));
    assert!(
        !locks.iter().any(|name| name.starts_with("making")),
        "{label}: {locks:?}"
    );
    for dir in ["trash", "moving"] {
        assert_eq!(names(&path.join(dir)), BTreeSet::new(), "{label}: {dir}");
    }
    // A later command continues an interrupted download, but not an upload.
    let transfers = names(&path.join("transfers"));
    assert!(
        !transfers.iter().any(|name| name.starts_with("push-")),
        "{label}: {transfers:?}"
    );
    // A daemon that has synced a snapshot commits that in the background.
    let start = Instant::now();
    while container_files(path) != files && start.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(container_files(path), files, "{label}: files of containers");
}

fn container_files(store: &Path) -> BTreeSet<PathBuf> {
    let mut files = BTreeSet::new();
    let containers = store.join("containers");
    for id in names(&containers) {
        for name in names(&containers.join(&id)) {
            let path = containers.join(&id).join(&name);
            if path.is_dir() {
                files.extend(names(&path).into_iter().map(|file| path.join(file)));
            } else {
                files.insert(path);
            }
        }
    }
    files
}

/// Returns the names in a directory; none if there is no directory.
pub(crate) fn names(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}
