//! Tests of `restore --undo` and `--copy` on a container that is not mounted.

use cowl_tests::command::run_command;

use crate::undo_world::{World, digest_dir};

#[test]
fn restore_and_undo_can_be_undone() {
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
    // Nothing was written since, so there is no further automatic snapshot.
    assert_eq!(world.snapshots(), ["snap0", "auto0"]);
}

#[test]
fn undo_without_writes_restores_the_previous_snapshot() {
    let world = World::new();
    world.ok(&["snapshot", "web"]);
    world.write("file", "two");
    world.ok(&["snapshot", "web"]);
    world.ok(&["restore", "web", "snap0"]);
    assert_eq!(world.snapshots(), ["snap0", "snap1"]);
    // A repeated restore changes nothing, and does not affect the undo.
    world.ok(&["restore", "web", "snap0"]);
    world.ok(&["restore", "web", "--undo"]);
    assert_eq!(world.read("file"), "two");
}

#[test]
fn state_without_a_snapshot_is_retained() {
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
fn impossible_undo_reports_the_reason() {
    let world = World::new();
    let error = world.fails(&["restore", "web", "--undo"], 1);
    assert!(error.contains("cannot undo"), "{error}");
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
fn undo_does_not_depend_on_comments() {
    let world = World::new();
    world.ok(&["snapshot", "web"]);
    world.write("file", "two");
    world.ok(&["restore", "web", "snap0"]);
    world.ok(&["comment", "web@auto0", "mine"]);
    world.ok(&["snapshot", "web", "-m", "before restore of snap0"]);
    world.ok(&["restore", "web", "--undo"]);
    assert_eq!(world.read("file"), "two");
}

#[test]
fn copy_is_a_plain_directory_with_the_complete_state() {
    let world = World::new();
    world.write("etc/new", "new");
    world.ok(&["snapshot", "web"]);
    world.write("file", "two");
    world.ok(&["restore", "web", "snap0", "--copy", "out"]);
    assert_eq!(digest_dir(&world.path("out")), world.at("snap0"));
    assert_eq!(world.read("file"), "two");
    std::fs::create_dir(world.path("empty")).unwrap();
    for (args, code, word) in [
        (
            &["restore", "web", "snap0", "--copy", "out"][..],
            1,
            "already exists",
        ),
        (
            &["restore", "web", "snap0", "--copy", "empty"],
            1,
            "already exists",
        ),
        (
            &["restore", "web", "snap0", "--copy", "no/such/out"],
            1,
            "No such",
        ),
        (
            &["restore", "web", "snap0", "--copy"],
            2,
            "needs a destination",
        ),
        (
            &["restore", "web", "snap0", "new", "--copy", "out2"],
            2,
            "a container and a directory at once",
        ),
        (&["restore", "web", "snap9", "--copy", "out2"], 3, "snap9"),
    ] {
        let message = world.fails(args, code);
        assert!(message.contains(word), "{message}");
    }
    world.ok(&["restore", "web", "snap0", "--copy", "out2", "--dry-run"]);
    let left: Vec<_> = std::fs::read_dir(world.path("")).unwrap().collect();
    assert_eq!(left.len(), 4, "base, store, out, empty: {left:?}");
}

#[test]
fn full_disk_leaves_no_partial_copy() {
    let world = World::new();
    world.write("etc/big", &"x".repeat(100_000));
    world.ok(&["snapshot", "web"]);
    let args = ["restore", "web", "snap0", "--copy", "out"];
    let line = format!(
        "ulimit -f 50; trap '' XFSZ; exec \"$0\" --store \"$1\" {}",
        args.join(" ")
    );
    let mut command = std::process::Command::new("sh");
    command
        .args(["-c", &line])
        .arg(cowl_tests::programs::cowl())
        .arg(world.path("store"))
        .current_dir(world.path(""));
    run_command(command, b"").fails(1, &[]);
    let left: Vec<_> = std::fs::read_dir(world.path("")).unwrap().collect();
    assert_eq!(left.len(), 2, "base and store: {left:?}");
}

#[test]
fn copied_container_shares_no_layer() {
    let world = World::new();
    world.write("etc/new", "new");
    world.ok(&["snapshot", "web"]);
    let state = world.at("snap0");
    world.ok(&["restore", "web", "snap0", "new", "--copy"]);
    world.ok(&["clone", "web", "other", "--copy"]);
    world.ok(&["destroy", "web", "--yes", "--now"]);
    for name in ["new", "other"] {
        let (_, manifest) = world.manifest(name);
        assert_eq!(manifest.stack.len(), 2);
        assert_eq!(world.digest(&manifest.stack), state);
    }
    let layers = std::fs::read_dir(world.path("store/layers")).unwrap();
    assert_eq!(layers.count(), 4, "nothing of web is left");
}
