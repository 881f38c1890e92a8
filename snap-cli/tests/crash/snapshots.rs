//! Killed at any system call that changes something, a command leaves the container as it was before or as it is
//! afterwards, and the next command removes the leftovers (`web.rs`).

use cowl_tests::conditions::{self, Need};

use crate::web::{at_every_call, can, mount_by_the_kernel_at_every_call};

#[test]
fn snapshot_survives_a_kill() {
    if can(false) {
        at_every_call(false, &["snapshot", "web", "-m", "x"], &["web"]);
    }
}

#[test]
fn durable_snapshot_survives_a_kill() {
    if can(false) {
        at_every_call(false, &["snapshot", "web", "--sync"], &["web"]);
    }
}

#[test]
fn restore_survives_a_kill() {
    if can(false) {
        at_every_call(false, &["restore", "web", "snap0"], &["web"]);
    }
}

#[test]
fn clone_survives_a_kill() {
    if can(false) {
        at_every_call(false, &["clone", "web", "web2"], &["web", "web2"]);
        at_every_call(false, &["clone", "web@snap1", "web2"], &["web", "web2"]);
    }
}

#[test]
fn flatten_survives_a_kill() {
    if can(false) {
        at_every_call(false, &["flatten", "web"], &["web"]);
    }
}

#[test]
fn destroy_survives_a_kill() {
    if can(false) {
        at_every_call(false, &["destroy", "web", "--yes"], &["web"]);
    }
}

#[test]
fn mounted_snapshot_survives_a_kill() {
    if can(true) {
        at_every_call(true, &["snapshot", "web"], &["web"]);
    }
}

#[test]
fn mounted_restore_survives_a_kill() {
    if can(true) {
        at_every_call(true, &["restore", "web", "snap1"], &["web"]);
    }
}

#[test]
fn mounts_by_the_kernel_survive_a_kill() {
    if can(true) && conditions::can(&[Need::KernelOverlay]) {
        mount_by_the_kernel_at_every_call();
    }
}

#[test]
fn mounted_flatten_survives_a_kill() {
    if can(true) {
        at_every_call(true, &["flatten", "web", "snap0..snap2"], &["web"]);
    }
}
