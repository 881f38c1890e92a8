//! `restore --undo` on a container that is not mounted.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

mod undo_world;

use undo_world::World;

#[test]
fn a_restore_is_taken_back_and_that_again() {
    let world = World::new();
    world.ok(&["snapshot", "web"]);
    world.write("file", "two");
    let written = world.now();
    world.ok(&["restore", "web", "snap0"]);
    assert_eq!(world.read("file"), "one");
    let restored = world.now();
    for _ in 0..3 {
        world.ok(&["restore", "web", "--undo"]);
        assert_eq!(world.now(), written);
        world.ok(&["restore", "web", "--undo"]);
        assert_eq!(world.now(), restored);
    }
    // Nothing was written meanwhile, so nothing was kept again.
    assert_eq!(world.snapshots(), ["snap0", "auto0"]);
}

#[test]
fn where_nothing_had_been_written_the_snapshot_it_was_at_comes_back() {
    let world = World::new();
    world.ok(&["snapshot", "web"]);
    world.write("file", "two");
    world.ok(&["snapshot", "web"]);
    world.ok(&["restore", "web", "snap0"]);
    assert_eq!(world.snapshots(), ["snap0", "snap1"]);
    // Once more changes nothing, and does not hide what there is to undo.
    world.ok(&["restore", "web", "snap0"]);
    world.ok(&["restore", "web", "--undo"]);
    assert_eq!(world.read("file"), "two");
}

#[test]
fn what_no_snapshot_holds_any_more_is_kept() {
    let world = World::new();
    world.ok(&["snapshot", "web"]);
    world.write("file", "two");
    world.ok(&["snapshot", "web"]);
    world.ok(&["rm", "web", "snap1"]);
    world.ok(&["restore", "web", "snap0"]);
    assert_eq!(world.read("file"), "one");
    world.ok(&["restore", "web", "--undo"]);
    assert_eq!(world.read("file"), "two");
}

#[test]
fn what_can_not_be_undone_says_why() {
    let world = World::new();
    let error = world.fails(&["restore", "web", "--undo"], 1);
    assert!(error.contains("nothing to undo"), "{error}");
    world.ok(&["snapshot", "web"]);
    world.write("file", "two");
    world.ok(&["restore", "web", "snap0"]);
    world.ok(&["restore", "web", "--undo", "--dry-run"]);
    assert_eq!(world.read("file"), "one");
    world.ok(&["rm", "web", "auto0"]);
    let error = world.fails(&["restore", "web", "--undo"], 3);
    assert!(error.contains("was removed"), "{error}");
    for wrong in [
        &["restore", "web"][..],
        &["restore", "web", "snap0", "--undo"],
    ] {
        world.fails(wrong, 2);
    }
}

#[test]
fn a_comment_says_nothing_about_what_is_undone() {
    let world = World::new();
    world.ok(&["snapshot", "web"]);
    world.write("file", "two");
    world.ok(&["restore", "web", "snap0"]);
    world.ok(&["comment", "web@auto0", "mine"]);
    world.ok(&["snapshot", "web", "-m", "before restore of snap0"]);
    world.ok(&["restore", "web", "--undo"]);
    assert_eq!(world.read("file"), "two");
}
