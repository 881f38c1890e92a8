//! The same as `crash.rs` for what brings containers in and out, and merges their layers.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod crash_world;

use crash_world::{at_every_call, at_every_call_after, can};

#[test]
fn flatten_base() {
    if can("crash_archive::flatten_base", false) {
        at_every_call(false, &["flatten", "web", "--base"], &["web"]);
    }
}

#[test]
fn mounted_flatten_base() {
    if can("crash_archive::mounted_flatten_base", true) {
        at_every_call(true, &["flatten", "web", "--base"], &["web"]);
    }
}

#[test]
fn flatten_depth() {
    if can("crash_archive::flatten_depth", false) {
        at_every_call(false, &["flatten", "web", "--depth", "4"], &["web"]);
    }
}

#[test]
fn export() {
    if can("crash_archive::export", false) {
        at_every_call(false, &["export", "web", "--with-snapshots", "-"], &["web"]);
    }
}

#[test]
fn import() {
    if can("crash_archive::import", false) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("whole.tar");
        let file = file.to_str().unwrap();
        let prepare: [&[&str]; 1] = [&["export", "web", "--with-snapshots", file]];
        at_every_call_after(&prepare, false, &["import", file, "new"], &["web", "new"]);
    }
}
