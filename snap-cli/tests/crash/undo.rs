//! Like `snapshots.rs`, for commands that undo changes.

use crate::web::{at_every_call, at_every_call_after, at_every_call_path_by_path, can};

#[test]
fn restore_undo_survives_a_kill() {
    if can(false) {
        let restored: &[&[&str]] = &[&["restore", "web", "snap0"]];
        at_every_call_after(restored, false, &["restore", "web", "--undo"], &["web"]);
    }
}

#[test]
fn mounted_restore_undo_survives_a_kill() {
    if can(true) {
        let restored: &[&[&str]] = &[&["restore", "web", "snap0"]];
        at_every_call_after(restored, true, &["restore", "web", "--undo"], &["web"]);
    }
}

#[test]
fn restore_of_a_state_that_a_snapshot_holds_survives_a_kill() {
    if can(false) {
        let taken: &[&[&str]] = &[&["snapshot", "web"]];
        at_every_call_after(taken, false, &["restore", "web", "snap1"], &["web"]);
    }
}

#[test]
fn copied_container_survives_a_kill() {
    if can(false) {
        let copy = ["restore", "web", "snap0", "new", "--copy"];
        at_every_call(false, &copy, &["web", "new"]);
    }
}

#[test]
fn undo_survives_a_kill() {
    if can(false) {
        at_every_call(false, &["undo", "web", "snap0"], &["web"]);
    }
}

#[test]
fn restore_of_paths_survives_a_kill() {
    if can(false) {
        // With --delete the directory is restored completely, including its times, so that the result is deterministic.
        let args = ["restore", "web", "snap0", "--delete", "--", "etc"];
        at_every_call(false, &args, &["web"]);
    }
}

#[test]
fn mounted_undo_survives_a_kill() {
    if can(true) {
        at_every_call_path_by_path(&["undo", "web", "snap0"]);
    }
}

#[test]
fn mounted_restore_of_paths_survives_a_kill() {
    if can(true) {
        at_every_call_path_by_path(&["restore", "web", "snap0", "--", "etc"]);
    }
}
