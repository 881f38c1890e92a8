//! A layer that becomes a snapshot's is never written again, whoever still holds the mount and however.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::io::Write;
use std::path::{Path, PathBuf};

use cowl_tests::command;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;

const NEEDS: &[Need] = &[Need::Root, Need::Fuse];

/// A mounted container with one file and one snapshot, and where it is mounted.
fn mounted(store: &Store) -> PathBuf {
    let source = store.scratch().make("source");
    std::fs::write(source.join("file"), "one\n").unwrap();
    store
        .cowl(["create", "web", "--from", source.to_str().unwrap()])
        .ok();
    let place = store.cowl(["mount", "web"]).ok();
    store.cowl(["snapshot", "web"]).ok();
    PathBuf::from(String::from_utf8(place.stdout).unwrap().trim_end())
}

#[test]
fn a_file_open_for_writing_stops_a_snapshot_and_one_open_for_reading_does_not() {
    if !can("a_file_open_for_writing_stops_a_snapshot", NEEDS) {
        return;
    }
    let store = Store::new("in-use-snapshot");
    let mount = mounted(&store);
    let mut writer = std::fs::OpenOptions::new()
        .append(true)
        .open(mount.join("file"))
        .unwrap();
    let pid = std::process::id().to_string();
    store.cowl(["snapshot", "web"]).fails(4, &[&pid]);
    writer.write_all(b"two\n").unwrap();
    drop(writer);
    let reader = std::fs::File::open(mount.join("file")).unwrap();
    store.cowl(["snapshot", "web"]).ok();
    drop(reader);
    assert_eq!(std::fs::read(mount.join("file")).unwrap(), b"one\ntwo\n");
}

/// The unmount itself would succeed: the file is open in a copy of the mount that nobody can see any
/// more.
#[test]
fn a_writer_in_a_copy_of_the_mount_stops_a_restore() {
    if !can("a_writer_in_a_copy_of_the_mount_stops_a_restore", NEEDS) {
        return;
    }
    let store = Store::new("in-use-copy");
    let mount = mounted(&store);
    let copy = store.scratch().make("copy");
    let bind = [Path::new("--bind"), &mount, &copy];
    command::run("mount", bind).ok();
    let mut writer = std::fs::OpenOptions::new()
        .append(true)
        .open(copy.join("file"))
        .unwrap();
    command::run("umount", [Path::new("-l"), &copy]).ok();
    let refused = store.cowl(["restore", "web", "snap0"]);
    assert_eq!(refused.code, 4, "{}", refused.report());
    writer.write_all(b"two\n").unwrap();
    drop(writer);
    // Nothing was lost, and the mount is where it was.
    assert_eq!(std::fs::read(mount.join("file")).unwrap(), b"one\ntwo\n");
    store.cowl(["restore", "web", "snap0"]).ok();
    assert_eq!(std::fs::read(mount.join("file")).unwrap(), b"one\n");
}

/// A process that keeps the mount in a mount namespace of its own, where an unmount of ours does not
/// reach.
#[test]
fn a_process_in_another_mount_namespace_stops_a_restore() {
    let needs = [NEEDS, &[Need::Program("unshare")]].concat();
    if !can(
        "a_process_in_another_mount_namespace_stops_a_restore",
        &needs,
    ) {
        return;
    }
    let store = Store::new("in-use-namespace");
    let mount = mounted(&store);
    std::fs::write(mount.join("file"), "changed\n").unwrap();
    let mut child = std::process::Command::new("unshare")
        .args([
            "-m",
            "--propagation",
            "private",
            "sh",
            "-c",
            "echo there; read line",
        ])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 6];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said).unwrap();
    let refused = store.cowl(["restore", "web", "snap0"]);
    assert_eq!(refused.code, 4, "{}", refused.report());
    assert_eq!(std::fs::read(mount.join("file")).unwrap(), b"changed\n");
    drop(child.stdin.take());
    child.wait().unwrap();
    store.cowl(["restore", "web", "snap0"]).ok();
    assert_eq!(std::fs::read(mount.join("file")).unwrap(), b"one\n");
}
