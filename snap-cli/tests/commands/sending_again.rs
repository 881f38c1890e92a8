//! Repeated transfers of one container: removed snapshots, and changes of comments, tags and protection.

use cowl_tests::command::{Output, run_command};
use serde_json::json;

use crate::sending::{LOCAL, Side, ssh};

fn names(side: &Side) -> Vec<String> {
    let described = side.described("web");
    let names = described
        .iter()
        .map(|snapshot| snapshot[0].as_str().unwrap().to_owned());
    names.collect()
}

/// Two stores, and the options with which `cowl copy` on A reaches B.
struct Hosts {
    a: Side,
    b: Side,
    ssh: String,
    url: String,
}

impl Hosts {
    /// A has three snapshots of `web`, and B has received them.
    fn new() -> Self {
        let (a, b) = (Side::with_web(), Side::new());
        let (ssh, url) = (ssh(&a, LOCAL), format!("ssh://b{}", b.cli.path().display()));
        let hosts = Self { a, b, ssh, url };
        hosts.copy(&["web", &hosts.url]).ok();
        hosts
    }

    fn copy(&self, args: &[&str]) -> Output {
        let cowl = cowl_tests::programs::cowl();
        let mut command = self
            .a
            .cli
            .command(["copy", "--remote", cowl.to_str().unwrap()]);
        command.args(args).env("COWL_SSH", &self.ssh);
        run_command(command, b"")
    }
}

#[test]
fn snapshots_that_were_removed_are_not_sent_again() {
    let hosts = Hosts::new();
    let (a, b, url) = (&hosts.a, &hosts.b, hosts.url.as_str());
    b.cli.ok(["rm", "web@snap0", "--yes"]);
    b.cli.ok(["rm", "web@snap2", "--yes"]);
    a.write("web", "etc/d", b"d");
    a.cli.ok(["snapshot", "--no-sync", "web"]);
    let output = hosts.copy(&["web", url]).ok();
    let words =
        "not sent, because they were removed there: snap0, snap2; to receive them again: --again";
    assert!(output.err().contains(words), "{}", output.report());
    assert_eq!(names(b), ["snap1", "snap3"]);
    // A stream contains them.
    let received = b.receive(&["--json"], &a.send(&["web"])).ok().json();
    assert_eq!(received["removed_snapshots"], json!(["snap0", "snap2"]));
    assert_eq!(
        (&received["present_snapshots"], &received["snapshots"]),
        (&json!(2), &json!([]))
    );
    let have = b.cli.ok(["receive", "--have", "web"]);
    let rest = a
        .cli
        .cowl_with(["send", "web", "--have", "-"], have.as_bytes())
        .ok();
    assert!(
        rest.err().contains("removed there: snap0, snap2"),
        "{}",
        rest.err()
    );
    b.receive(&[], &rest.stdout).ok();
    assert_eq!(names(b), ["snap1", "snap3"]);
    // One that is named is sent, and with the option all are. Numbers are never reused.
    hosts.copy(&["web@snap2", url]).ok();
    assert_eq!(names(b), ["snap1", "snap4", "snap3"]);
    hosts.copy(&["web", url, "--again"]).ok();
    assert_eq!(names(b), ["snap5", "snap1", "snap4", "snap3"]);
    let found: Vec<_> = b
        .states("web")
        .into_iter()
        .map(|(_, digest)| digest)
        .collect();
    for (name, digest) in a.states("web") {
        assert!(name.is_empty() || found.contains(&digest), "{name}");
    }
    // They are remembered by another name of the container, too.
    b.cli.ok(["rm", "web@snap5", "--yes"]);
    b.cli.ok(["rename", "web", "copy"]);
    let output = hosts.copy(&["web", url, "--as", "copy"]).ok();
    assert!(
        output.err().contains("removed there: snap0;"),
        "{}",
        output.err()
    );
    for side in [a, b] {
        side.cli.ok(["check", "--deep"]);
    }
}

/// Nothing is left to send, and the layers of what was removed are not sent.
#[test]
fn all_snapshots_can_be_removed() {
    let hosts = Hosts::new();
    let b = &hosts.b;
    b.cli.ok(["protect", "--off", "web@snap1"]);
    for name in ["snap0", "snap1", "snap2"] {
        b.cli.ok(["rm", &format!("web@{name}"), "--yes"]);
    }
    let output = hosts.copy(&["web", &hosts.url]).ok();
    assert!(output.err().contains("0 snapshots"), "{}", output.err());
    assert_eq!(names(b), [""; 0]);
    // The current state of B, and everything that it needs, is still there.
    assert_eq!(b.cli.ok(["cat", "web:etc/c"]), "c");
    b.cli.ok(["check", "--deep"]);
    // A new container knows nothing of it.
    b.cli.ok(["destroy", "web", "--now", "--yes"]);
    hosts.copy(&["web", &hosts.url]).ok();
    assert_eq!(names(b), ["snap0", "snap1", "snap2"]);
}

/// A new container would have another state than the one that was sent.
#[test]
fn no_container_is_created_without_its_current_state() {
    let hosts = Hosts::new();
    let (a, b) = (&hosts.a, &hosts.b);
    b.cli.ok(["rm", "web@snap2", "--yes"]);
    let have = b.cli.ok(["receive", "--have", "web"]);
    let send = ["send", "web", "--have", "-"];
    let stream = a.cli.cowl_with(send, have.as_bytes()).ok().stdout;
    let words = ["snapshots that were removed", "--have"];
    b.receive(&["other"], &stream).fails(1, &words);
    b.cli
        .ok(["destroy", "web", "--now", "--yes", "--protected"]);
    b.receive(&[], &stream).fails(1, &words);
    assert!(b.has_no_container());
    // The list without a name works for a new container.
    let have = b.cli.ok(["receive", "--have"]);
    let stream = a.cli.cowl_with(send, have.as_bytes()).ok().stdout;
    b.receive(&[], &stream).ok();
    assert_eq!(b.states("web"), a.states("web"));
}

/// The current state of the target does not have the layers of the removed snapshots either.
#[test]
fn nothing_is_sent_if_all_snapshots_were_removed() {
    let hosts = Hosts::new();
    let b = &hosts.b;
    b.cli.ok(["protect", "--off", "web@snap1"]);
    b.cli.ok(["restore", "web", "snap0"]);
    let list = b.described("web");
    for name in list.iter().map(|snapshot| snapshot[0].as_str().unwrap()) {
        b.cli.ok(["rm", &format!("web@{name}"), "--yes"]);
    }
    b.cli.ok(["gc", "--empty-trash"]);
    let output = hosts.copy(&["web", &hosts.url]).ok();
    assert!(
        output.err().contains("sent web: 0 snapshots, 0 layers"),
        "{}",
        output.err()
    );
    assert_eq!(names(b), [""; 0]);
}

#[test]
fn layers_of_removed_snapshots_are_not_sent() {
    let hosts = Hosts::new();
    let (a, b) = (&hosts.a, &hosts.b);
    // A state that no later one contains.
    a.write("web", "etc/only", &[7; 5000]);
    a.cli.ok(["snapshot", "--no-sync", "web"]);
    a.cli.ok(["restore", "web", "snap2"]);
    hosts.copy(&["web", &hosts.url]).ok();
    b.cli.ok(["rm", "web@snap3", "--yes"]);
    b.cli.ok(["gc", "--empty-trash"]);
    let before = b.layers().len();
    let output = hosts.copy(&["web", &hosts.url]).ok();
    assert!(
        output.err().contains("sent web: 3 snapshots, 0 layers"),
        "{}",
        output.err()
    );
    assert_eq!(b.layers().len(), before);
}

#[test]
fn changes_of_comments_tags_and_protection_are_sent() {
    let hosts = Hosts::new();
    let (a, b, url) = (&hosts.a, &hosts.b, hosts.url.as_str());
    a.cli.ok(["comment", "web@snap0", "better"]);
    a.cli.ok(["tag", "web@snap1", "shape=round", "size=1"]);
    a.cli.ok(["protect", "--off", "web@snap1"]);
    a.cli.ok(["protect", "web@snap2"]);
    let output = hosts.copy(&["web", url]).ok();
    for words in [
        "web@snap0 was changed where it was sent from: comment",
        "web@snap1 was changed where it was sent from: tags, protection removed",
        "web@snap2 was changed where it was sent from: protection added",
        "of these, comments, tags or protection were changed there: 3",
    ] {
        assert!(output.err().contains(words), "{}", output.report());
    }
    assert_eq!(b.described("web"), a.described("web"));
    let unchanged = b.receive(&["--json"], &a.send(&["web"])).ok().json();
    assert_eq!(unchanged["changed_snapshots"], json!([]));
    // What was changed here remains.
    b.cli.ok(["comment", "web@snap0", "mine"]);
    b.cli.ok(["tag", "web@snap1", "color=green"]);
    b.cli.ok(["protect", "web@snap1"]);
    // Already protected: now by this store.
    b.cli.ok(["protect", "web@snap2"]);
    let before = b.described("web");
    a.cli.ok(["comment", "web@snap0", "best"]);
    a.cli.ok(["tag", "web@snap1", "color=white", "size=2"]);
    // The tags of B may decide what is pruned there.
    a.cli.ok(["tag", "web@snap1", "--remove", "shape"]);
    a.cli.ok(["protect", "web@snap1"]);
    a.cli.ok(["protect", "--off", "web@snap2"]);
    // Each change that is not applied is reported once.
    let retained = |output: &Output| -> Vec<String> {
        let lines = output.err();
        let ends = lines
            .lines()
            .filter_map(|line| line.split_once("but remains as it is here: "));
        ends.map(|(line, what)| format!("{}: {what}", &line[line.find("web@").unwrap()..][..9]))
            .collect()
    };
    let output = hosts.copy(&["web", url]).ok();
    let expected = [
        "web@snap0: comment",
        "web@snap1: tags",
        "web@snap2: protection",
    ];
    assert_eq!(retained(&output), expected, "{}", output.report());
    a.cli.ok(["protect", "--off", "web@snap1"]);
    let json = b.receive(&["--json"], &a.send(&["web"])).ok().json();
    assert_eq!(json["retained_snapshots"], json!(["snap1"]));
    let output = hosts.copy(&["web", url]).ok();
    assert_eq!(retained(&output), [""; 0], "{}", output.report());
    assert_eq!(b.described("web"), before);
    // And it travels back to A, which has not changed these since.
    a.cli.ok(["protect", "web@snap0"]);
    hosts.copy(&["--from", url, "web"]).ok();
    b.cli.ok(["comment", "web@snap2", "from B"]);
    let output = hosts.copy(&["--from", url, "web"]).ok();
    assert!(
        output.err().contains("web@snap2 was changed"),
        "{}",
        output.err()
    );
    let comments: Vec<_> = a.described("web").iter().map(|s| s[2].clone()).collect();
    assert_eq!(json!(comments), json!(["best", "b", "from B"]));
    assert_eq!(a.described("web")[0][4], true);
}
