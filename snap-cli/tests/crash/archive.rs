//! Like `snapshots.rs`, for export, import and flatten.

use crate::web::{at_every_call, at_every_call_after, can};

#[test]
fn flatten_base_survives_a_kill() {
    if can(false) {
        at_every_call(false, &["flatten", "web", "--base"], &["web"]);
    }
}

#[test]
fn mounted_flatten_base_survives_a_kill() {
    if can(true) {
        at_every_call(true, &["flatten", "web", "--base"], &["web"]);
    }
}

#[test]
fn flatten_depth_survives_a_kill() {
    if can(false) {
        at_every_call(false, &["flatten", "web", "--depth", "4"], &["web"]);
    }
}

/// The merge follows the snapshot, and the store is consistent with and without it.
#[test]
fn snapshot_of_a_stack_that_is_too_deep_survives_a_kill() {
    if can(false) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        std::fs::write(&file, "depth_limit = 5\n").unwrap();
        let config = file.to_str().unwrap();
        at_every_call(false, &["--config", config, "snapshot", "web"], &["web"]);
    }
}

#[test]
fn export_survives_a_kill() {
    if can(false) {
        at_every_call(false, &["export", "web", "--with-snapshots", "-"], &["web"]);
    }
}

/// A killed import of an image leaves no container, and its layers are collected.
#[test]
fn import_of_an_image_survives_a_kill() {
    if can(false) {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        let image = image.to_str().unwrap();
        let prepare: [&[&str]; 1] = [&["export", "web", "--oci", image]];
        let import = ["import", image, "new", "--layer-snapshots"];
        at_every_call_after(&prepare, false, &import, &["web", "new"]);
    }
}

#[test]
fn import_survives_a_kill() {
    if can(false) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("whole.tar");
        let file = file.to_str().unwrap();
        let prepare: [&[&str]; 1] = [&["export", "web", "--with-snapshots", file]];
        at_every_call_after(&prepare, false, &["import", file, "new"], &["web", "new"]);
    }
}
