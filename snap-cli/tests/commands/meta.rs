//! What people say about snapshots, and finding them by it: comment, tag, protect, list, show.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

struct Store {
    dir: tempfile::TempDir,
}

impl Store {
    fn new() -> Self {
        let store = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        std::fs::create_dir_all(store.path("base/etc")).unwrap();
        std::fs::write(store.path("base/etc/file"), "x").unwrap();
        let base = store.path("base");
        store.ok(&["create", "web", "--from", base.to_str().unwrap()]);
        store
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cowl"));
        command
            .arg("--store")
            .arg(self.path("store"))
            .args(args)
            .env("TZ", "UTC")
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn refused(&self, args: &[&str], code: i32, word: &str) {
        let output = self.run(args);
        let said = output.stderr.escape_ascii().to_string();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(word), "{args:?}: no {word:?} in: {said}");
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }

    /// One field of each snapshot that a list shows.
    fn listed(&self, args: &[&str]) -> Vec<String> {
        let args = [&["list", "web", "--format", "{name}"], args].concat();
        self.ok(&args).lines().map(str::to_owned).collect()
    }

    /// Something that makes the next snapshot another.
    fn write(&self, name: &str) {
        let manifest = self.json(&["show", "web", "--json"]);
        let head = manifest["head"].as_str().unwrap();
        std::fs::write(PathBuf::from(head).join(name), name).unwrap();
    }
}

#[test]
fn a_remark_comes_from_anywhere_and_changes_any_time() {
    let store = Store::new();
    let file = store.path("remark");
    std::fs::write(&file, "from a file\n").unwrap();
    store.ok(&["snapshot", "web", "-c", file.to_str().unwrap()]);
    let said = || store.json(&["show", "web@snap0", "--json"])["comment"].clone();
    assert_eq!(said(), "from a file");
    store.ok(&["comment", "web@snap0", "from a word"]);
    assert_eq!(said(), "from a word");

    let mut piped = store
        .command(&["comment", "web@snap0", "-c", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut piped.stdin.take().unwrap(), b"from a pipe\n").unwrap();
    assert!(piped.wait().unwrap().success());
    assert_eq!(said(), "from a pipe");

    let edit = |editor: &str| {
        let mut command = store.command(&["comment", "web@snap0"]);
        command.env("VISUAL", "").env("EDITOR", editor);
        command.output().unwrap()
    };
    assert!(edit("sed -i s/pipe/editor/").status.success());
    assert_eq!(said(), "from a editor");
    let failed = edit("false");
    assert_eq!(failed.status.code(), Some(1));
    assert_eq!(said(), "from a editor");

    store.ok(&["comment", "web@snap0", ""]);
    assert_eq!(said(), "");
    store.refused(&["comment", "web", "x"], 2, "web@SNAP");
    store.refused(&["comment", "web@snap1", "x"], 3, "did you mean snap0?");
    // A file that is not there is found before anything is made.
    store.refused(&["snapshot", "web", "-c", "/absent"], 1, "/absent");
    assert_eq!(store.listed(&[]), ["snap0"]);
}

#[test]
fn tags_and_protection() {
    let store = Store::new();
    store.ok(&[
        "snapshot",
        "web",
        "--tag",
        "env=prod",
        "--tag",
        "keep",
        "--protect",
    ]);
    store.ok(&["snapshot", "web", "--scheduled"]);
    let shown = store.json(&["show", "web@snap0", "--json"]);
    assert_eq!(
        shown["tags"],
        serde_json::json!({"env": "prod", "keep": ""})
    );
    assert_eq!(shown["protected"], true);
    assert_eq!(store.listed(&["--tag", "env"]), ["snap0"]);
    assert_eq!(
        store.listed(&["--tag", "env=prod", "--tag", "keep"]),
        ["snap0"]
    );
    assert!(store.listed(&["--tag", "env=test"]).is_empty());

    store.ok(&["tag", "web@snap0", "env=test", "--remove", "keep"]);
    assert_eq!(store.listed(&["--tag", "env=test"]), ["snap0"]);
    assert!(store.listed(&["--tag", "keep"]).is_empty());
    store.refused(&["tag", "web@snap0", "--remove", "keep"], 1, "it has: env");
    store.refused(&["tag", "web@snap0", "=x"], 2, "no key");

    store.ok(&["protect", "web@snap0", "--off"]);
    store.ok(&["protect", "web@snap1"]);
    let protected = store.ok(&["list", "web", "--format", "{name}:{protected}"]);
    assert_eq!(protected, "snap0:false\nsnap1:true\n");
    assert_eq!(store.listed(&["--kind", "scheduled"]), ["snap1"]);
    assert_eq!(store.listed(&["--kind", "manual"]), ["snap0"]);
}

#[test]
fn lists_are_filtered_and_sorted() {
    let store = Store::new();
    store.ok(&[
        "snapshot",
        "web",
        "--name",
        "zero",
        "-m",
        "before the Upgrade",
    ]);
    for name in ["a", "b"] {
        store.write(name);
        store.ok(&["snapshot", "web", "-m", name]);
    }
    assert_eq!(store.listed(&[]), ["zero", "snap0", "snap1"]);
    assert_eq!(
        store.listed(&["--sort", "name"]),
        ["snap0", "snap1", "zero"]
    );
    assert_eq!(store.listed(&["--reverse"]), ["snap1", "snap0", "zero"]);
    assert_eq!(store.listed(&["--match", "upgrade"]), ["zero"]);
    assert_eq!(store.listed(&["--match", "snap*"]), ["snap0", "snap1"]);
    assert_eq!(store.listed(&["--since", "1h"]).len(), 3);
    assert!(store.listed(&["--since", "2199-01-01"]).is_empty());
    assert_eq!(store.listed(&["--until", "2199-01-01"]).len(), 3);
    store.refused(&["list", "web", "--since", "x"], 2, "no time");
    store.refused(&["list", "web", "--format", "{nmae}"], 2, "{name}");
    store.refused(&["list", "--tree"], 2, "NAME");
    let bare = store.ok(&["list", "web", "--no-header"]);
    assert_eq!(bare.lines().count(), 3, "{bare}");
    assert!(bare.starts_with("zero "), "{bare}");
    let all = store.json(&["list", "--json"]);
    assert_eq!(all["containers"][0]["snapshots"], 3);
    assert!(
        all["containers"][0]["size"]
            .as_u64()
            .is_some_and(|size| size > 0)
    );
}

#[test]
fn the_tree_shows_what_was_made_from_what() {
    let store = Store::new();
    store.ok(&["snapshot", "web"]);
    for name in ["a", "b"] {
        store.write(name);
        store.ok(&["snapshot", "web"]);
    }
    store.ok(&["restore", "web", "snap0"]);
    store.write("c");
    store.ok(&["snapshot", "web", "-m", "another way"]);
    let tree = store.ok(&["list", "web", "--tree", "--no-header"]);
    let names: Vec<_> = tree
        .lines()
        .map(|line| line.split("  ").next().unwrap())
        .collect();
    assert_eq!(names, ["snap0", "├─ snap1", "│", "snap3", "now"], "{tree}");
}

#[test]
fn show_tells_all() {
    let store = Store::new();
    store.ok(&["snapshot", "web", "-m", "one"]);
    let text = store.ok(&["show", "web@snap0"]);
    for word in ["name", "snap0", "comment", "one", "manual"] {
        assert!(text.contains(word), "{text}");
    }
    let text = store.ok(&["show", "web"]);
    assert!(
        text.contains("made from") && text.contains("snap0"),
        "{text}"
    );
    store.refused(&["show", "wbe"], 3, "did you mean web?");
}
