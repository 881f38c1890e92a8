//! Like `snapshots.rs`, for commands that remove things: removal, retention, the trash, renaming.

use crate::web::{at_every_call, at_every_call_after, can};

#[test]
fn rm_survives_a_kill() {
    if can(false) {
        at_every_call(false, &["rm", "web", "snap0", "snap2"], &["web"]);
    }
}

#[test]
fn mounted_rm_survives_a_kill() {
    if can(true) {
        at_every_call(true, &["rm", "web", "--all", "--yes"], &["web"]);
    }
}

#[test]
fn destroy_for_good_survives_a_kill() {
    if can(false) {
        at_every_call(false, &["destroy", "web", "--yes", "--now"], &["web"]);
    }
}

#[test]
fn undelete_survives_a_kill() {
    if can(false) {
        let destroy: &[&str] = &["destroy", "web", "--yes"];
        at_every_call_after(&[destroy], false, &["undelete", "web"], &["web"]);
        at_every_call_after(
            &[destroy],
            false,
            &["undelete", "web", "other"],
            &["web", "other"],
        );
    }
}

#[test]
fn gc_survives_a_kill() {
    if can(false) {
        let prepare: &[&[&str]] = &[
            &["clone", "web@snap1", "stays"],
            &["destroy", "web", "--yes"],
        ];
        at_every_call_after(prepare, false, &["gc", "--empty-trash"], &["stays"]);
    }
}

#[test]
fn prune_survives_a_kill() {
    if can(false) {
        let args = ["prune", "web", "--keep-last", "1", "--manual"];
        at_every_call(false, &args, &["web"]);
        let save = ["prune", "web", "--keep-daily", "7", "--save"];
        at_every_call(false, &save, &["web"]);
    }
}

#[test]
fn rename_survives_a_kill() {
    if can(false) {
        at_every_call(false, &["rename", "web", "www"], &["web", "www"]);
    }
}

#[test]
fn mounted_prune_survives_a_kill() {
    if can(true) {
        let args = ["prune", "web", "--keep-last", "1", "--manual"];
        at_every_call(true, &args, &["web"]);
    }
}
