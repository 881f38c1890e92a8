//! The daemon of a mount with a keeper is killed at every named point, and every call succeeds exactly once
//! (docs/decisions/0035).
//!
//! `COWL_KILL_POINT=NAME` tests one point only, `COWL_EVERY_PASSING=1` kills at every passing of each point in turn.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cowl_tests::command::show;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::killer::daemon_of;
use cowl_tests::mount::wait_until;
use cowl_tests::power_cut::moving::{LINKED, PHASE};
use cowl_tests::run::number;
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare, Tree};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const NEEDS: &[Need] = &[Need::Root, Need::Fuse, Need::Program("python3")];

/// The points that only a daemon passes that recovers. The test kills daemons, so that there is one.
const IN_RECOVERY: [&str; 5] = [
    "before a recovery",
    "in a recovery",
    "before a recovered ledger",
    "before requests are sent again",
    "after requests are sent again",
];

/// Returns the names of the points in the source, each of which must be at one location only.
fn points() -> BTreeSet<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fs");
    let mut names = BTreeSet::new();
    let mut pending = vec![root];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("tests") {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let source = std::fs::read_to_string(&path).unwrap();
                for rest in source.split("point(\"").skip(1) {
                    let name = rest.split('"').next().unwrap().to_owned();
                    assert!(names.insert(name.clone()), "two points are named {name}");
                }
            }
        }
    }
    names
}

fn fill(lower: &Path) {
    let write = |path: PathBuf, content: &str| std::fs::write(path, content).unwrap();
    for name in ["held", "held-path", "removed"] {
        write(lower.join(name), name);
    }
    for number in 1..=3 {
        let dir = lower.join(format!("lower{number}"));
        std::fs::create_dir_all(dir.join("dir")).unwrap();
        std::fs::create_dir(dir.join("empty")).unwrap();
        write(dir.join("dir/inner"), "inner");
        for name in [
            "file",
            "attributes",
            "copied",
            "one",
            "two",
            "unchanged",
            "replacing",
            "replaced",
            "truncated",
            "gone",
        ] {
            write(dir.join(name), name);
        }
        write(dir.join("gone-open"), "none");
        std::fs::write(dir.join("large"), vec![b'l'; 5 << 22]).unwrap();
        write(dir.join("linked1"), "linked");
        std::fs::hard_link(dir.join("linked1"), dir.join("linked2")).unwrap();
        std::os::unix::fs::symlink("target", dir.join("gone-link")).unwrap();
    }
}

/// The kills of one run.
struct Kills<'a> {
    point: &'a str,
    stride: u64,
    offset: u64,
}

/// Runs the script, and returns the resulting tree and the recorded passings.
fn run(kills: Option<&Kills<'_>>) -> (Tree, Vec<u8>) {
    let store = Store::in_scratch(Scratch::new("kill-points")).with_keepers();
    let lower = store.scratch().make("lower");
    fill(&lower);
    store.create("web", &lower);
    let counts = store.beside("passings");
    let mut mount = store.command(["mount", "web"]);
    let selected = kills.map_or_else(
        || "/1/0".to_owned(),
        |kills| format!("{}/{}/{}", kills.point, kills.stride, kills.offset),
    );
    mount.env("COWL_KILL", format!("{selected}/{}", counts.display()));
    let output = mount.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let top = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/mount/kill_points.py");
    let mut child = Command::new("python3")
        .arg(script)
        .arg(&top)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut answers = child.stdin.take().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut last = String::new();
    for line in lines {
        let line = line.unwrap();
        match line.as_str() {
            "snapshot" => retried(&store, &["snapshot", "web"]),
            "flatten" => retried(&store, &["flatten", "web"]),
            "upgrade" => retried(&store, &["upgrade", "web"]),
            _ => {}
        }
        let is_recovery = kills.is_some_and(|kills| IN_RECOVERY.contains(&kills.point));
        if is_recovery && line != "complete" {
            kill_daemon(&store);
        }
        last.clone_from(&line);
        if line != "complete" {
            writeln!(answers, "done").unwrap();
        }
    }
    assert!(child.wait().unwrap().success());
    assert_eq!(last, "complete");
    retried(&store, &["umount", "web"]);
    let top = store.mount("web");
    let tree = tree::read(&top).unwrap();
    store.ok(["umount", "web"]);
    let passings = std::fs::read(&counts).unwrap_or_default();
    (tree, passings)
}

/// Runs a command that succeeds, perhaps after the daemon was killed while it was asked.
fn retried(store: &Store, args: &[&str]) {
    for _ in 0..10 {
        let output = store.command(args).output().unwrap();
        if output.status.success() {
            return;
        }
        eprintln!("{args:?}: {}", show(&output.stderr));
    }
    panic!("{args:?} fails again and again");
}

fn kill_daemon(store: &Store) {
    let keeper = store.pid("web");
    wait_until("a daemon", || daemon_of(keeper).is_some());
    let daemon = daemon_of(keeper).unwrap();
    kill(Pid::from_raw(daemon.cast_signed()), Signal::SIGKILL).unwrap();
    wait_until("another daemon", || {
        daemon_of(keeper).is_some_and(|other| other != daemon)
    });
}

#[test]
fn every_call_succeeds_once_if_the_daemon_is_killed_at_any_point() {
    if !can(NEEDS) {
        return;
    }
    let mut names = points();
    // No program of this test writes by passthrough, so that no file moves. Daemons end there in moving_files.rs and
    // moving_undone.rs.
    assert!(names.remove(PHASE) && names.remove(LINKED));
    assert!(names.len() > 20, "{names:?}");
    if let Ok(name) = std::env::var("COWL_KILL_POINT") {
        names.retain(|point| *point == name);
    }
    let (expected, passed) = run(None);
    let passed = String::from_utf8(passed).unwrap();
    let mut reached = BTreeSet::new();
    for point in &names {
        let passings = passed.lines().filter(|name| name == point).count() as u64;
        // A request passes a point several times, and must succeed between two kills; so must a recovery.
        let stride = match passings {
            // A recovery writes a block for each known inode.
            _ if point == "in a block" => 307,
            // A copy of five steps, so most of them are killed and restart.
            _ if point == "in a copy" => 7,
            0 => 2,
            1..=20 => passings + 1,
            21..=200 => 37,
            201..=2000 => 101,
            _ => 401,
        };
        let offsets: Vec<u64> = match number("COWL_EVERY_PASSING", 0) {
            0 => vec![1],
            _ => (0..stride).collect(),
        };
        for offset in offsets {
            let kills = Kills {
                point,
                stride,
                offset,
            };
            let (tree, passings) = run(Some(&kills));
            let passings = passings.len() as u64;
            let killed = (passings + stride - offset) / stride;
            eprintln!("{point}: {killed} kills in {passings} passings ({offset} of {stride})");
            let differences = tree::differences(&expected, &tree, Compare::HISTORY);
            assert!(differences.is_empty(), "{point}: {differences:#?}");
            if killed > 0 {
                reached.insert(point.clone());
            }
        }
    }
    assert_eq!(reached, names);
}
