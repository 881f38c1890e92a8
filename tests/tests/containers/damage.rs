//! A damaged container affects no other: commands on the whole store report it, and their output about the others is
//! complete.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use cowl_tests::command::{run, run_command};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;

const NEEDS: [Need; 3] = [Need::Root, Need::Fuse, Need::Program("mkfifo")];

/// The files of a container.
struct Parts {
    manifest: PathBuf,
    /// The file of its first snapshot.
    snapshot: PathBuf,
    /// The layer of its last snapshot.
    layer: PathBuf,
}

fn parts(store: &Store, name: &str) -> Parts {
    let containers = fs::read_dir(store.path().join("containers")).unwrap();
    for dir in containers.map(|entry| entry.unwrap().path()) {
        let manifest = dir.join("container.json");
        let json: serde_json::Value =
            serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
        if json["name"] == name {
            let snapshots = json["snapshots"].as_array().unwrap();
            let id = snapshots[0]["id"].as_str().unwrap();
            let layer = snapshots[1]["layer"].as_str().unwrap();
            return Parts {
                snapshot: dir.join("snapshots").join(format!("{id}.json")),
                layer: store.path().join("layers").join(layer),
                manifest,
            };
        }
    }
    panic!("no container {name}");
}

fn fifo(path: &Path) {
    match path.symlink_metadata() {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
    run("mkfifo", [path]).ok();
}

/// Creates a store with the containers bad and good, each with two snapshots, and an object in the trash.
fn store() -> Store {
    let store = Store::for_test();
    let source = store.scratch().make("source");
    fs::write(source.join("file"), "content\n").unwrap();
    for name in ["bad", "good"] {
        store.create(name, &source);
        store.cowl(["snapshot", name]).ok();
        write_new(&store, name);
        store.cowl(["snapshot", name]).ok();
    }
    fs::create_dir_all(store.path().join("trash/layer-old/tree/d")).unwrap();
    store
}

/// Writes a file into a container.
fn write_new(store: &Store, name: &str) {
    let mount_point = store.mount(name);
    fs::write(mount_point.join("new"), "new\n").unwrap();
    store.cowl(["umount", name]).ok();
}

type Damage = (&'static str, fn(&Parts));

const DAMAGES: [Damage; 14] = [
    ("garbage-manifest", |bad| {
        fs::write(&bad.manifest, "garbage").unwrap()
    }),
    ("fifo-manifest", |bad| fifo(&bad.manifest)),
    ("directory-manifest", |bad| {
        fs::remove_file(&bad.manifest).unwrap();
        fs::create_dir(&bad.manifest).unwrap();
    }),
    ("no-manifest", |bad| fs::remove_file(&bad.manifest).unwrap()),
    ("no-snapshot", |bad| fs::remove_file(&bad.snapshot).unwrap()),
    ("fifo-snapshot", |bad| fifo(&bad.snapshot)),
    ("no-layer", |bad| fs::remove_dir_all(&bad.layer).unwrap()),
    ("fifo-layer", |bad| fifo(&bad.layer)),
    ("fifo-tree", |bad| fifo(&bad.layer.join("tree"))),
    ("link-tree", |bad| {
        fs::remove_dir_all(bad.layer.join("tree")).unwrap();
        symlink("/etc", bad.layer.join("tree")).unwrap();
    }),
    ("garbage-layer-file", |bad| {
        fs::write(bad.layer.join("layer.json"), "x").unwrap()
    }),
    ("fifo-layer-file", |bad| fifo(&bad.layer.join("layer.json"))),
    ("newer-layer-file", |bad| {
        let newer = "{\"format\": 99, \"checksum\": \"crc:1\"}";
        fs::write(bad.layer.join("layer.json"), newer).unwrap();
    }),
    ("long-name", |bad| {
        fs::write(bad.layer.join("tree").join("n".repeat(255)), "").unwrap();
    }),
];

#[test]
fn a_damaged_container_does_not_affect_others() {
    if !can(&NEEDS) {
        return;
    }
    for (label, damage) in DAMAGES {
        let store = store();
        let (bad, good) = (parts(&store, "bad"), parts(&store, "good"));
        damage(&bad);
        for verb in ["list", "status", "du"] {
            let output = store.cowl([verb]);
            assert!(
                output.out().contains("good"),
                "{label}: {}",
                output.report()
            );
        }
        // The damage is reported. (A file name of 255 bytes is not damage.)
        let check = store.cowl(["check", "--deep"]);
        if label != "long-name" {
            assert_eq!(check.code, 5, "{label}: {}", check.report());
            assert!(!check.out().is_empty(), "{label}: {}", check.report());
        }
        let id = good.layer.file_name().unwrap().to_str().unwrap();
        assert!(!check.out().contains(id), "{label}: {}", check.report());
        let file: serde_json::Value =
            serde_json::from_slice(&fs::read(good.layer.join("layer.json")).unwrap()).unwrap();
        assert!(
            file["digest"].is_string(),
            "{label}: it was not read through"
        );
        // Unreadable objects do not prevent the trash from being emptied.
        let gc = store.cowl(["gc"]);
        assert!([0, 1, 5].contains(&gc.code), "{label}: {}", gc.report());
        let trash = fs::read_dir(store.path().join("trash")).unwrap().count();
        assert_eq!(trash, 0, "{label}: {}", gc.report());
        store.cowl(["list", "good"]).ok();
        store.cowl(["du", "good"]).ok();
        store.cowl(["snapshot", "good"]).ok();
        let mount_point = store.mount("good");
        assert_eq!(
            fs::read_to_string(mount_point.join("new")).unwrap(),
            "new\n"
        );
        store.cowl(["umount", "good"]).ok();
        store.cowl(["clone", "good", "other"]).ok();
        store.cowl(["destroy", "--now", "--yes", "other"]).ok();
        store.cowl(["restore", "good", "snap0"]).ok();
        if label == "link-tree" {
            // Nothing outside the store is shown, measured or mounted as a layer.
            let dir = store.scratch().make("empty");
            let mount = store.cowl(["mount", "bad@snap1", dir.to_str().unwrap()]);
            assert_eq!(mount.code, 5, "{}", mount.report());
            assert_eq!(store.cowl(["ls", "bad@snap1"]).code, 5);
            assert_eq!(store.cowl(["du", "bad"]).code, 5);
        }
    }
}

/// A stale mount in a layer, and an immutable file.
#[test]
fn a_failed_removal_is_reported_and_does_not_prevent_others() {
    let needs = [&NEEDS[..], &[Need::Program("chattr")]].concat();
    if !can(&needs) {
        return;
    }
    let store = store();
    let kept = store.scratch().make("kept");
    fs::write(kept.join("file"), "kept\n").unwrap();
    let trash = store.path().join("trash");
    let [mounted, fixed, plain] = ["layer-a", "layer-b", "layer-c"].map(|name| trash.join(name));
    for dir in [&mounted, &fixed, &plain] {
        fs::create_dir_all(dir.join("tree/d")).unwrap();
        fs::write(dir.join("tree/d/file"), "").unwrap();
    }
    run(
        "mount",
        ["--bind".as_ref(), kept.as_path(), &mounted.join("tree/d")],
    )
    .ok();
    let file = fixed.join("tree/d/file");
    let immutable = run("chattr", ["+i".as_ref(), file.as_path()]).code == 0;
    let gc = store.cowl(["gc"]);
    run("umount", [mounted.join("tree/d")]).ok();
    if immutable {
        run("chattr", ["-i".as_ref(), file.as_path()]).ok();
    }
    assert_eq!(gc.code, 1, "{}", gc.report());
    assert!(gc.err().contains("layer-a/tree/d"), "{}", gc.report());
    if immutable {
        assert!(gc.err().contains("layer-b/tree/d/file"), "{}", gc.report());
        assert!(fixed.try_exists().unwrap());
    }
    assert!(!plain.try_exists().unwrap());
    // The mounted tree is not part of the layer.
    assert_eq!(fs::read_to_string(kept.join("file")).unwrap(), "kept\n");
    store.cowl(["gc"]).ok();
    assert_eq!(fs::read_dir(&trash).unwrap().count(), 0);
}

/// A sync that fails, whichever it is, leaves the change made or not made, and nothing that the store names is
/// missing.
#[test]
fn a_failed_sync_removes_nothing_that_the_change_refers_to() {
    let needs = [Need::Root, Need::Fuse, Need::Program("strace")];
    if !can(&needs) {
        return;
    }
    let store = Store::for_test();
    let root = store.scratch().make("root");
    store.create("web", &root);
    store.cowl(["snapshot", "web", "--name", "first"]).ok();
    let log = store.scratch().join("trace");
    let verbs: [&[&str]; 2] = [
        &["snapshot", "web", "--no-sync"],
        &["restore", "web", "first"],
    ];
    for verb in verbs {
        for number in 1.. {
            let mount_point = store.mount("web");
            fs::write(mount_point.join("file"), number.to_string()).unwrap();
            store.cowl(["umount", "web"]).ok();
            let mut command = std::process::Command::new("strace");
            let inject = format!("inject=fsync:error=EIO:when={number}");
            command
                .args(["-qq", "-o"])
                .arg(&log)
                .args(["-e", "trace=fsync", "-e", &inject])
                .arg(cowl_tests::programs::cowl())
                .arg("--store")
                .arg(store.path())
                .args(verb);
            let done = run_command(command, b"");
            let failed = fs::read_to_string(&log).unwrap().contains("INJECTED");
            store.cowl(["check"]).ok();
            if !failed {
                done.ok();
                assert!(number > 5, "{number}");
                break;
            }
        }
    }
}
