//! A store on a disk that can't be written any more (errors=remount-ro, a rescue system) can still be read.

use std::path::Path;

use cowl_tests::command;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::images;

#[test]
fn a_store_on_a_read_only_disk_is_listed_and_exported() {
    let needs = [Need::Root, Need::Program("mkfs.ext4")];
    if !can(&needs) {
        return;
    }
    let store = Store::on(|scratch, name| images::ext4_for(1000, scratch, name));
    let source = store.scratch().make("source");
    std::fs::write(source.join("file"), "base").unwrap();
    store.create("web", &source);
    store.cowl(["snapshot", "web", "-m", "kept"]).ok();
    let dir = store.path().parent().unwrap().to_path_buf();
    command::run("mount", [Path::new("-oremount,ro"), &dir]).ok();
    let tar = store.scratch().join("web.tar");
    let tar = tar.to_str().unwrap();
    assert_eq!(store.snapshots("web"), ["snap0"]);
    store.cowl(["list"]).ok();
    store.cowl(["status"]).ok();
    store.cowl(["diff", "web@snap0", "web"]).ok();
    assert_eq!(store.cowl(["cat", "web@snap0:file"]).ok().out(), "base");
    store.cowl(["export", "web@snap0", tar]).ok();
    let listed = command::run("tar", ["-tf", tar]).ok().out();
    assert!(listed.contains("./file"), "{listed}");
    store.cowl(["snapshot", "web"]).fails(1, &["Read-only"]);
    command::run("mount", [Path::new("-oremount,rw"), &dir]).ok();
    store.cowl(["snapshot", "web"]).ok();
}
