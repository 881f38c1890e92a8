//! Destroyed containers can be restored completely, and are deleted on request or when they expire; containers can be
//! renamed.

use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;

fn store() -> Store {
    let store = Store::for_test();
    let source = store.scratch().make("source");
    std::fs::write(source.join("base"), "base\n").unwrap();
    store.create("web", &source);
    store.cowl(["snapshot", "web", "-m", "a remark"]).ok();
    store
}

fn layers(store: &Store) -> usize {
    std::fs::read_dir(store.path().join("layers"))
        .unwrap()
        .count()
}

fn list(store: &Store) -> Vec<String> {
    let list = store.cowl(["list", "--json"]).ok().json();
    let list = list["containers"].as_array().unwrap().iter();
    list.map(|one| one["name"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_destroyed_container_is_restored_by_undelete() {
    let store = store();
    let before = store.cowl(["list", "web", "--json"]).ok().out();
    let shown = store.cowl(["export", "web", "-"]).ok().stdout;
    let output = store.cowl(["destroy", "web", "--yes"]).ok();
    assert!(
        output.err().contains("cowl undelete web"),
        "{}",
        output.report()
    );
    assert!(list(&store).is_empty());
    store.cowl(["mount", "web"]).fails(3, &["web"]);
    store.cowl(["gc"]).ok();
    let gone = store.cowl(["undelete", "--list", "--json"]).ok().json();
    assert_eq!(gone["containers"][0]["name"], "web");
    assert_eq!(gone["containers"][0]["snapshots"], 1);
    store
        .cowl(["undelete", "wbe"])
        .fails(3, &["did you mean web?"]);
    store.cowl(["undelete", "web"]).ok();
    assert_eq!(store.cowl(["list", "web", "--json"]).ok().out(), before);
    assert_eq!(store.cowl(["export", "web", "-"]).ok().stdout, shown);
    store.cowl(["undelete", "web"]).fails(3, &["web"]);
}

#[test]
fn undelete_refuses_a_name_that_is_in_use() {
    let store = store();
    store.cowl(["destroy", "web", "--yes"]).ok();
    let source = store.scratch().join("source");
    store.create("web", &source);
    store
        .cowl(["undelete", "web"])
        .fails(1, &["web already exists", "cowl undelete web NEW"]);
    store
        .cowl(["undelete", "web", "web"])
        .fails(1, &["already exists"]);
    store.cowl(["undelete", "web", "old"]).ok();
    assert_eq!(list(&store), ["old", "web"]);
    assert_eq!(store.snapshots("old"), ["snap0"]);
    assert!(store.snapshots("web").is_empty());
    // Of two containers with one name, the one destroyed last is listed first. Each can be selected by its id.
    store.cowl(["destroy", "web", "--yes"]).ok();
    store.cowl(["rename", "old", "web"]).ok();
    store.cowl(["destroy", "web", "--yes"]).ok();
    let gone = store.cowl(["undelete", "-l", "--json"]).ok().json();
    let ids = gone["containers"].as_array().unwrap();
    assert_eq!(ids.len(), 2);
    store
        .cowl(["undelete", ids[0]["id"].as_str().unwrap(), "one"])
        .ok();
    store.cowl(["undelete", "web", "two"]).ok();
    assert_eq!(list(&store), ["one", "two"]);
}

#[test]
fn destroyed_containers_are_removed_at_once_or_when_they_expire() {
    let store = store();
    store.cowl(["clone", "web@snap0", "other"]).ok();
    assert_eq!(layers(&store), 3);
    store.cowl(["destroy", "web", "--yes", "--now"]).ok();
    assert_eq!(layers(&store), 2);
    store.cowl(["undelete", "web"]).fails(3, &["web"]);
    store
        .cowl(["destroy", "other", "--yes", "--keep", "1h"])
        .ok();
    store.cowl(["list"]).ok();
    assert_eq!(layers(&store), 2);
    store.cowl(["undelete", "other"]).ok();
    store
        .cowl(["destroy", "other", "--yes", "--keep", "0s"])
        .ok();
    store.cowl(["list"]).ok();
    assert_eq!(layers(&store), 0);
    for bad in ["", "7", "-7d", "soon"] {
        store.create("new", &store.scratch().join("source"));
        let keep = format!("--keep={bad}");
        store
            .cowl(["destroy", "new", "--yes", &keep])
            .fails(2, &["span"]);
        store.cowl(["destroy", "new", "--yes", "--now"]).ok();
    }
}

#[test]
fn gc_empties_the_trash_on_request() {
    let store = store();
    store.cowl(["destroy", "web", "--yes"]).ok();
    let tell = store
        .cowl(["gc", "--empty-trash", "--dry-run", "--json"])
        .ok()
        .json();
    assert_eq!(tell["stores"][0]["containers"], 1);
    assert_eq!(tell["stores"][0]["freed"]["layers"], 2);
    assert_eq!(layers(&store), 2);
    store.cowl(["gc", "--dry-run"]).ok();
    assert_eq!(layers(&store), 2);
    let output = store.cowl(["gc", "--empty-trash"]).ok();
    assert!(output.err().contains("freed "), "{}", output.report());
    assert_eq!(layers(&store), 0);
    let output = store.cowl(["gc"]).ok();
    assert!(
        output.err().contains("nothing to remove"),
        "{}",
        output.report()
    );
}

#[test]
fn protected_snapshots_prevent_destroy() {
    let store = store();
    store.cowl(["protect", "web@snap0"]).ok();
    store
        .cowl(["destroy", "web", "--yes"])
        .fails(1, &["snap0 is protected", "--protected"]);
    assert_eq!(list(&store), ["web"]);
    store.cowl(["destroy", "web", "--yes", "--protected"]).ok();
    assert!(list(&store).is_empty());
}

#[test]
fn containers_and_snapshots_can_be_renamed() {
    let store = store();
    store.cowl(["rename", "web", "www"]).ok();
    assert_eq!(store.snapshots("www"), ["snap0"]);
    store.cowl(["list", "web"]).fails(3, &["web"]);
    store.cowl(["clone", "www", "web"]).ok();
    store
        .cowl(["rename", "web", "www"])
        .fails(1, &["www already exists"]);
    store.cowl(["rename", "web", "web"]).fails(2, &["web"]);
    store.cowl(["rename", "web", "a/b"]).fails(2, &["a/b"]);
    store
        .cowl(["rename", "wbe", "x"])
        .fails(3, &["did you mean web?"]);
    store.cowl(["rename", "www@snap0", "first"]).ok();
    assert_eq!(store.snapshots("www"), ["first"]);
    // The name is available for another container.
    store.cowl(["rename", "web", "db"]).ok();
    store.create("web", &store.scratch().join("source"));
}

#[test]
fn a_mounted_container_can_be_renamed() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = store();
    let mount_point = store.mount("web");
    std::fs::write(mount_point.join("new"), "x").unwrap();
    store.cowl(["rename", "web", "www"]).ok();
    assert_eq!(store.mount("www"), mount_point);
    assert_eq!(std::fs::read(mount_point.join("new")).unwrap(), b"x");
    store.cowl(["snapshot", "www"]).ok();
    store.cowl(["umount", "www"]).ok();
}
