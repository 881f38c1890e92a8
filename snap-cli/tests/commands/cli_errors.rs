//! Wrong input on the command line, as far as it needs no mount: the exit code, a message that names what
//! is wrong, and a store that is the same afterwards, to the last byte.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

struct Store {
    dir: tempfile::TempDir,
}

impl Store {
    /// A store with the container web and its snapshot snap0.
    fn new() -> Self {
        let store = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        std::fs::create_dir_all(store.path("base/etc")).unwrap();
        std::fs::write(store.path("base/etc/file"), "x").unwrap();
        let base = store.path("base");
        store.ok(&["create", "web", "--from", base.to_str().unwrap()]);
        store.ok(&["snapshot", "web"]);
        store
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_cowl"))
            .arg("--store")
            .arg(self.path("store"))
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Everything in the store but its locks, which say who was there last.
    fn content(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut content = BTreeMap::new();
        let mut folders = vec![self.path("store")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                let kind = path.symlink_metadata().unwrap().file_type();
                if kind.is_dir() {
                    folders.push(path.clone());
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
        let output = self.run(args);
        let said = output.stderr.escape_ascii().to_string();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        assert!(output.stdout.is_empty(), "{args:?}: {output:?}");
        assert!(!said.is_empty(), "{args:?} says nothing");
        for word in words {
            assert!(said.contains(word), "{args:?}: no {word:?} in: {said}");
        }
        assert!(self.content() == before, "{args:?} changed the store");
    }
}

#[test]
fn names_that_are_not_there() {
    let store = Store::new();
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
        store.refused(args, 3, &["wbe", "did you mean web?"]);
    }
    store.refused(&["exec", "wbe", "--", "true"], 125, &["wbe"]);
    for args in [
        &["restore", "web", "snap1"][..],
        &["restore", "web", "snap1", "new"],
        &["restore", "web", "snap1", "--dry-run"],
        &["clone", "web@snap1", "new"],
        &["diff", "web@snap1"],
        &["flatten", "web", "snap1.."],
        &["export", "web@snap1", "-"],
    ] {
        store.refused(args, 3, &["snap1", "did you mean snap0?"]);
    }
    store.refused(&["mount", "zebra"], 3, &["zebra", "cowl list"]);
}

#[test]
fn names_that_are_taken() {
    let store = Store::new();
    let base = store.path("base");
    let base = base.to_str().unwrap();
    for args in [
        &["create", "web", "--from", base][..],
        &["clone", "web", "web"],
        &["clone", "web@snap0", "web"],
        &["restore", "web", "snap0", "web"],
    ] {
        store.refused(args, 1, &["web exists already"]);
    }
    store.ok(&["snapshot", "web", "--name", "good"]);
    store.refused(&["snapshot", "web", "--name", "good"], 1, &["good exists"]);
    store.refused(&["snapshot", "web", "--name", "snap9"], 2, &["snap9"]);
    store.refused(&["snapshot", "web", "--name", "auto0"], 2, &["auto0"]);
}

#[test]
fn names_that_can_not_be() {
    let store = Store::new();
    let base = store.path("base").into_os_string();
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
            store.refused(&args, 2, &["t be a", " name: "]);
        }
    }
    let bad = OsStr::from_bytes(b"\xff");
    let message = [
        OsStr::new("snapshot"),
        OsStr::new("web"),
        OsStr::new("-m"),
        bad,
    ];
    store.refused(&message, 2, &["UTF-8"]);
}

#[test]
fn sources_that_can_not_be() {
    let store = Store::new();
    std::fs::write(store.path("text"), "no archive").unwrap();
    std::fs::write(store.path("empty"), "").unwrap();
    for source in ["absent", "text", "empty", "store"] {
        let path = store.path(source);
        store.refused(&["create", "new", "--from", path.to_str().unwrap()], 1, &[]);
    }
    store.refused(&["create", "new", "--from", "-"], 1, &[]);
}

#[test]
fn command_lines_that_can_not_be() {
    let store = Store::new();
    for args in [
        &[][..],
        &["frobnicate"],
        &["create", "new"],
        &["mount"],
        &["mount", "web", "--frobnicate"],
        &["exec", "web"],
        &["restore", "web"],
        &["clone", "web"],
        &["flatten", "web", "snap0"],
        &["flatten", "web", "a..b..c"],
        &["export", "web", "file.zip"],
        &["diff", "web@a@b"],
        &["list", "--wait", "soon"],
        &["destroy", "web"],
    ] {
        store.refused(args, 2, &[]);
    }
    store.refused(&["umount", "web"], 1, &["not mounted"]);
    let folder = store.path("");
    let folder = folder.to_str().unwrap().trim_end_matches('/');
    store.refused(&["export", "web", &format!("{folder}.tar/x.tar")], 1, &[]);
}

#[test]
fn mount_points_that_can_not_be() {
    let store = Store::new();
    for (place, word) in [
        ("absent", "does not exist"),
        ("base/etc/file", "not a folder"),
        ("base", "not empty"),
        ("store/layers", "hide a part of the store"),
    ] {
        let path = store.path(place);
        store.refused(
            &["mount", "web", "--at", path.to_str().unwrap()],
            1,
            &[word],
        );
    }
}

#[test]
fn a_dry_run_changes_nothing() {
    let store = Store::new();
    store.refused(&["destroy", "web", "--dry-run"], 0, &["would"]);
    store.refused(&["restore", "web", "snap0", "--dry-run"], 0, &["would"]);
    store.refused(
        &["restore", "web", "snap0", "new", "--dry-run"],
        0,
        &["would"],
    );
    store.refused(&["flatten", "web", "--dry-run"], 0, &["nothing"]);
}

#[test]
fn a_damaged_store_is_told_and_left_alone() {
    let store = Store::new();
    store.ok(&["clone", "web", "other"]);
    let containers = store.path("store/containers");
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
        store.refused(args, 5, &[name, "checksum"]);
    }
    // The others go on, and its name is still its own.
    store.ok(&["snapshot", "other"]);
    store.ok(&["clone", "other", "new"]);
    assert_eq!(store.run(&["clone", "other", "web"]).status.code(), Some(1));
    let list = store.run(&["list"]);
    assert_eq!(list.status.code(), Some(5));
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
fn a_missing_layer_is_damage() {
    let store = Store::new();
    let layers = store.path("store/layers");
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
        store.refused(args, 5, &["layer"]);
    }
}

#[test]
fn a_store_of_a_newer_version() {
    let store = Store::new();
    let file = store.path("store/store.json");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("\"format\": 1", "\"format\": 2")).unwrap();
    for args in [
        &["list"][..],
        &["status"],
        &["create", "new", "--from", "/"],
        &["snapshot", "web"],
        &["destroy", "web", "--yes"],
    ] {
        store.refused(args, 1, &["format 2", "newer cowl"]);
    }
}

#[test]
fn a_folder_that_is_no_store_is_left_alone() {
    let store = Store::new();
    let home = store.path("base");
    let run = |args: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_cowl"))
            .env("COWL_STORE", &home)
            .args(args)
            .output()
            .unwrap()
    };
    let created = run(&["create", "new", "--from", "/"]);
    assert_eq!(created.status.code(), Some(2), "{created:?}");
    assert_eq!(run(&["mount", "web"]).status.code(), Some(3));
    // Nothing is no error for those who ask what there is.
    let list = run(&["list", "--json"]);
    assert!(list.status.success(), "{list:?}");
    let entries: Vec<_> = std::fs::read_dir(&home).unwrap().collect();
    assert_eq!(entries.len(), 1);
}

#[test]
fn errors_as_json_where_json_is_asked_for() {
    let store = Store::new();
    let output = store.run(&["list", "wbe", "--json"]);
    let error: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(error["error"]["kind"], "not-found");
    assert_eq!(error["error"]["hint"], "did you mean web?");
}

#[test]
fn commands_wait_for_each_other_and_say_for_whom() {
    let store = Store::new();
    let locks = store.path("store/locks");
    let lock = std::fs::read_dir(&locks)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_str().unwrap().contains("container-"))
        .unwrap();
    std::fs::write(&lock, "4711 cowl snapshot web\n").unwrap();
    let held = std::fs::File::open(&lock).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    store.refused(
        &["snapshot", "web", "--wait", "0"],
        4,
        &["pid 4711 (cowl snapshot web)"],
    );
    // A child that another test has forked and that has not exec'd yet shares the lock: closing would not end it.
    rustix::fs::flock(&held, rustix::fs::FlockOperation::Unlock).unwrap();
    store.ok(&["snapshot", "web", "--wait", "0"]);
}

/// Nothing is collected while nobody knows what it named.
#[test]
fn a_container_that_lost_its_manifest_is_no_half_made_one() {
    let store = Store::new();
    std::fs::write(store.path("base/etc/new"), "x").unwrap();
    let file = manifest_of(&store.path("store/containers"), "web");
    let kept = store.path("kept");
    std::fs::rename(&file, &kept).unwrap();
    let name = file.to_str().unwrap();
    for args in [&["gc"][..], &["check"], &["check", "--repair"]] {
        let output = store.run(args);
        let said = format!("{output:?}");
        assert_eq!(output.status.code(), Some(5), "{args:?}: {said}");
        assert!(said.contains(name), "{args:?}: {said}");
    }
    std::fs::rename(&kept, &file).unwrap();
    store.ok(&["check"]);
    store.ok(&["diff", "web@snap0", "web"]);
}

/// What can't be read may be what names the layer that is written to.
#[test]
fn a_change_under_way_that_can_not_be_read_is_not_dropped() {
    let store = Store::new();
    let file = manifest_of(&store.path("store/containers"), "web");
    let next = file.with_file_name("container.json.next");
    std::fs::write(&next, "{\"format\": 99}").unwrap();
    let next_name = next.to_str().unwrap();
    for args in [&["snapshot", "web"][..], &["status", "web"], &["gc"]] {
        let output = store.run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        assert!(
            format!("{output:?}").contains(next_name),
            "{args:?}: {output:?}"
        );
    }
    // A torn one is from before anything relied on it.
    std::fs::write(&next, "{\"form").unwrap();
    store.ok(&["snapshot", "web"]);
    assert!(!next.try_exists().unwrap());
}
