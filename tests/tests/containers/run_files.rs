//! Where a mount's socket, log and state lie: a running mount is found from every command, and by no other
//! store's.

use std::fs;
use std::os::unix::fs::MetadataExt;
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

/// Every command that has to do with a running mount finds it, and leaves no unfinished file.
fn is_found_by_all(store: &Store, mount_point: &Path, dir: &Path) {
    assert!(dir.join("state.json").is_file());
    assert!(dir.join("sock").try_exists().unwrap());
    let status = store.cowl(["status", "web", "--json"]).ok().json();
    assert_eq!(status["log"], dir.join("log").to_str().unwrap());
    fs::write(mount_point.join("file"), "two\n").unwrap();
    store.cowl(["snapshot", "web"]).ok();
    fs::write(mount_point.join("file"), "three\n").unwrap();
    store.cowl(["restore", "web", "snap0"]).ok();
    assert_eq!(
        fs::read_to_string(mount_point.join("file")).unwrap(),
        "two\n"
    );
    assert_eq!(store.mount("web"), mount_point, "mounted anew where it was");
    store.cowl(["umount", "web"]).ok();
    assert!(mount::at(mount_point).is_none());
    // The daemon's lock goes a moment after its mount.
    mount::wait_until("nothing but the log and the socket is left", || {
        let mut left = fs::read_dir(dir).unwrap();
        left.all(|entry| ["log", "sock"].contains(&entry.unwrap().file_name().to_str().unwrap()))
    });
}

#[test]
fn a_mount_is_found_in_every_runtime_directory() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    let system = run_dir_of(store.path()).unwrap();
    let mount_point = store.mount("web");
    let id = mount_point.file_name().unwrap().to_owned();
    is_found_by_all(&store, &mount_point, &system.join(&id));
    assert!(!store.path().join("run").join(&id).try_exists().unwrap());

    // If /run is unusable, the run-time files are in the store, as in older versions.
    fs::remove_dir_all(&system).unwrap();
    fs::write(&system, "").unwrap();
    let mount_point = store.mount("web");
    fs::remove_file(&system).unwrap();
    is_found_by_all(&store, &mount_point, &store.path().join("run").join(&id));
    let mount_point = store.mount("web");
    assert!(system.join(&id).join("state.json").is_file());
    store.cowl(["umount", "web"]).ok();
    assert!(mount::at(&mount_point).is_none());

    // With the container they go, all of them.
    store.cowl(["destroy", "web", "--yes", "--now"]).ok();
    assert!(!system.join(&id).try_exists().unwrap());
    assert!(!store.path().join("run").join(&id).try_exists().unwrap());
}

#[test]
fn a_copy_of_a_store_does_not_affect_mounts_of_the_original() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    let mount_point = store.mount("web");
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
    assert_eq!(
        fs::read_to_string(mount_point.join("file")).unwrap(),
        "one\n"
    );
    of_copy(&["umount", "web"]);
    assert!(mount::at(&mount_point).is_some());
    assert_eq!(store.mount("web"), mount_point);
    fs::remove_dir_all(run_dir_of(&copy).unwrap()).unwrap();
}

/// If /run is unusable, the run-time files are in the store and are copied with it.
#[test]
fn a_copy_of_a_store_with_run_files_does_not_affect_mounts_of_the_original() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    let system = run_dir_of(store.path()).unwrap();
    drop(store.mount("web"));
    store.cowl(["umount", "web"]).ok();
    fs::remove_dir_all(&system).unwrap();
    fs::write(&system, "").unwrap();
    let mount_point = store.mount("web");
    fs::remove_file(&system).unwrap();
    assert!(!system.try_exists().unwrap());
    let device = || fs::metadata(&mount_point).unwrap().dev();
    let before = device();
    let copy = store.scratch().make("copy");
    let lines = format!(
        "tar -C {} --exclude='./mnt/*' --exclude='./run/*/sock' --xattrs -cf - . | tar -C {} --xattrs -xf -",
        store.path().display(),
        copy.display()
    );
    command::sh(&lines).ok();
    let cowl = cowl_tests::programs::cowl();
    let of_copy = ["--store", copy.to_str().unwrap(), "snapshot", "web"];
    command::run(cowl, of_copy).ok();
    assert_eq!(device(), before);
    fs::write(mount_point.join("file"), "the original's\n").unwrap();
    store.cowl(["umount", "web"]).ok();
}

/// A command in a container that has a boot id of its own, as some container managers give one.
#[test]
fn a_command_with_another_boot_id_does_not_affect_a_running_mount() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    let mount_point = store.mount("web");
    let mounted_snapshot = {
        store.cowl(["snapshot", "web"]).ok();
        let out = store.cowl(["mount", "web@snap0"]).ok().out();
        PathBuf::from(out.trim_end())
    };
    let boot = store.scratch().join("boot");
    fs::write(&boot, "00000000-0000-0000-0000-000000000001\n").unwrap();
    let line = format!(
        "mount --bind {} /proc/sys/kernel/random/boot_id; {} --store {} snapshot web",
        boot.display(),
        cowl_tests::programs::cowl().display(),
        store.path().display()
    );
    command::run(
        "unshare",
        ["-m", "--propagation", "private", "sh", "-euc", &line],
    )
    .ok();
    assert_eq!(store.mount("web"), mount_point);
    assert!(mount::at(&mount_point).is_some());
    assert!(mount::at(&mounted_snapshot).is_some());
    store.cowl(["umount", "web@snap0"]).ok();
    store.cowl(["umount", "web"]).ok();
    assert!(mount::at(&mount_point).is_none());
    assert!(mount::at(&mounted_snapshot).is_none());
}

/// The command that waits for a mount gets an answer, whatever fails in the daemon.
#[test]
fn a_mount_whose_state_cannot_be_written_blocks_no_command() {
    let needs = [Need::Root, Need::Fuse, Need::Program("strace")];
    if !can(&needs) {
        return;
    }
    let store = store();
    let mut command = std::process::Command::new("strace");
    command
        .args(["-DDDqqf", "-o", "/dev/null", "-e", "trace=rename"])
        .args(["-e", "inject=rename:error=ENOSPC"])
        .arg(cowl_tests::programs::cowl())
        .arg("--store")
        .arg(store.path())
        .args(["mount", "web"]);
    let mounted = command::run_command(command, b"").ok().out();
    let mount_point = PathBuf::from(mounted.trim_end());
    assert!(mount::at(&mount_point).is_some());
    mount::unmount_free(&mount_point);
}

/// For example in a mount namespace with another `/run`: the layer that an invisible daemon writes must not become
/// part of a snapshot.
#[test]
fn a_layer_is_not_frozen_below_an_invisible_daemon() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    let mount_point = store.mount("web");
    fs::write(mount_point.join("file"), "written\n").unwrap();
    let system = run_dir_of(store.path()).unwrap();
    let away = system.with_extension("away");
    fs::rename(&system, &away).unwrap();
    let before = store.snapshots("web");
    let other = store.scratch().make("other");
    let mounted = store.cowl(["mount", "web", other.to_str().unwrap()]);
    mounted.fails(4, &["in use by another mount"]);
    store
        .cowl(["snapshot", "web"])
        .fails(4, &["not visible here", "umount"]);
    assert_eq!(store.snapshots("web"), before);
    fs::remove_dir_all(&system).unwrap();
    fs::rename(&away, &system).unwrap();
    fs::write(mount_point.join("file"), "two\n").unwrap();
    store.cowl(["snapshot", "web"]).ok();
    assert_eq!(store.mount("web"), mount_point);
}
