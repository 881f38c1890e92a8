//! Removal of snapshots: only the named ones are removed, no data of other states is lost, and the reported space is
//! freed.

use std::path::{Path, PathBuf};

use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;

/// Returns a store with the container web and the snapshots snap0 to snap`n-1`. Before each, the files `n` and `all`
/// are written.
fn store(snapshots: usize) -> Store {
    let store = Store::for_test();
    let source = store.scratch().make("source");
    std::fs::write(source.join("base"), "base\n").unwrap();
    store.create("web", &source);
    for number in 0..snapshots {
        write(&store, "web", &number.to_string(), &vec![b'x'; 100_000]);
        write(&store, "web", "all", number.to_string().as_bytes());
        store.cowl(["snapshot", "web"]).ok();
    }
    store
}

/// Writes into the head of a container that is not mounted.
fn write(store: &Store, name: &str, path: &str, content: &[u8]) {
    let head = head(store, name);
    std::fs::write(head.join(path), content).unwrap();
}

fn head(store: &Store, name: &str) -> PathBuf {
    let containers = std::fs::read_dir(store.path().join("containers")).unwrap();
    let found = containers.map(|entry| {
        let text = std::fs::read(entry.unwrap().path().join("container.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&text).unwrap()
    });
    let manifest = found.into_iter().find(|m| m["name"] == name).unwrap();
    let layer = manifest["head"].as_str().unwrap();
    store.path().join("layers").join(layer).join("tree")
}

fn layers(store: &Store) -> usize {
    std::fs::read_dir(store.path().join("layers"))
        .unwrap()
        .count()
}

/// Returns the tree of a state as a tar archive without varying times.
fn shown(store: &Store, address: &str) -> Vec<u8> {
    store.cowl(["export", address, "-"]).ok().stdout
}

#[test]
fn snapshots_are_removed_by_name_range_or_all() {
    let store = store(12);
    let left = |expected: &[u32]| {
        let expected: Vec<_> = expected.iter().map(|n| format!("snap{n}")).collect();
        assert_eq!(store.snapshots("web"), expected);
    };
    let before = shown(&store, "web");
    store.cowl(["rm", "web", "snap1"]).ok();
    left(&[0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
    store.cowl(["rm", "web@snap0", "web@snap3"]).ok();
    left(&[2, 4, 5, 6, 7, 8, 9, 10, 11]);
    // Ranges are in the order of creation, not alphabetical: snap9 precedes snap10.
    store.cowl(["rm", "web", "snap9..snap10", "snap2"]).ok();
    left(&[4, 5, 6, 7, 8, 11]);
    store.cowl(["rm", "web@snap5..snap6"]).ok();
    left(&[4, 7, 8, 11]);
    store.cowl(["rm", "web", "--all", "--yes"]).ok();
    left(&[]);
    assert_eq!(shown(&store, "web"), before);
    // Numbers are never reused.
    assert_eq!(store.cowl(["snapshot", "web"]).ok().out(), "snap12");
}

#[test]
fn snapshots_based_on_a_removed_one_are_based_on_its_parent() {
    let store = store(3);
    write(&store, "web", "since", b"x");
    let states = ["web", "web@snap0", "web@snap2"].map(|state| (state, shown(&store, state)));
    let changes = |from: &str, to: &str| store.cowl(["diff", from, to]).ok().out();
    let between = changes("web@snap0", "web@snap2");
    store.cowl(["rm", "web", "snap1"]).ok();
    let list = store.cowl(["list", "web", "--json"]).ok().json();
    assert_eq!(list["snapshots"][1]["parent"], "snap0");
    assert_eq!(store.cowl(["diff", "web@snap2"]).ok().out(), between);
    // The remaining states are unchanged. The parent of the head can be removed as well.
    store.cowl(["rm", "web", "snap2"]).ok();
    for (state, before) in &states[..2] {
        assert_eq!(shown(&store, state), *before, "{state}");
    }
    let since = store.cowl(["diff", "web"]).ok().out();
    assert!(
        since.contains("A /since") && since.contains("A /2"),
        "{since}"
    );
}

#[test]
fn freed_space_is_reported_correctly() {
    let store = store(4);
    store.restore("web", "snap0");
    // snap1 to snap3 are now on a branch of their own.
    let tell = store
        .cowl(["rm", "web", "snap1..snap3", "--dry-run", "--json"])
        .ok();
    let json = tell.json();
    assert_eq!(json["freed"]["layers"], 3, "{json}");
    assert_eq!(json["dry_run"], true);
    assert_eq!(store.snapshots("web").len(), 4);
    let (before, had) = (store.disk_usage(), layers(&store));
    let reported = json["freed"]["bytes"].as_u64().unwrap();
    assert!(reported >= 3 * 100_000, "{reported}");
    let output = store.cowl(["rm", "web", "snap1..snap3"]).ok();
    assert!(output.err().contains("frees "), "{}", output.report());
    assert_eq!(layers(&store), had - 3);
    let freed = before - store.disk_usage();
    // Beside its tree, each layer has two directories and a small file.
    assert!(
        freed >= reported && freed < reported + 3 * 64 * 1024,
        "{freed} {reported}"
    );
    // Layers that a clone depends on are not freed.
    store.cowl(["clone", "web@snap0", "other"]).ok();
    let shared = store.cowl(["rm", "web", "snap0"]).ok();
    assert!(
        shared.err().contains("frees nothing"),
        "{}",
        shared.report()
    );
    store.cowl(["destroy", "web", "--yes"]).ok();
    assert!(
        shown(&store, "other")
            .windows(100)
            .any(|part| part == [b'x'; 100])
    );
}

#[test]
fn ambiguous_arguments_remove_nothing() {
    let store = store(11);
    for (args, code) in [
        (&["rm"][..], 2),
        (&["rm", "web"], 2),
        (&["rm", ""], 2),
        (&["rm", "web", ""], 2),
        (&["rm", "web", "*"], 2),
        (&["rm", "web", ".."], 2),
        (&["rm", "web", "snap1.."], 2),
        (&["rm", "web", "..snap1"], 2),
        (&["rm", "web", "snap4..snap1"], 2),
        (&["rm", "web@"], 2),
        (&["rm", "web@snap1", "snap2"], 2),
        (&["rm", "web", "web@snap2"], 2),
        (&["rm", "web", "snap1", "--all"], 2),
        (&["rm", "web", "--all"], 2),
        (&["rm", "web", "snap"], 3),
        (&["rm", "web", "SNAP1"], 3),
        (&["rm", "web", "snap01"], 3),
        (&["rm", "web", "ALL"], 3),
        (&["rm", "web", "A"], 3),
        (&["rm", "web", "snap1", "snap99"], 3),
        (&["rm", "web", "snap1..snap99"], 3),
        (&["rm", "wbe", "snap1"], 3),
        (&["rm", "wbe@snap1"], 3),
    ] {
        store.cowl(args).fails(code, &[]);
        assert_eq!(store.snapshots("web").len(), 11, "{args:?}");
    }
}

#[test]
fn protected_snapshots_prevent_the_whole_removal() {
    let store = store(2);
    store.cowl(["snapshot", "web", "--protect"]).ok();
    store
        .cowl(["rm", "web", "snap0", "snap2"])
        .fails(1, &["snap2", "protected", "cowl protect"]);
    assert_eq!(store.snapshots("web").len(), 3);
    store
        .cowl(["rm", "web", "--all", "--yes"])
        .fails(1, &["snap2", "protected"]);
    assert_eq!(store.snapshots("web").len(), 3);
    store
        .cowl(["rm", "web", "--all", "--yes", "--skip-refused"])
        .ok();
    assert_eq!(store.snapshots("web"), ["snap2"]);
}

/// Locks a layer's tree as the daemon of a mount does.
fn hold(tree: &Path) -> std::fs::File {
    let tree = std::fs::File::open(tree).unwrap();
    rustix::fs::flock(&tree, rustix::fs::FlockOperation::LockShared).unwrap();
    tree
}

/// Returns the trees of the layers of a snapshot.
fn trees(store: &Store, snapshot: &str) -> Vec<PathBuf> {
    let list = store.cowl(["list", "web", "--json"]).ok().json();
    let (id, snapshots) = (&list["id"], list["snapshots"].as_array().unwrap());
    let found = snapshots.iter().find(|s| s["name"] == snapshot).unwrap();
    let file = store.path().join("containers").join(id.as_str().unwrap());
    let file = file.join(format!("snapshots/{}.json", found["id"].as_str().unwrap()));
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let stack = manifest["stack"].as_array().unwrap().iter();
    stack
        .map(|layer| {
            store
                .path()
                .join("layers")
                .join(layer.as_str().unwrap())
                .join("tree")
        })
        .collect()
}

#[test]
fn mounted_snapshots_are_retained() {
    let store = store(4);
    let held: Vec<_> = trees(&store, "snap2")
        .iter()
        .map(|tree| hold(tree))
        .collect();
    let pid = std::process::id().to_string();
    store
        .cowl(["rm", "web", "snap2"])
        .fails(4, &["snap2", "mounted", &pid, "cowl umount web@snap2"]);
    store
        .cowl(["rm", "web", "snap0..snap3"])
        .fails(4, &["snap2"]);
    assert_eq!(store.snapshots("web").len(), 4);
    // The snapshot below the mounted one can be removed like any other.
    store.cowl(["rm", "web", "snap1"]).ok();
    drop(held);
    store.cowl(["rm", "web", "snap2"]).ok();
    assert_eq!(store.snapshots("web"), ["snap0", "snap3"]);
}

#[test]
fn snapshots_of_a_mounted_container_can_be_removed() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = store(3);
    let mount_point = store.mount("web");
    std::fs::write(mount_point.join("new"), "x").unwrap();
    store.cowl(["snapshot", "web"]).ok();
    store.cowl(["rm", "web", "snap0..snap3"]).ok();
    assert_eq!(std::fs::read(mount_point.join("all")).unwrap(), b"2");
    assert_eq!(std::fs::read(mount_point.join("new")).unwrap(), b"x");
    std::fs::write(mount_point.join("more"), "y").unwrap();
    // The moment after an unmount the daemon still holds its locks.
    store.cowl(["snapshot", "web"]).ok();
    store.cowl(["umount", "web"]).ok();
    store.cowl(["rm", "web", "snap4"]).ok();
    let mount_point = store.mount("web");
    assert_eq!(std::fs::read(mount_point.join("more")).unwrap(), b"y");
}
