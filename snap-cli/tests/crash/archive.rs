//! Like `snapshots.rs`, for export, import and flatten.

use cowl_tests::conditions;
use cowl_tests::registry::{self, Protection, Registry};

use crate::web::{at_every_call, at_every_call_after, at_every_call_of_receive, can};

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

/// A killed pull leaves no container, a killed update adds all snapshots or none, and a killed push changes no snapshot.
#[test]
fn transfers_with_a_registry_survive_a_kill() {
    if !can(false) || !conditions::can(registry::NEEDS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path(), Protection::default());
    let reference = format!("{}/web", registry.name());
    let pull = ["pull", &reference, "new"];
    let push: &[&str] = &["push", "web", &reference];
    at_every_call_after(&[push], false, &pull, &["web", "new"]);
    // The state that was pushed is in no snapshot any more. The tag is a new one, because this is another container.
    let second = format!("{reference}-second");
    let push: &[&str] = &["push", "web", &second];
    let prepare: [&[&str]; 3] = [push, &["restore", "web", "snap2"], &["rm", "web", "snap3"]];
    let update = ["pull", "--update", &second, "web"];
    at_every_call_after(&prepare, false, &update, &["web"]);
    let other = format!("{reference}-other");
    at_every_call(false, &["push", "web@snap1", &other], &["web"]);
}

#[test]
fn send_survives_a_kill() {
    if can(false) {
        at_every_call(false, &["send", "web"], &["web"]);
    }
}

/// A killed transfer creates no container and adds no snapshot. Its complete layers are retained.
#[test]
fn receive_survives_a_kill() {
    if can(false) {
        at_every_call_of_receive(false);
    }
}

#[test]
fn receive_into_a_container_survives_a_kill() {
    if can(false) {
        at_every_call_of_receive(true);
    }
}
