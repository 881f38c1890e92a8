//! The location of a mount's socket, log and state: every command on the store finds a running mount, and commands on
//! other stores do not.

use std::fs;
use std::path::{Path, PathBuf};

use cowl_tests::command;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::{Store, run_dir_of};
use cowl_tests::mount;

const NEEDS: &[Need] = &[Need::Root, Need::Fuse];

fn store() -> Store {
    let store = Store::for_test();
    let source = store.scratch().make("source");
    fs::write(source.join("file"), "one\n").unwrap();
    store.create("web", &source);
    store
}

/// Verifies that every command that concerns a running mount finds it, and that no temporary file remains.
fn is_found_by_all(store: &Store, place: &Path, dir: &Path) {
    assert!(dir.join("state.json").is_file());
    assert!(dir.join("sock").try_exists().unwrap());
    let status = store.cowl(["status", "web", "--json"]).ok().json();
    assert_eq!(status["log"], dir.join("log").to_str().unwrap());
    fs::write(place.join("file"), "two\n").unwrap();
    store.cowl(["snapshot", "web"]).ok();
    fs::write(place.join("file"), "three\n").unwrap();
    store.cowl(["restore", "web", "snap0"]).ok();
    assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "two\n");
    assert_eq!(store.mount("web"), place, "mounted anew where it was");
    store.cowl(["umount", "web"]).ok();
    assert!(mount::at(place).is_none());
    // The daemon releases its lock shortly after the mount ends.
    mount::wait_until("nothing but the log and the socket is left", || {
        let mut left = fs::read_dir(dir).unwrap();
        left.all(|entry| ["log", "sock"].contains(&entry.unwrap().file_name().to_str().unwrap()))
    });
}

#[test]
fn a_mount_is_found_wherever_its_files_lie() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    let system = run_dir_of(store.path()).unwrap();
    let place = store.mount("web");
    let id = place.file_name().unwrap().to_owned();
    is_found_by_all(&store, &place, &system.join(&id));
    assert!(!store.path().join("run").join(&id).try_exists().unwrap());

    // Directories that are used where root cannot use /run, and that older versions used.
    fs::remove_dir_all(&system).unwrap();
    fs::write(&system, "").unwrap();
    let place = store.mount("web");
    fs::remove_file(&system).unwrap();
    is_found_by_all(&store, &place, &store.path().join("run").join(&id));
    let place = store.mount("web");
    assert!(system.join(&id).join("state.json").is_file());
    store.cowl(["umount", "web"]).ok();
    assert!(mount::at(&place).is_none());

    // They are removed with the container.
    store.cowl(["destroy", "web", "--yes", "--now"]).ok();
    assert!(!system.join(&id).try_exists().unwrap());
    assert!(!store.path().join("run").join(&id).try_exists().unwrap());
}

#[test]
fn a_copy_of_a_store_leaves_the_mounts_of_the_original_alone() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    let place = store.mount("web");
    let copy = store.scratch().join("copy");
    let mnt = store.path().join("mnt");
    let lines = format!(
        "tar -C {} --exclude=./mnt/* --xattrs -cf - . | tar -C {} --xattrs -xf -",
        store.path().display(),
        store.scratch().make("copy").display()
    );
    command::sh(&lines).ok();
    assert!(mnt.is_dir());
    let of_copy = |args: &[&str]| {
        let mut all = vec!["--store", copy.to_str().unwrap()];
        all.extend(args);
        command::run(cowl_tests::programs::cowl(), all).ok()
    };
    assert!(of_copy(&["status", "web", "--json"]).json()["mountpoint"].is_null());
    let other = PathBuf::from(of_copy(&["mount", "web"]).out().trim_end());
    fs::write(other.join("file"), "the copy's\n").unwrap();
    assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "one\n");
    of_copy(&["umount", "web"]);
    assert!(mount::at(&place).is_some());
    assert_eq!(store.mount("web"), place);
    fs::remove_dir_all(run_dir_of(&copy).unwrap()).unwrap();
}

/// A layer that a daemon writes to is not frozen, even if the daemon is not visible (in a mount namespace with
/// another `/run`).
#[test]
fn a_layer_is_not_frozen_below_a_daemon_that_cannot_be_seen() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    let place = store.mount("web");
    fs::write(place.join("file"), "written\n").unwrap();
    let system = run_dir_of(store.path()).unwrap();
    let away = system.with_extension("away");
    fs::rename(&system, &away).unwrap();
    let before = store.snapshots("web");
    let other = store.scratch().make("other");
    let mounted = store.cowl(["mount", "web", other.to_str().unwrap()]);
    mounted.fails(4, &["in use by another mount"]);
    store
        .cowl(["snapshot", "web"])
        .fails(4, &["not known here", "umount"]);
    assert_eq!(store.snapshots("web"), before);
    fs::remove_dir_all(&system).unwrap();
    fs::rename(&away, &system).unwrap();
    fs::write(place.join("file"), "two\n").unwrap();
    store.cowl(["snapshot", "web"]).ok();
    assert_eq!(store.mount("web"), place);
}
