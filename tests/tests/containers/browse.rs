//! Snapshots that are mounted to be read.

use std::fs;
use std::path::{Path, PathBuf};

use cowl_tests::command::sh_in;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::killer::kill_both;
use cowl_tests::mount;
use serde_json::Value;

const NEEDS: [Need; 2] = [Need::Root, Need::Fuse];

/// The container web with three snapshots, `file` being the number of each, and "now" since.
fn store() -> Store {
    let store = Store::for_test();
    let source = store.scratch().make("source");
    fs::write(source.join("file"), "base").unwrap();
    store.create("web", &source);
    let mount_point = store.mount("web");
    for number in 0..3 {
        fs::write(mount_point.join("file"), number.to_string()).unwrap();
        store.cowl(["snapshot", "web"]).ok();
    }
    fs::write(mount_point.join("file"), "now").unwrap();
    store.cowl(["umount", "web"]).ok();
    store
}

fn browse(store: &Store, snapshot: &str, name: &str) -> PathBuf {
    let dir = store.scratch().make(name);
    let output = store
        .cowl(["mount", snapshot, dir.to_str().unwrap(), "--ro"])
        .ok()
        .out();
    assert_eq!(Path::new(&output), dir.canonicalize().unwrap());
    dir
}

fn file(mount_point: &Path) -> String {
    fs::read_to_string(mount_point.join("file")).unwrap()
}

fn browsed(store: &Store) -> Vec<(String, String)> {
    let status = store.cowl(["status", "web", "--json"]).ok().json();
    let list = status["browsed"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    list.iter()
        .map(|one| (text(&one["snapshot"]), text(&one["mountpoint"])))
        .collect()
}

/// Returns the number of run-time directories of mounted snapshots that are left.
fn left(store: &Store) -> usize {
    let run = store.run_dirs().into_iter();
    run.flat_map(|dir| fs::read_dir(dir).unwrap())
        .filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_string_lossy().ends_with(".ro")
        })
        .count()
}

#[test]
fn several_snapshots_are_mounted_while_the_container_is_in_use() {
    if !can(&NEEDS) {
        return;
    }
    let store = store();
    let head = store.mount("web");
    let zero = browse(&store, "web@snap0", "zero");
    let again = browse(&store, "web@snap0", "again");
    let two = browse(&store, "web@snap2", "two");
    // Without a mount point, one in the store is used, and it is always the same.
    let own = store.cowl(["mount", "web@snap1"]).ok().out();
    assert_eq!(store.cowl(["mount", "web@snap1"]).ok().out(), own);
    let own = PathBuf::from(own);
    fs::write(head.join("file"), "later").unwrap();
    let all = [&zero, &again, &two, &own, &head].map(|mount_point| file(mount_point));
    assert_eq!(all, ["0", "0", "2", "1", "later"]);
    let refused = fs::write(zero.join("file"), "x").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(30), "a snapshot is read-only");
    assert_eq!(browsed(&store).len(), 4);
    let table = store.cowl(["status"]).ok().out();
    for words in ["web@snap0", "browsed", zero.to_str().unwrap()] {
        assert!(table.contains(words), "no {words} in\n{table}");
    }
    // The container is unmounted, restored and mounted without them.
    store.cowl(["umount", "web"]).ok();
    store.cowl(["restore", "web", "snap1"]).ok();
    assert_eq!(file(&store.mount("web")), "1");
    assert_eq!(file(&two), "2");

    store.cowl(["umount", "web@snap0"]).ok();
    assert!(mount::at(&zero).is_none() && mount::at(&again).is_none());
    store.cowl(["umount", two.to_str().unwrap()]).ok();
    assert_eq!(
        browsed(&store),
        [("snap1".to_owned(), own.to_str().unwrap().to_owned())]
    );
    store.cowl(["umount", "web@snap1"]).ok();
    assert!(!own.try_exists().unwrap(), "its place in the store is gone");
    assert_eq!(left(&store), 0);
    store.cowl(["umount", head.to_str().unwrap()]).ok();
    assert!(mount::at(&head).is_none());
}

#[test]
fn mounted_snapshots_are_not_removed() {
    if !can(&NEEDS) {
        return;
    }
    let store = store();
    let mount_point = browse(&store, "web@snap1", "snapshot");
    store
        .cowl(["rm", "web", "snap1"])
        .fails(4, &["snap1", "cowl umount web@snap1"]);
    store.cowl(["rm", "web", "snap0", "snap2"]).ok();
    store.cowl(["gc"]).ok();
    assert_eq!(file(&mount_point), "1");
    // In use, it is not unmounted, and not destroyed with its container.
    let held = fs::File::open(mount_point.join("file")).unwrap();
    let pid = std::process::id().to_string();
    store
        .cowl(["umount", "web@snap1"])
        .fails(4, &["in use", &pid]);
    store
        .cowl(["destroy", "web", "--yes"])
        .fails(4, &["in use", &pid]);
    assert_eq!(file(&mount_point), "1");
    drop(held);
    store.cowl(["umount", "web@snap1"]).ok();
    store.cowl(["rm", "web", "snap1"]).ok();
    store.cowl(["snapshot", "web"]).ok();
    let mount_point = browse(&store, "web@snap3", "other");
    store.cowl(["destroy", "web", "--yes", "--now"]).ok();
    assert!(mount::at(&mount_point).is_none());
}

#[test]
fn a_dead_daemon_and_a_plain_umount_leave_nothing() {
    if !can(&NEEDS) {
        return;
    }
    let store = store();
    let mount_point = browse(&store, "web@snap0", "snapshot");
    sh_in(Path::new("/"), &format!("umount {}", mount_point.display())).ok();
    mount::wait_until("its daemon ends", || left(&store) == 0);

    let mount_point = browse(&store, "web@snap0", "killed");
    let status = store.cowl(["status", "web", "--json"]).ok().json();
    let pid = status["browsed"][0]["pid"].as_u64().unwrap();
    kill_both(u32::try_from(pid).unwrap());
    mount::wait_until("the mount is dead", || fs::metadata(&mount_point).is_err());
    // The daemon releases its lock shortly after its mount ends.
    mount::wait_until("the next command sees it", || browsed(&store).is_empty());
    assert!(
        mount::at(&mount_point).is_none(),
        "the dead mount is unmounted"
    );
    assert_eq!(left(&store), 0);
    store.cowl(["rm", "web", "snap0"]).ok();

    // The state after a reboot: the run-time directory records a mount, and there is none.
    let run = store.run_dirs().into_iter().next().unwrap();
    let dir = run.join("00000000-0000-4000-8000-000000000000.ro");
    fs::create_dir(&dir).unwrap();
    fs::write(
        dir.join("state.json"),
        format!(
            r#"{{"mount":"00000000-0000-4000-8000-000000000000","pid":1,"boot":"another",
               "mountpoint":{:?},"snapshot":"00000000-0000-4000-8000-000000000001"}}"#,
            mount_point
        ),
    )
    .unwrap();
    assert_eq!(browsed(&store), []);
    assert_eq!(left(&store), 0);
}

#[test]
fn invalid_mounts_of_snapshots_are_refused() {
    if !can(&NEEDS) {
        return;
    }
    let store = store();
    let full = store.scratch().make("full");
    fs::write(full.join("x"), "x").unwrap();
    let full = full.to_str().unwrap();
    store
        .cowl(["mount", "web@snap0", full])
        .fails(1, &["not empty"]);
    store.cowl(["mount", "web@snap9"]).fails(3, &["snap9"]);
    store
        .cowl(["mount", "web", "--ro", "/mnt"])
        .fails(2, &["cowl snapshot web", "/mnt"]);
    store
        .cowl(["umount", "web@snap0"])
        .fails(1, &["web@snap0", "cowl mount web@snap0"]);
    store
        .cowl(["umount", full])
        .fails(3, &["full", "cowl status"]);
    let mount_point = browse(&store, "web@snap0", "snapshot");
    let mount_point = mount_point.to_str().unwrap();
    store
        .cowl(["mount", "web@snap1", mount_point])
        .fails(4, &["another snapshot", mount_point]);
    store.cowl(["umount", mount_point]).ok();
    // A container is mounted at a directory without an option as well.
    assert_eq!(
        store.cowl(["mount", "web", mount_point]).ok().out(),
        mount_point
    );
    store.cowl(["umount", mount_point]).ok();
    assert_eq!(left(&store), 0);
}
