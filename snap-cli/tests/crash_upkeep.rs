//! The same as `crash.rs` for the verbs that take things away: removal, retention, the trash, renaming.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod crash_world;

use crash_world::{at_every_call, can};

#[test]
fn rm() {
    if can("crash_upkeep::rm", false) {
        at_every_call(false, &["rm", "web", "snap0", "snap2"], &["web"]);
    }
}

#[test]
fn mounted_rm() {
    if can("crash_upkeep::mounted_rm", true) {
        at_every_call(true, &["rm", "web", "--all", "--yes"], &["web"]);
    }
}
