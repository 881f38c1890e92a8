//! Tests of invalid input on the command line that need no mount: the exit code, the message, and that the store is
//! unchanged.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use cowl_tests::command::run_command;
use cowl_tests::programs;

struct World {
    cli: cowl_tests::cowl::Store,
}

impl World {
    /// Creates a store with the container web and its snapshot snap0.
    fn new() -> Self {
        let cli = cowl_tests::cowl::Store::for_test();
        let base = cli.beside("base");
        std::fs::create_dir_all(base.join("etc")).unwrap();
        std::fs::write(base.join("etc/file"), "x").unwrap();
        cli.create("web", &base);
        cli.ok(["snapshot", "web"]);
        Self { cli }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cli.beside(name)
    }

    /// Returns the content of all files in the store, except the locks, which name their last holder.
    fn content(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut content = BTreeMap::new();
        let mut dirs = vec![self.path("store")];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                let kind = path.symlink_metadata().unwrap().file_type();
                if kind.is_dir() {
                    dirs.push(path.clone());
                    content.insert(path, Vec::new());
                } else if path.extension() != Some(OsStr::new("lock")) {
                    let bytes = std::fs::read(&path).unwrap();
                    content.insert(path, bytes);
                }
            }
        }
        content
    }

    #[track_caller]
    fn refused<S: AsRef<OsStr> + std::fmt::Debug>(&self, args: &[S], code: i32, words: &[&str]) {
        let before = self.content();
        let output = self.cli.cowl(args).fails(code, words);
        assert!(output.stdout.is_empty(), "{}", output.report());
        assert!(!output.stderr.is_empty(), "{args:?}: no message");
        assert!(self.content() == before, "{args:?} changed the store");
    }
}

#[test]
fn missing_names_are_refused() {
    let world = World::new();
    for args in [
        &["mount", "wbe"][..],
        &["umount", "wbe"],
        &["snapshot", "wbe"],
        &["list", "wbe"],
        &["status", "wbe"],
        &["stats", "wbe"],
        &["diff", "wbe"],
        &["diff", "web", "wbe"],
        &["restore", "wbe", "snap0"],
        &["restore", "wbe", "snap0", "new"],
        &["clone", "wbe", "new"],
        &["flatten", "wbe"],
        &["export", "wbe", "-"],
        &["destroy", "wbe", "--yes"],
    ] {
        world.refused(args, 3, &["wbe", "did you mean web?"]);
    }
    world.refused(&["exec", "wbe", "--", "true"], 125, &["wbe"]);
    for args in [
        &["restore", "web", "snap1"][..],
        &["restore", "web", "snap1", "new"],
        &["restore", "web", "snap1", "--dry-run"],
        &["clone", "web@snap1", "new"],
        &["diff", "web@snap1"],
        &["flatten", "web", "snap1.."],
        &["export", "web@snap1", "-"],
    ] {
        world.refused(args, 3, &["snap1", "did you mean snap0?"]);
    }
    world.refused(&["mount", "zebra"], 3, &["zebra", "cowl list"]);
}

#[test]
fn existing_names_are_refused() {
    let world = World::new();
    let base = world.path("base");
    let base = base.to_str().unwrap();
    for args in [
        &["create", "web", "--from", base][..],
        &["clone", "web", "web"],
        &["clone", "web@snap0", "web"],
        &["restore", "web", "snap0", "web"],
    ] {
        world.refused(args, 1, &["web already exists"]);
    }
    world.cli.ok(["snapshot", "web", "--name", "good"]);
    world.refused(
        &["snapshot", "web", "--name", "good"],
        1,
        &["web@good already exists"],
    );
    world.refused(&["snapshot", "web", "--name", "snap9"], 2, &["snap9"]);
    world.refused(&["snapshot", "web", "--name", "auto0"], 2, &["auto0"]);
}

#[test]
fn invalid_names_are_refused() {
    let world = World::new();
    let base = world.path("base").into_os_string();
    let long = "x".repeat(65);
    let names: [&[u8]; 12] = [
        b"",
        b".",
        b"..",
        b"a/b",
        b"../x",
        b"a..b",
        b"a b",
        b"a\nb",
        b"\xff\xfe",
        b"_x",
        b"caf\xc3\xa9",
        long.as_bytes(),
    ];
    for name in names {
        let name = OsStr::from_bytes(name).to_owned();
        let word = OsString::from;
        for args in [
            vec![word("create"), word("--from"), base.clone(), name.clone()],
            vec![word("mount"), name.clone()],
            vec![word("snapshot"), name.clone()],
            vec![word("snapshot"), word("web"), word("--name"), name.clone()],
            vec![word("clone"), word("web"), name.clone()],
            vec![word("clone"), name.clone(), word("new")],
            vec![word("restore"), word("web"), name.clone()],
            vec![word("restore"), word("web"), word("snap0"), name.clone()],
            vec![word("destroy"), word("--yes"), name.clone()],
        ] {
            world.refused(&args, 2, &["invalid ", " name "]);
        }
    }
    let bad = OsStr::from_bytes(b"\xff");
    let message = [
        OsStr::new("snapshot"),
        OsStr::new("web"),
        OsStr::new("-m"),
        bad,
    ];
    world.refused(&message, 2, &["UTF-8"]);
}

#[test]
fn invalid_sources_are_refused() {
    let world = World::new();
    std::fs::write(world.path("text"), "no archive").unwrap();
    std::fs::write(world.path("empty"), "").unwrap();
    for source in ["absent", "text", "empty", "store"] {
        let path = world.path(source);
        world.refused(&["create", "new", "--from", path.to_str().unwrap()], 1, &[]);
    }
    world.refused(&["create", "new", "--from", "-"], 1, &[]);
}

#[test]
fn invalid_command_lines_are_refused() {
    let world = World::new();
    for args in [
        &[][..],
        &["frobnicate"],
        &["create", "new"],
        &["mount"],
        &["mount", "web", "--frobnicate"],
        &["restore", "web"],
        &["clone", "web"],
        &["flatten", "web", "snap0"],
        &["flatten", "web", "a..b..c"],
        &["export", "web", "file.zip"],
        &["diff", "web@a@b"],
        &["list", "--wait", "soon"],
        &["destroy", "web"],
    ] {
        world.refused(args, 2, &[]);
    }
    world.refused(&["exec", "web"], 2, &["no command to run"]);
    world.refused(&["umount", "web"], 1, &["not mounted"]);
    let dir = world.path("");
    let dir = dir.to_str().unwrap().trim_end_matches('/');
    world.refused(&["export", "web", &format!("{dir}.tar/x.tar")], 1, &[]);
}

#[test]
fn invalid_mount_points_are_refused() {
    let world = World::new();
    for (name, word) in [
        ("absent", "does not exist"),
        ("base/etc/file", "not a directory"),
        ("base", "not empty"),
        ("store/layers", "hide part of the store"),
    ] {
        let path = world.path(name);
        world.refused(
            &["mount", "web", "--at", path.to_str().unwrap()],
            1,
            &[word],
        );
    }
}

#[test]
fn dry_run_changes_nothing() {
    let world = World::new();
    world.refused(&["destroy", "web", "--dry-run"], 0, &["would"]);
    world.refused(&["restore", "web", "snap0", "--dry-run"], 0, &["would"]);
    world.refused(
        &["restore", "web", "snap0", "new", "--dry-run"],
        0,
        &["would"],
    );
    world.refused(&["flatten", "web", "--dry-run"], 0, &["nothing"]);
}

#[test]
fn damaged_store_is_reported_and_not_changed() {
    let world = World::new();
    world.cli.ok(["clone", "web", "other"]);
    let containers = world.path("store/containers");
    let file = manifest_of(&containers, "web");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("\"next_snap\": 1", "\"next_snap\": 7")).unwrap();
    let name = file.to_str().unwrap();
    for args in [
        &["mount", "web"][..],
        &["snapshot", "web"],
        &["restore", "web", "snap0"],
        &["destroy", "web", "--yes"],
    ] {
        world.refused(args, 5, &[name, "checksum"]);
    }
    // Other containers still work, and the name of the damaged one is still in use.
    world.cli.ok(["snapshot", "other"]);
    world.cli.ok(["clone", "other", "new"]);
    world.cli.cowl(["clone", "other", "web"]).fails(1, &[]);
    let list = world.cli.cowl(["list"]);
    assert_eq!(list.code, 5);
    assert!(String::from_utf8(list.stdout).unwrap().contains("other"));
}

fn manifest_of(containers: &Path, name: &str) -> PathBuf {
    let wanted = format!("\"name\": \"{name}\"");
    std::fs::read_dir(containers)
        .unwrap()
        .map(|entry| entry.unwrap().path().join("container.json"))
        .find(|file| std::fs::read_to_string(file).unwrap().contains(&wanted))
        .unwrap()
}

#[test]
fn missing_layer_is_damage() {
    let world = World::new();
    let layers = world.path("store/layers");
    for layer in std::fs::read_dir(&layers).unwrap() {
        let tree = layer.unwrap().path().join("tree");
        std::fs::rename(&tree, tree.with_file_name("elsewhere")).unwrap();
    }
    for args in [
        &["diff", "web", "web@snap0"][..],
        &["restore", "web", "snap0"],
        &["clone", "web@snap0", "new"],
        &["snapshot", "web"],
    ] {
        world.refused(args, 5, &["layer"]);
    }
}

#[test]
fn store_of_a_newer_version_is_refused() {
    let world = World::new();
    let file = world.path("store/store.json");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("\"format\": 1", "\"format\": 2")).unwrap();
    for args in [
        &["list"][..],
        &["status"],
        &["create", "new", "--from", "/"],
        &["snapshot", "web"],
        &["destroy", "web", "--yes"],
    ] {
        world.refused(args, 1, &["format 2", "newer cowl"]);
    }
}

#[test]
fn directory_that_is_not_a_store_is_not_changed() {
    let world = World::new();
    let home = world.path("base");
    let run = |args: &[&str]| {
        let mut command = Command::new(programs::cowl());
        command.env("COWL_STORE", &home).args(args);
        run_command(command, b"")
    };
    run(&["create", "new", "--from", "/"]).fails(2, &[]);
    run(&["mount", "web"]).fails(3, &[]);
    // An empty list is not an error.
    run(&["list", "--json"]).ok();
    let entries: Vec<_> = std::fs::read_dir(&home).unwrap().collect();
    assert_eq!(entries.len(), 1);
}

#[test]
fn errors_are_json_with_the_option_json() {
    let world = World::new();
    let output = world.cli.cowl(["list", "wbe", "--json"]);
    let error: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(error["error"]["kind"], "not-found");
    assert_eq!(error["error"]["hint"], "did you mean web?");
}

#[test]
fn commands_wait_for_each_other_and_name_the_lock_holder() {
    let world = World::new();
    let locks = world.path("store/locks");
    let lock = std::fs::read_dir(&locks)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_str().unwrap().contains("container-"))
        .unwrap();
    std::fs::write(&lock, "4711 cowl snapshot web\n").unwrap();
    let held = std::fs::File::open(&lock).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    world.refused(
        &["snapshot", "web", "--wait", "0"],
        4,
        &["pid 4711 (cowl snapshot web)"],
    );
    // A concurrent test may have forked a child that has not exec'd yet and shares the lock, so closing would not
    // release it.
    rustix::fs::flock(&held, rustix::fs::FlockOperation::Unlock).unwrap();
    world.cli.ok(["snapshot", "web", "--wait", "0"]);
}

/// The layers of a container whose manifest is missing are not collected.
#[test]
fn container_without_manifest_is_not_a_leftover() {
    let world = World::new();
    std::fs::write(world.path("base/etc/new"), "x").unwrap();
    let file = manifest_of(&world.path("store/containers"), "web");
    let kept = world.path("kept");
    std::fs::rename(&file, &kept).unwrap();
    let name = file.to_str().unwrap();
    for args in [&["gc"][..], &["check"], &["check", "--repair"]] {
        let output = world.cli.cowl(args);
        let message = output.report();
        assert_eq!(output.code, 5, "{args:?}: {message}");
        assert!(message.contains(name), "{args:?}: {message}");
    }
    std::fs::rename(&kept, &file).unwrap();
    world.cli.ok(["check"]);
    world.cli.ok(["diff", "web@snap0", "web"]);
}

/// An unreadable pending manifest may reference the current head.
#[test]
fn unreadable_pending_manifest_is_not_discarded() {
    let world = World::new();
    let file = manifest_of(&world.path("store/containers"), "web");
    let next = file.with_file_name("container.json.next");
    std::fs::write(&next, "{\"format\": 99}").unwrap();
    let next_name = next.to_str().unwrap();
    for args in [&["snapshot", "web"][..], &["status", "web"], &["gc"]] {
        let output = world.cli.cowl(args);
        assert_eq!(output.code, 1, "{}", output.report());
        assert!(output.report().contains(next_name), "{}", output.report());
    }
    // A partially written one was never committed, so it is discarded.
    std::fs::write(&next, "{\"form").unwrap();
    world.cli.ok(["snapshot", "web"]);
    assert!(!next.try_exists().unwrap());
}
