//! Durable and settling snapshots: which process syncs them, their state after a reboot, and the effects of a failed
//! sync.

use std::path::Path;
use std::process::Command;

use cowl_tests::command::{Output, run_command};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::mount::{unmount_free, wait_until};
use cowl_tests::programs;

const NEEDS: [Need; 2] = [Need::Root, Need::Fuse];

/// A store with the container `web`.
fn web() -> Store {
    let store = Store::for_test();
    let root = store.scratch().make("root");
    std::fs::create_dir(root.join("etc")).unwrap();
    std::fs::write(root.join("etc/file"), "old").unwrap();
    store.create("web", &root);
    store
}

fn state(store: &Store, snapshot: &str) -> String {
    let listed = store
        .cowl(["list", "web", "--format", "{name} {state}"])
        .ok()
        .out();
    let line = listed
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{snapshot} ")));
    line.unwrap_or_else(|| panic!("no {snapshot}: {listed}"))
        .to_owned()
}

fn wait_durable(store: &Store, snapshot: &str) {
    wait_until(&format!("{snapshot} is durable"), || {
        state(store, snapshot) == "durable"
    });
}

/// Changes the current state of an unmounted container.
fn change(store: &Store, text: &str) {
    let root = store.mount("web");
    std::fs::write(root.join("etc/file"), text).unwrap();
    store.cowl(["umount", "web"]).ok();
}

/// Runs cowl in a mount namespace with another boot id, as after a reboot.
fn after_crash(store: &Store, args: &[&str]) -> Output {
    let boot = store.scratch().join("boot");
    std::fs::write(&boot, "00000000-0000-0000-0000-000000000001\n").unwrap();
    let mut command = Command::new("unshare");
    command
        .args(["-m", "--propagation", "private", "sh", "-euc"])
        .arg("mount --bind \"$0\" /proc/sys/kernel/random/boot_id; exec \"$@\"")
        .arg(&boot)
        .arg(programs::cowl())
        .arg("--store")
        .arg(store.path())
        .args(args);
    run_command(command, b"")
}

/// Runs cowl with `how` for strace, whose output goes to a file; daemons that it starts are followed.
fn traced(store: &Store, how: &[&str], log: &Path, args: &[&str]) -> Output {
    let mut command = Command::new("strace");
    command.args(["-DDDqqf", "-o"]).arg(log).args(how);
    command
        .arg(programs::cowl())
        .arg("--store")
        .arg(store.path());
    command.args(args);
    run_command(command, b"")
}

#[test]
fn a_snapshot_settles_in_the_background() {
    if !can(&NEEDS) {
        return;
    }
    let store = web();
    store.cowl(["snapshot", "web"]).ok();
    wait_durable(&store, "snap0");
    let root = store.mount("web");
    std::fs::write(root.join("etc/file"), "new").unwrap();
    store.cowl(["snapshot", "web"]).ok();
    wait_durable(&store, "snap1");
    let status = store.cowl(["status", "web", "--json"]).ok().json();
    assert_eq!(
        (&status["settling"], &status["incomplete"]),
        (&0.into(), &0.into())
    );
    // The state that a restore replaces is a snapshot like any other.
    std::fs::write(root.join("etc/file"), "newer").unwrap();
    store.restore("web", "snap0");
    wait_durable(&store, "auto0");
    store.cowl(["umount", "web"]).ok();
}

#[test]
fn a_snapshot_settles_only_after_a_sync() {
    if !can(&NEEDS) {
        return;
    }
    let store = web();
    let take = |how: &str| {
        let root = store.mount("web");
        std::fs::write(root.join("etc/file"), how).unwrap();
        store.cowl(["snapshot", "web", how]).ok().out()
    };
    let one = take("--no-sync");
    assert_eq!(state(&store, &one), "settling");
    let listed = store.cowl(["list", "web"]).ok().out();
    assert!(listed.contains("(settling)"), "{listed}");
    let shown = store.cowl(["show", &format!("web@{one}"), "--json"]).ok();
    assert_eq!(shown.json()["state"], "settling");
    // A synced snapshot makes the snapshots below it durable.
    let two = take("--sync");
    assert_eq!(
        (state(&store, &one), state(&store, &two)),
        ("durable".into(), "durable".into())
    );
    for verb in [&["check"][..], &["gc"], &["umount", "web"]] {
        let snapshot = take("--no-sync");
        assert_eq!(state(&store, &snapshot), "settling");
        store.cowl(verb).ok();
        assert_eq!(state(&store, &snapshot), "durable", "{verb:?}");
    }
}

#[test]
fn a_snapshot_freezes_then_syncs_then_is_marked_durable() {
    let needs = [Need::Root, Need::Fuse, Need::Program("strace")];
    if !can(&needs) {
        return;
    }
    let store = web();
    let root = store.mount("web");
    std::fs::write(root.join("etc/file"), "new").unwrap();
    let log = store.scratch().join("trace");
    let calls = ["-e", "trace=syncfs,rename,renameat,renameat2"];
    traced(&store, &calls, &log, &["snapshot", "web", "--sync"]).ok();
    // strace continues to write after the traced process has exited.
    let commit = "container.json\"";
    wait_until("the trace has all calls", || {
        let text = std::fs::read_to_string(&log).unwrap();
        text.matches(commit).count() >= 2
    });
    let text = std::fs::read_to_string(&log).unwrap();
    let calls: Vec<_> = text
        .lines()
        .filter_map(|line| match line {
            line if line.contains(commit) => Some("commit"),
            // The syncfs of the mount writes back mapped pages; since Linux 6.16 it does not wait for them.
            line if line.contains("syncfs") => Some("sync"),
            _ => None,
        })
        .collect();
    let freeze = calls.iter().position(|call| *call == "commit").unwrap();
    assert_eq!(calls[freeze..], ["commit", "sync", "commit"], "{text}");
    store.cowl(["umount", "web"]).ok();
}

#[test]
fn an_unsynced_snapshot_is_incomplete_after_a_reboot() {
    if !can(&NEEDS) {
        return;
    }
    let store = web();
    change(&store, "new");
    store.cowl(["snapshot", "web", "--sync"]).ok();
    change(&store, "newer");
    store.cowl(["snapshot", "web", "--no-sync"]).ok();
    let cowl = |args: &[&str]| after_crash(&store, args);
    let tar = store.scratch().join("out.tar");
    let tar = tar.to_str().unwrap();
    let dir = store.scratch().join("dir");
    let dir = dir.to_str().unwrap();

    let listed = cowl(&["list", "web", "--format", "{name} {state}"])
        .ok()
        .out();
    assert_eq!(listed, "snap0 durable\nsnap1 incomplete");
    for checked in [cowl(&["check"]).ok(), cowl(&["check", "--deep"]).ok()] {
        assert_eq!(checked.out().matches("web@snap1 is incomplete").count(), 1);
        assert!(!checked.out().contains("damaged"), "{}", checked.report());
    }
    let refused: [&[&str]; 9] = [
        &["restore", "web", "snap1"],
        &["restore", "web", "snap1", "--", "/etc/file"],
        &["restore", "web", "snap1", "other"],
        &["restore", "web", "snap1", "--copy", dir],
        &["undo", "web", "snap1"],
        &["clone", "web@snap1", "other"],
        &["clone", "web@snap1", "other", "--copy"],
        &["export", "web@snap1", tar],
        &["export", "web", tar, "--with-snapshots"],
    ];
    for args in refused {
        cowl(args).fails(1, &["web@snap1 is incomplete", "--force"]);
    }
    assert!(!Path::new(dir).try_exists().unwrap() && !Path::new(tar).try_exists().unwrap());
    // Reading it is allowed, with a warning.
    let read = cowl(&["cat", "web@snap1:/etc/file"]).ok();
    assert_eq!(
        (read.out().as_str(), read.err().contains("is incomplete")),
        ("newer", true)
    );

    // States that are based on it are reported as incomplete, too.
    cowl(&["clone", "web@snap1", "other", "--force"]).ok();
    let shown = cowl(&["show", "other", "--json"]).ok().json();
    assert_eq!(
        (&shown["state"], &shown["cloned_from"]),
        (&"incomplete".into(), &"web@snap1".into())
    );
    cowl(&["clone", "other", "third"]).fails(1, &["other is incomplete", "web@snap1"]);
    cowl(&["export", "web@snap1", tar, "--force"]).ok();
    let archive = std::fs::read(tar).unwrap();
    let note = b"comment=web@snap1 is incomplete";
    assert!(archive.windows(note.len()).any(|part| part == note));
    cowl(&["create", "plain", "--from", tar]).ok();
    cowl(&["export", "web", tar, "--with-snapshots", "--force"]).ok();
    cowl(&["import", tar, "back"]).ok();
    let listed = store
        .cowl(["list", "back", "--format", "{name} {state}"])
        .ok();
    assert_eq!(listed.out(), "snap0 durable\nsnap1 incomplete");

    // A snapshot that is taken now is complete, whatever the layers below it; a merge preserves the marker.
    cowl(&["undo", "web", "snap0"]).ok();
    cowl(&["snapshot", "web", "--sync"]).ok();
    cowl(&["flatten", "web"]).ok();
    let listed = cowl(&["list", "web", "--format", "{name} {state}"])
        .ok()
        .out();
    assert_eq!(listed, "snap0 durable\nsnap1 incomplete\nsnap2 durable");

    let repaired = cowl(&["check", "--repair"]).ok();
    assert_eq!(repaired.out().matches("(accepted as it is)").count(), 3);
    for args in [&["check"][..], &["check", "--deep"]] {
        let clean = cowl(args).ok();
        assert_eq!(clean.out(), "", "{}", clean.report());
    }
    cowl(&["restore", "web", "snap1"]).ok();
    assert_eq!(cowl(&["cat", "web:/etc/file"]).ok().out(), "newer");
}

#[test]
fn a_killed_daemon_makes_nothing_incomplete() {
    if !can(&NEEDS) {
        return;
    }
    let store = web();
    let root = store.mount("web");
    std::fs::write(root.join("etc/file"), "new").unwrap();
    store.cowl(["snapshot", "web", "--no-sync"]).ok();
    store.kill_daemon("web");
    // The next command remounts, and the new daemon completes the sync.
    wait_durable(&store, "snap0");
    assert_eq!(store.cowl(["check"]).ok().out(), "");
    store.cowl(["umount", "web"]).ok();
}

#[test]
fn a_failed_sync_is_reported_and_no_later_one_hides_it() {
    let needs = [Need::Root, Need::Fuse, Need::Program("strace")];
    if !can(&needs) {
        return;
    }
    let store = web();
    change(&store, "new");
    let log = store.scratch().join("trace");
    let fail = ["-e", "trace=syncfs", "-e", "inject=syncfs:error=EIO"];
    let taken = traced(&store, &fail, &log, &["snapshot", "web", "--sync"]);
    taken.fails(
        1,
        &[
            "web@snap0 was taken, but is not durable",
            "Input/output error",
        ],
    );
    let listed = store.cowl(["list", "web", "--json"]).ok().json();
    let one = &listed["snapshots"][0];
    assert_eq!(one["state"], "settling");
    assert!(
        one["sync_error"]
            .as_str()
            .unwrap()
            .contains("Input/output error")
    );
    assert!(
        store
            .cowl(["list", "web"])
            .ok()
            .out()
            .contains("(settling, sync failed)")
    );
    assert!(
        store
            .cowl(["status", "web"])
            .ok()
            .err()
            .contains("web@snap0 is not durable")
    );
    // The kernel does not retry a failed writeback, so states that are based on it are incomplete as well.
    change(&store, "newer");
    store
        .cowl(["snapshot", "web", "--sync"])
        .fails(1, &["web@snap1 was taken, but is not durable"]);
    store
        .cowl(["restore", "web", "snap0"])
        .fails(1, &["--force"]);
    let checked = store.cowl(["check"]).ok();
    assert_eq!(
        checked.out().matches("is not durable").count(),
        2,
        "{}",
        checked.report()
    );
    store.cowl(["check", "--repair"]).ok();
    assert_eq!(store.cowl(["check"]).ok().out(), "");
    assert_eq!(
        (state(&store, "snap0"), state(&store, "snap1")),
        ("durable".into(), "durable".into())
    );

    // In a daemon.
    let mount_point = traced(&store, &fail, &log, &["mount", "web"]).ok().out();
    std::fs::write(Path::new(&mount_point).join("etc/file"), "newest").unwrap();
    store.cowl(["snapshot", "web"]).ok();
    wait_until("the daemon reports it", || {
        let listed = store.cowl(["list", "web"]).ok().out();
        listed
            .lines()
            .any(|line| line.starts_with("snap2") && line.contains("sync failed"))
    });
    store.cowl(["umount", "web"]).ok();
}

#[test]
fn settling_snapshots_can_be_removed_merged_and_destroyed() {
    if !can(&NEEDS) {
        return;
    }
    let store = web();
    for text in ["one", "two", "three"] {
        change(&store, text);
        store.cowl(["snapshot", "web", "--no-sync"]).ok();
    }
    store.cowl(["flatten", "web"]).ok();
    store.cowl(["rm", "web@snap0"]).ok();
    store.cowl(["clone", "web@snap1", "other"]).ok();
    store.cowl(["destroy", "web", "--yes"]).ok();
    store.cowl(["undelete", "web"]).ok();
    assert_eq!(store.cowl(["cat", "web@snap1:/etc/file"]).ok().out(), "two");
    assert_eq!(store.cowl(["check", "--deep"]).ok().out(), "");
    assert_eq!(
        (state(&store, "snap1"), state(&store, "snap2")),
        ("durable".into(), "durable".into())
    );
    // Concurrent commands: each syncs its own layers.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| store.cowl(["snapshot", "web", "--wait", "60"]).ok());
        }
    });
    for number in 3..7 {
        wait_durable(&store, &format!("snap{number}"));
    }
}

/// A descriptor that is opened after an error was reported to another program would never see it.
#[test]
fn the_last_sync_of_a_daemon_uses_a_descriptor_from_before_the_mount() {
    let needs = [Need::Root, Need::Fuse, Need::Program("strace")];
    if !can(&needs) {
        return;
    }
    let store = web();
    let log = store.scratch().join("trace");
    let calls = ["-e", "trace=openat,exit_group"];
    let mounted = traced(&store, &calls, &log, &["mount", "web"]).ok().out();
    let daemon = store.daemon("web");
    let layers = format!("\"{}\"", store.path().join("layers").display());
    let text = || std::fs::read_to_string(&log).unwrap();
    let before = text().matches(&layers).count();
    assert!(before > 0);
    unmount_free(Path::new(mounted.trim_end()));
    wait_until("the trace has all calls", || {
        let ended = |line: &str| {
            line.contains("exit_group") && line.split(' ').next() == Some(&daemon.to_string())
        };
        text().lines().any(ended)
    });
    assert_eq!(text().matches(&layers).count(), before);
}

/// The container may be destroyed right after.
#[test]
fn a_completed_export_is_durable_with_its_name() {
    let needs = [Need::Root, Need::Fuse, Need::Program("strace")];
    if !can(&needs) {
        return;
    }
    let store = web();
    let log = store.scratch().join("trace");
    let to = store.scratch().make("to");
    let file = to.join("web.tar");
    let calls = ["-y", "-e", "trace=rename,fsync"];
    traced(
        &store,
        &calls,
        &log,
        &["export", "web", file.to_str().unwrap()],
    )
    .ok();
    let synced = format!("<{}>)", to.display());
    wait_until("the directory is synced after the rename", || {
        let text = std::fs::read_to_string(&log).unwrap();
        let named = text.lines().skip_while(|line| !line.contains("rename("));
        let mut after = named.filter(|line| line.contains("fsync("));
        after.any(|line| line.contains(&synced))
    });
}
