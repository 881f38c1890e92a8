//! Tests of `undo`, and of `restore` of single paths, on a container that is not mounted.

use crate::undo_world::World;

/// Creates a store whose container has all kinds of changes since snap0.
fn changed() -> World {
    let world = World::new();
    let base = world.path("more");
    std::fs::create_dir_all(base.join("gone/deep")).unwrap();
    std::fs::create_dir(base.join("moves")).unwrap();
    for (name, text) in [
        ("file", "one"),
        ("gone/deep/x", "x"),
        ("moves/inner", "inner"),
        ("becomes-dir", "file"),
        ("a", "linked"),
    ] {
        std::fs::write(base.join(name), text).unwrap();
    }
    std::fs::hard_link(base.join("a"), base.join("gone/b")).unwrap();
    std::os::unix::fs::symlink("gone", base.join("link")).unwrap();
    world.ok(&["destroy", "web", "--yes", "--now"]);
    world.ok(&["create", "web", "--from", base.to_str().unwrap()]);
    world.ok(&["snapshot", "web"]);
    world.edit(|fs| {
        fs.remove("gone/deep/x");
        fs.rmdir("gone/deep");
        fs.remove("gone/b");
        fs.rmdir("gone");
        fs.rename("moves", "moved");
        fs.write("moved/inner", "changed");
        fs.remove("becomes-dir");
        fs.mkdir("becomes-dir");
        fs.write("becomes-dir/new", "new");
        fs.write("file", "two");
        fs.write("added", "added");
    });
    world
}

#[test]
fn undo_restores_everything_exactly() {
    let world = changed();
    let before = world.now();
    let message = world.ok(&["undo", "web", "--dry-run"]);
    for line in [
        "bring back /gone",
        "bring back /gone/deep/x",
        "rename back /moved -> /moves",
        "put back /moves/inner",
        "put back /becomes-dir",
        "put back /file",
        "remove /added",
    ] {
        // Files in a renamed directory are printed with their current path.
        let line = line.replace("back /moves/inner", "back /moved/inner");
        assert!(
            message.lines().any(|other| other == line),
            "{line}: {message}"
        );
    }
    assert_eq!(world.now(), before);
    assert_eq!(world.ok(&["undo", "web"]), message);
    assert_eq!(world.now(), world.at("snap0"));
    assert_eq!(world.snapshots(), ["snap0", "auto0"]);
    assert_eq!(world.ok(&["diff", "web"]), "");
    // A repeated undo has no effect.
    assert_eq!(world.ok(&["undo", "web"]), "");
    assert_eq!(world.snapshots(), ["snap0", "auto0"]);
    world.ok(&["restore", "web", "--undo"]);
    assert_eq!(world.now(), before);
    world.ok(&["restore", "web", "--undo"]);
    assert_eq!(world.now(), world.at("snap0"));
}

#[test]
fn only_given_paths_are_undone() {
    let world = changed();
    let json = world.ok(&["undo", "web", "snap0", "--json", "--", "/file", "added"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["kept_as"], "auto0");
    assert_eq!(json["changes"].as_array().unwrap().len(), 2);
    assert_eq!(world.read("file"), "one");
    let diff = world.ok(&["diff", "web@snap0", "web"]);
    assert!(
        !diff.contains("/file") && !diff.contains("/added"),
        "{diff}"
    );
    assert!(
        diff.contains("D /gone") && diff.contains("R /moves"),
        "{diff}"
    );
    // The old path of a rename is restored, and the new path is not changed.
    world.ok(&["undo", "web", "--", "moves"]);
    assert_eq!(world.read("moves/inner"), "inner");
    assert_eq!(world.read("moved/inner"), "changed");
    // A removed parent directory is restored with a path in it.
    world.ok(&["restore", "web", "snap0", "--", "gone/deep/x"]);
    assert_eq!(world.read("gone/deep/x"), "x");
    let diff = world.ok(&["diff", "web@snap0", "web"]);
    assert!(
        diff.contains("D /gone/b") && !diff.contains("deep"),
        "{diff}"
    );
}

#[test]
fn given_paths_are_restored() {
    let world = changed();
    world.ok(&["restore", "web", "snap0", "--dry-run", "--", "gone", "a"]);
    assert_eq!(world.snapshots(), ["snap0"]);
    world.ok(&["restore", "web", "snap0", "--", "gone", "a"]);
    let out = world.export("web", "out");
    let ino = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(out.join(name)).unwrap().ino()
    };
    assert_eq!(ino("a"), ino("gone/b"), "one file again");
    let message = world.fails(&["restore", "web", "snap0", "--", "added"], 3);
    assert!(message.contains("--delete"), "{message}");
    let message = world.fails(&["restore", "web", "snap0", "--", "moves/iner"], 3);
    assert!(message.contains("did you mean /moves/inner?"), "{message}");
    let message = world.fails(&["restore", "web", "snap0", "--", "link/deep"], 3);
    assert!(message.contains("link"), "{message}");
    world.fails(&["restore", "web", "snap0", "--", "../x"], 2);
    world.fails(&["restore", "web", "snap0", "new", "--", "file"], 2);
    world.ok(&["restore", "web", "snap0", "--delete", "--", "added"]);
    let diff = world.ok(&["diff", "web@snap0", "web"]);
    assert!(!diff.contains("added"), "{diff}");
    world.ok(&["restore", "web", "--undo"]);
    assert_eq!(world.read("added"), "added");
    world.assert_clean();
}

#[test]
fn without_a_snapshot_undo_restores_the_initial_content() {
    let world = World::new();
    let began = world.now();
    world.edit(|fs| fs.write("file", "two"));
    world.ok(&["undo", "web"]);
    assert_eq!(world.now(), began);
    world.fails(&["undo", "web", "snap7"], 3);
    world.fails(&["undo", "nosuch"], 3);
}
