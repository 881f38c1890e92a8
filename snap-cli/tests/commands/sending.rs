//! Transfers between two stores: `cowl send`, `cowl receive` and `cowl copy`, without mounts.

use std::path::PathBuf;

use cowl::store::manifest::{LayerId, LayerManifest, SnapshotManifest};
use cowl::store::{disk, received};
use cowl::tree::digest;
use cowl_tests::command::{Output, run_command};
use cowl_tests::cowl::Store;
use serde_json::Value;

use crate::library;

/// A store of a test, on a host of its own in the user's view.
pub(crate) struct Side {
    pub(crate) cli: Store,
}

impl Side {
    pub(crate) fn new() -> Self {
        let cli = Store::for_test();
        Self { cli }
    }

    /// Creates the container `web` with three snapshots.
    pub(crate) fn with_web() -> Self {
        Self::with_web_of("one")
    }

    /// Creates the same container with another file in its lowest layer.
    pub(crate) fn with_web_of(file: &str) -> Self {
        let side = Self::new();
        let base = side.cli.beside("base");
        std::fs::create_dir_all(base.join("etc")).unwrap();
        // Content that does not become smaller.
        std::fs::write(base.join("etc/large"), noise(300_000)).unwrap();
        std::fs::write(base.join("etc/file"), file).unwrap();
        side.cli.create("web", &base);
        for round in ["a", "b", "c"] {
            side.write("web", &format!("etc/{round}"), round.as_bytes());
            side.cli.ok(["snapshot", "--no-sync", "web", "-m", round]);
        }
        side.cli.ok(["tag", "web@snap1", "color=blue"]);
        side.cli.ok(["protect", "web@snap1"]);
        side
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        self.cli.cowl(args).ok().json()
    }

    pub(crate) fn store(&self) -> cowl::store::Store {
        library::open(self.cli.path()).unwrap()
    }

    /// Writes into the head of a container that is not mounted.
    pub(crate) fn write(&self, name: &str, path: &str, content: &[u8]) {
        let head = self.json(&["show", name, "--json"])["head"].clone();
        let path = PathBuf::from(head.as_str().unwrap()).join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    pub(crate) fn send(&self, args: &[&str]) -> Vec<u8> {
        self.cli.cowl([&["send"], args].concat()).ok().stdout
    }

    pub(crate) fn receive(&self, args: &[&str], stream: &[u8]) -> Output {
        self.cli.cowl_with([&["receive"], args].concat(), stream)
    }

    /// Returns the names of a container's snapshots, with the digests of their trees.
    pub(crate) fn states(&self, name: &str) -> Vec<(String, String)> {
        let store = self.store();
        let name = cowl::store::name::ContainerName::parse(name).unwrap();
        let (id, record) = store.find(&name).unwrap();
        let of = |stack: &[LayerId]| {
            let view = store.view(stack).unwrap();
            digest(&view, &mut |_| ()).unwrap().to_string()
        };
        let snapshots = record.body.snapshots.iter();
        let mut states: Vec<_> = snapshots
            .map(|known| {
                let state = store.snapshot(id, known.id).unwrap();
                (known.name.to_string(), of(&state.stack))
            })
            .collect();
        states.push((String::new(), of(&record.body.stack)));
        states
    }

    /// Returns what `cowl list` shows of the snapshots, except for the sizes, which depend on the file system.
    pub(crate) fn described(&self, name: &str) -> Vec<Value> {
        let list = self.json(&["list", name, "--json"]);
        let snapshots = list["snapshots"].as_array().unwrap().iter();
        let fields = [
            "name",
            "created",
            "comment",
            "tags",
            "protected",
            "kind",
            "parent",
        ];
        snapshots
            .map(|snapshot| fields.map(|field| snapshot[field].clone()).into())
            .collect()
    }

    /// Returns the numbers of snapshots with an LXC config, and with one that another host has sent.
    pub(crate) fn configs(&self, name: &str) -> (usize, usize) {
        let store = self.store();
        let name = cowl::store::name::ContainerName::parse(name).unwrap();
        let (id, record) = store.find(&name).unwrap();
        let states = record.body.snapshots.iter();
        let states: Vec<_> = states
            .map(|known| store.snapshot(id, known.id).unwrap())
            .collect();
        let count =
            |has: &dyn Fn(&SnapshotManifest) -> bool| states.iter().filter(|s| has(s)).count();
        (
            count(&|state| state.config.is_some()),
            count(&|state| state.received_config.is_some()),
        )
    }

    pub(crate) fn layers(&self) -> Vec<LayerManifest> {
        if !self.cli.path().try_exists().unwrap() {
            return Vec::new();
        }
        let store = self.store();
        let ids = store.layer_ids().unwrap().into_iter();
        ids.map(|id| {
            disk::read::<LayerManifest>(&store.paths().layer_file(id))
                .unwrap()
                .body
        })
        .collect()
    }

    pub(crate) fn waiting(&self) -> usize {
        if !self.cli.path().try_exists().unwrap() {
            return 0;
        }
        received::list(&self.store()).unwrap().len()
    }

    /// Returns whether no command has created anything.
    pub(crate) fn has_no_container(&self) -> bool {
        self.json(&["list", "--json"])["containers"]
            .as_array()
            .unwrap()
            .is_empty()
    }
}

fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(&mut next).take(length).collect()
}

#[test]
fn a_container_is_received_with_its_snapshots() {
    let (a, b) = (Side::with_web(), Side::new());
    a.write("web", "etc/since", b"the last snapshot");
    let stream = a.send(&["web"]);
    // The current state was not in a snapshot.
    assert_eq!(a.described("web").len(), 4);
    for name in ["web", "other"] {
        let args: &[&str] = if name == "web" { &[] } else { &["other"] };
        b.receive(args, &stream).ok();
        assert_eq!(b.states(name), a.states("web"));
        assert_eq!(b.described(name), a.described("web"));
    }
    // The second one shares all layers of the first one, and has a head.
    assert_eq!(b.layers().len(), a.layers().len() + 1);
    assert_eq!(b.waiting(), 0);
    // Nothing has changed since.
    a.send(&["web"]);
    assert_eq!(a.described("web").len(), 4);
    for side in [&a, &b] {
        side.cli.ok(["check", "--deep"]);
    }
    // An export that another version could have written is accepted as well.
    let file = a.cli.beside("web.tar");
    a.cli
        .ok(["export", "web", "--with-snapshots", file.to_str().unwrap()]);
    let third = Side::new();
    third
        .receive(&["third"], &std::fs::read(file).unwrap())
        .ok();
    assert_eq!(third.states("third"), a.states("web"));
}

#[test]
fn a_range_contains_only_new_layers() {
    let (a, b) = (Side::with_web(), Side::new());
    b.receive(&[], &a.send(&["web@..snap0"])).ok();
    assert_eq!(b.described("web").len(), 1);
    let rest = a.send(&["web@snap0..snap2"]);
    assert!(rest.len() < 100_000, "{}", rest.len());
    // In an empty store, and below another name, its base is missing.
    let c = Side::new();
    c.receive(&[], &rest)
        .fails(1, &["lacks the layer", "cowl copy"]);
    assert!(c.has_no_container());
    c.cli
        .cowl_with(["import", "-", "new"], &rest)
        .fails(1, &["cowl receive"]);
    b.receive(&[], &rest).ok();
    assert_eq!(b.described("web"), a.described("web"));
    // The current state does not change.
    let (mut before, now) = (a.states("web"), b.states("web"));
    assert_eq!(now.last(), Some(&(String::new(), now[0].1.clone())));
    before.pop();
    assert_eq!(now[..3], before);
    // A second time, there is nothing to add.
    let again = b.receive(&["--json"], &rest).ok().json();
    assert_eq!(again["present_snapshots"], 2);
    assert_eq!(again["snapshots"], serde_json::json!([]));
    assert_eq!(again["layers"], 0);
    for bad in ["web@snap2..snap0", "web@snap2.."] {
        a.cli.cowl(["send", bad]).fails(1, &["no snapshot"]);
    }
    a.cli.cowl(["send", "web@nothing"]).fails(3, &["nothing"]);
}

#[test]
fn received_snapshots_are_added_to_those_of_the_target() {
    let (a, b) = (Side::with_web(), Side::new());
    b.receive(&[], &a.send(&["web"])).ok();
    // Both continue with the same numbers.
    for (side, text) in [(&a, "here"), (&b, "there")] {
        side.write("web", "etc/changed", text.as_bytes());
        side.cli.ok(["snapshot", "--no-sync", "web", "-m", text]);
        side.cli
            .ok(["snapshot", "--no-sync", "web", "--name", "mine"]);
    }
    let before = a.states("web");
    let own = a.described("web");
    let output = a.receive(&[], &b.send(&["web"])).ok();
    for words in [
        "web@snap4 was sent as snap3",
        "web@mine-2 was sent as mine",
        "cowl restore web mine-2",
    ] {
        assert!(output.err().contains(words), "{}", output.err());
    }
    let now = a.states("web");
    for state in &before {
        assert!(now.contains(state), "{state:?}");
    }
    let sent = b.states("web");
    let state = |states: &[(String, String)], name: &str| {
        states
            .iter()
            .find(|(other, _)| other == name)
            .unwrap()
            .1
            .clone()
    };
    assert_eq!(state(&now, "snap4"), state(&sent, "snap3"));
    assert_ne!(state(&now, "snap4"), state(&now, "snap3"));
    let described = a.described("web");
    assert_eq!(described.len(), own.len() + 2);
    assert!(own.iter().all(|snapshot| described.contains(snapshot)));
    a.cli.ok(["restore", "web", "snap4"]);
    assert_eq!(a.cli.ok(["cat", "web:etc/changed"]), "there");
    // The next number is free.
    a.write("web", "etc/more", b"x");
    assert_eq!(a.cli.ok(["snapshot", "--no-sync", "web"]).trim(), "snap5");
    a.cli.ok(["check", "--deep"]);
    // Only the layer of the change was sent back: each store has one copy of the others.
    let large = |side: &Side| {
        let store = side.store();
        let trees = store.layer_ids().unwrap().into_iter();
        trees
            .filter(|id| {
                store
                    .paths()
                    .layer_tree(*id)
                    .join("etc/large")
                    .try_exists()
                    .unwrap()
            })
            .count()
    };
    assert_eq!((large(&a), large(&b)), (1, 1));
}

#[test]
fn snapshots_of_another_container_are_refused() {
    let (a, b) = (Side::with_web(), Side::with_web());
    let before = b.states("web");
    let stream = a.send(&["web"]);
    b.receive(&[], &stream)
        .fails(1, &["without a layer in common", "under another name"]);
    assert_eq!(b.states("web"), before);
    // It is refused before anything is received.
    assert_eq!((b.waiting(), b.layers().len()), (0, 5));
    b.receive(&["other"], &stream).ok();
    assert_eq!(b.states("other"), a.states("web"));
    assert_eq!(b.waiting(), 0);
    let unchanged = Side::new();
    let base = unchanged.cli.beside("base");
    std::fs::create_dir(&base).unwrap();
    std::fs::write(base.join("f"), "x").unwrap();
    unchanged.cli.create("web", &base);
    let stream = unchanged.send(&["web"]);
    assert_eq!(unchanged.described("web").len(), 0);
    b.receive(&[], &stream).fails(1, &["none were sent"]);
    b.receive(&["third"], &stream).ok();
}

#[test]
fn an_interrupted_transfer_continues_with_the_next_layer() {
    let (a, b) = (Side::with_web(), Side::new());
    let stream = a.send(&["web", "--compress", "none"]);
    assert!(stream.len() > 300_000);
    for cut in [0, 100, 5_000, 100_000] {
        b.receive(&[], &stream[..cut]).fails(1, &[]);
        assert_eq!((b.waiting(), b.layers().len()), (0, 0), "{cut}");
    }
    let near_end = stream.len() - 20_000;
    b.receive(&[], &stream[..near_end])
        .fails(1, &["complete and retained for 7 days"]);
    assert!(b.has_no_container());
    let waiting = b.waiting();
    assert!((1..4).contains(&waiting), "{waiting}");
    assert_eq!(b.layers().len(), waiting);
    // The layers are garbage for nothing but the trash.
    let gc = b.cli.cowl(["gc"]).ok();
    assert!(gc.err().contains("interrupted transfers"), "{}", gc.err());
    assert_eq!(b.waiting(), waiting);
    let have = b.cli.ok(["receive", "--have"]);
    let rest = a
        .cli
        .cowl_with(["send", "web", "--have", "-"], have.as_bytes())
        .ok()
        .stdout;
    assert!(rest.len() < 100_000, "{}", rest.len());
    b.receive(&[], &rest).ok();
    assert_eq!(b.states("web"), a.states("web"));
    assert_eq!(b.waiting(), 0);
    b.cli.ok(["check", "--deep"]);
    // Without the layers, the rest alone is useless.
    let c = Side::new();
    c.receive(&[], &stream[..near_end]).fails(1, &["retained"]);
    // What was destroyed is independent of it.
    c.cli.create("other", &a.cli.beside("base"));
    c.cli.ok(["destroy", "other", "--yes"]);
    let waiting = c.waiting();
    c.cli.ok(["gc", "--empty-trash"]);
    assert_eq!(c.waiting(), waiting);
    c.cli.create("other", &a.cli.beside("base"));
    c.cli.ok(["destroy", "other", "--yes"]);
    c.cli.ok(["gc", "--empty-transfers"]);
    assert_eq!(c.waiting(), 0);
    c.cli.ok(["undelete", "other"]);
    c.cli.ok(["destroy", "other", "--now", "--yes"]);
    assert_eq!((c.waiting(), c.layers().len()), (0, 0));
    c.receive(&[], &rest).fails(1, &["lacks the layer"]);
}

#[test]
fn a_list_of_layers_is_checked() {
    let a = Side::with_web();
    let empty = Side::new();
    assert_eq!(
        empty.cli.ok(["receive", "--have"]),
        "{\"cowl\":1,\"layers\":[]}\n"
    );
    // No layer of a store that never sent anything has an identity.
    assert_eq!(
        a.cli.ok(["receive", "--have"]),
        "{\"cowl\":1,\"layers\":[]}\n"
    );
    for bad in ["", "[]", "{\"cowl\":7,\"layers\":[]}", "\u{1b}[2J\n"] {
        let output = a
            .cli
            .cowl_with(["send", "web", "--have", "-"], bad.as_bytes());
        let error = output.fails(1, &["list of layers"]);
        assert!(error.stdout.is_empty() && !error.err().contains('\u{1b}'));
    }
    a.cli
        .cowl(["send", "web", "--have", "/nonexistent"])
        .fails(1, &["/nonexistent"]);
    // A wrong digest in it is no reason to omit a layer.
    a.send(&["web"]);
    let have = a.cli.ok(["receive", "--have"]);
    let mut claimed: Value = serde_json::from_str(&have).unwrap();
    let layers = claimed["layers"].as_array_mut().unwrap();
    assert_eq!(layers.len(), 4);
    for name in ["web", "new"] {
        assert_eq!(a.cli.ok(["receive", "--have", name]), have);
    }
    for layer in layers {
        layer["digest"] = format!("layer1:{}", "0".repeat(64)).into();
    }
    let send = ["send", "web", "--have", "-"];
    let stream = a
        .cli
        .cowl_with(send, claimed.to_string().as_bytes())
        .ok()
        .stdout;
    Side::new().receive(&[], &stream).ok();
}

#[test]
fn a_layer_that_was_changed_is_not_sent() {
    let (a, b) = (Side::with_web(), Side::new());
    a.send(&["web"]);
    let store = a.store();
    let ids = store.layer_ids().unwrap();
    let large = ids
        .iter()
        .map(|id| store.paths().layer_tree(*id).join("etc/large"));
    let large = large
        .into_iter()
        .find(|path| path.try_exists().unwrap())
        .unwrap();
    let mut content = std::fs::read(&large).unwrap();
    content[7] ^= 1;
    std::fs::write(&large, content).unwrap();
    let stream = a.send(&["web"]);
    b.receive(&[], &stream)
        .fails(1, &["differs from its digest", "cowl check --deep"]);
    assert!(b.has_no_container());
    a.cli.cowl(["check", "--deep"]).fails(5, &[]);
    // The check has found it, and the layer has lost its identity.
    assert!(!a.cli.ok(["receive", "--have"]).is_empty());
    let identities = a
        .layers()
        .iter()
        .filter(|layer| layer.identity.is_some())
        .count();
    assert_eq!(identities, 3);
}

/// A program in place of ssh that runs the command on this machine.
pub(crate) fn ssh(side: &Side, script: &str) -> String {
    let path = side.cli.beside("ssh");
    std::fs::write(&path, format!("#!/bin/sh\n{script}")).unwrap();
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Records the command line, and runs the last word of it in a shell.
pub(crate) const LOCAL: &str =
    "echo \"$@\" >> \"$0.log\"\nwhile [ $# -gt 1 ]; do shift; done\nexec sh -c \"$1\"\n";

#[test]
fn containers_are_copied_in_both_directions() {
    let (a, b) = (Side::with_web(), Side::new());
    let program = ssh(&a, LOCAL);
    let cowl = cowl_tests::programs::cowl();
    let url = format!("ssh://root@there:2222{}", b.cli.path().to_str().unwrap());
    let copy = |args: &[&str]| {
        let mut command = a
            .cli
            .command([&["copy", "--remote", cowl.to_str().unwrap()], args].concat());
        command.env("COWL_SSH", &program);
        run_command(command, b"")
    };
    let output = copy(&["web", &url]).ok();
    assert!(
        output.err().contains("note: sent web: 3 snapshots"),
        "{}",
        output.err()
    );
    assert!(
        output
            .err()
            .contains("remote: note: received web: 3 snapshots"),
        "{}",
        output.err()
    );
    assert_eq!(output.out(), "");
    assert_eq!(b.states("web"), a.states("web"));
    let line = std::fs::read_to_string(format!("{program}.log")).unwrap();
    let store = b.cli.path().display().to_string();
    assert!(line.starts_with("-p 2222 root@there "), "{line}");
    assert!(
        line.contains(&format!("--store {store} receive --negotiate")),
        "{line}"
    );
    // Only what is new, and back.
    b.write("web", "etc/there", b"x");
    b.cli.ok(["snapshot", "--no-sync", "web"]);
    let output = copy(&["--from", &url, "web"]).ok();
    assert!(
        output
            .err()
            .contains("remote: note: sent web: 4 snapshots, 1 layer (4 more"),
        "{}",
        output.err()
    );
    assert!(
        output.err().contains("(3 more were here already), 1 layer"),
        "{}",
        output.err()
    );
    assert_eq!(a.described("web"), b.described("web"));
    // The other host does not choose the local container: here it sends another one than the one it was asked for.
    let other = a.cli.beside("base");
    b.cli.create("db", &other);
    let lying = LOCAL.replace(
        "sh -c \"$1\"",
        "sh -c \"$(echo \"$1\" | sed 's/ web$/ db/')\"",
    );
    std::fs::write(&program, format!("#!/bin/sh\n{lying}")).unwrap();
    copy(&["--from", &url, "web"]).fails(1, &["cannot add snapshots to web"]);
    copy(&["--from", &url, "web", "--as", "asked"]).ok();
    assert_eq!(a.cli.cowl(["show", "db"]).code, 3);
    std::fs::write(&program, format!("#!/bin/sh\n{LOCAL}")).unwrap();
    copy(&["web@snap0", &url, "--as", "first"]).ok();
    assert_eq!(b.described("first").len(), 1);
    for side in [&a, &b] {
        side.cli.ok(["check", "--deep"]);
    }
}
