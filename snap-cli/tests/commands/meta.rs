//! Tests of metadata of snapshots, and of lists by metadata: comment, tag, protect, list, show.

use std::path::PathBuf;

use cowl_tests::command::{Output, run_command};
use serde_json::Value;

struct World {
    cli: cowl_tests::cowl::Store,
}

impl World {
    fn new() -> Self {
        let cli = cowl_tests::cowl::Store::for_test();
        let base = cli.beside("base");
        std::fs::create_dir_all(base.join("etc")).unwrap();
        std::fs::write(base.join("etc/file"), "x").unwrap();
        cli.create("web", &base);
        Self { cli }
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.cli.ok(args)).unwrap()
    }

    /// Returns the names of the listed snapshots.
    fn listed(&self, args: &[&str]) -> Vec<String> {
        let args = [&["list", "web", "--format", "{name}"], args].concat();
        self.cli.ok(&args).lines().map(str::to_owned).collect()
    }

    /// Writes a file, so that the next snapshot has another content.
    fn write(&self, name: &str) {
        let manifest = self.json(&["show", "web", "--json"]);
        let head = manifest["head"].as_str().unwrap();
        std::fs::write(PathBuf::from(head).join(name), name).unwrap();
    }
}

#[test]
fn comment_can_come_from_any_source_and_be_changed() {
    let world = World::new();
    let file = world.cli.beside("comment");
    std::fs::write(&file, "from a file\n").unwrap();
    world
        .cli
        .ok(["snapshot", "web", "-c", file.to_str().unwrap()]);
    let comment = || world.json(&["show", "web@snap0", "--json"])["comment"].clone();
    assert_eq!(comment(), "from a file");
    world.cli.ok(["comment", "web@snap0", "from a word"]);
    assert_eq!(comment(), "from a word");

    let piped = ["comment", "web@snap0", "-c", "-"];
    world.cli.cowl_with(piped, b"from a pipe\n").ok();
    assert_eq!(comment(), "from a pipe");

    let edit = |editor: &str| -> Output {
        let mut command = world.cli.command(["comment", "web@snap0"]);
        command.env("VISUAL", "").env("EDITOR", editor);
        run_command(command, b"")
    };
    edit("sed -i s/pipe/editor/").ok();
    assert_eq!(comment(), "from a editor");
    edit("false").fails(1, &[]);
    assert_eq!(comment(), "from a editor");

    world.cli.ok(["comment", "web@snap0", ""]);
    assert_eq!(comment(), "");
    world.cli.refused(["comment", "web", "x"], 2, &["web@SNAP"]);
    world
        .cli
        .refused(["comment", "web@snap1", "x"], 3, &["did you mean snap0?"]);
    // A missing file is reported before a snapshot is created.
    world
        .cli
        .refused(["snapshot", "web", "-c", "/absent"], 1, &["/absent"]);
    assert_eq!(world.listed(&[]), ["snap0"]);
}

#[test]
fn tags_and_protection_can_be_changed() {
    let world = World::new();
    world.cli.ok([
        "snapshot",
        "web",
        "--tag",
        "env=prod",
        "--tag",
        "keep",
        "--protect",
    ]);
    world.cli.ok(["snapshot", "web", "--scheduled"]);
    let shown = world.json(&["show", "web@snap0", "--json"]);
    assert_eq!(
        shown["tags"],
        serde_json::json!({"env": "prod", "keep": ""})
    );
    assert_eq!(shown["protected"], true);
    assert_eq!(world.listed(&["--tag", "env"]), ["snap0"]);
    assert_eq!(
        world.listed(&["--tag", "env=prod", "--tag", "keep"]),
        ["snap0"]
    );
    assert!(world.listed(&["--tag", "env=test"]).is_empty());

    world
        .cli
        .ok(["tag", "web@snap0", "env=test", "--remove", "keep"]);
    assert_eq!(world.listed(&["--tag", "env=test"]), ["snap0"]);
    assert!(world.listed(&["--tag", "keep"]).is_empty());
    world.cli.refused(
        ["tag", "web@snap0", "--remove", "keep"],
        1,
        &["its tags are: env"],
    );
    world
        .cli
        .refused(["tag", "web@snap0", "=x"], 2, &["no key"]);

    world.cli.ok(["protect", "web@snap0", "--off"]);
    world.cli.ok(["protect", "web@snap1"]);
    let protected = world
        .cli
        .ok(["list", "web", "--format", "{name}:{protected}"]);
    assert_eq!(protected, "snap0:false\nsnap1:true\n");
    assert_eq!(world.listed(&["--kind", "scheduled"]), ["snap1"]);
    assert_eq!(world.listed(&["--kind", "manual"]), ["snap0"]);
}

#[test]
fn lists_are_filtered_and_sorted() {
    let world = World::new();
    world.cli.ok([
        "snapshot",
        "web",
        "--name",
        "zero",
        "-m",
        "before the Upgrade",
    ]);
    for name in ["a", "b"] {
        world.write(name);
        world.cli.ok(["snapshot", "web", "-m", name]);
    }
    assert_eq!(world.listed(&[]), ["zero", "snap0", "snap1"]);
    assert_eq!(
        world.listed(&["--sort", "name"]),
        ["snap0", "snap1", "zero"]
    );
    assert_eq!(world.listed(&["--reverse"]), ["snap1", "snap0", "zero"]);
    assert_eq!(world.listed(&["--match", "upgrade"]), ["zero"]);
    assert_eq!(world.listed(&["--match", "snap*"]), ["snap0", "snap1"]);
    assert_eq!(world.listed(&["--since", "1h"]).len(), 3);
    assert!(world.listed(&["--since", "2199-01-01"]).is_empty());
    assert_eq!(world.listed(&["--until", "2199-01-01"]).len(), 3);
    world
        .cli
        .refused(["list", "web", "--since", "x"], 2, &["invalid time"]);
    world
        .cli
        .refused(["list", "web", "--format", "{nmae}"], 2, &["{name}"]);
    world.cli.refused(["list", "--tree"], 2, &["NAME"]);
    let bare = world.cli.ok(["list", "web", "--no-header"]);
    assert_eq!(bare.lines().count(), 3, "{bare}");
    assert!(bare.starts_with("zero "), "{bare}");
    let all = world.json(&["list", "--json"]);
    assert_eq!(all["containers"][0]["snapshots"], 3);
    assert!(
        all["containers"][0]["size"]
            .as_u64()
            .is_some_and(|size| size > 0)
    );
}

#[test]
fn tree_shows_parents() {
    let world = World::new();
    world.cli.ok(["snapshot", "web"]);
    for name in ["a", "b"] {
        world.write(name);
        world.cli.ok(["snapshot", "web"]);
    }
    world.cli.ok(["restore", "web", "snap0"]);
    world.write("c");
    world.cli.ok(["snapshot", "web", "-m", "another way"]);
    let tree = world.cli.ok(["list", "web", "--tree", "--no-header"]);
    let names: Vec<_> = tree
        .lines()
        .map(|line| line.split("  ").next().unwrap())
        .collect();
    assert_eq!(names, ["snap0", "├─ snap1", "│", "snap3", "now"], "{tree}");
}

#[test]
fn show_prints_all_properties() {
    let world = World::new();
    world.cli.ok(["snapshot", "web", "-m", "one"]);
    let text = world.cli.ok(["show", "web@snap0"]);
    for word in ["name", "snap0", "comment", "one", "manual"] {
        assert!(text.contains(word), "{text}");
    }
    let text = world.cli.ok(["show", "web"]);
    assert!(
        text.contains("made from") && text.contains("snap0"),
        "{text}"
    );
    world
        .cli
        .refused(["show", "wbe"], 3, &["did you mean web?"]);
}
