//! Snapshots that are refused after their files were linked into the new layer (docs/decisions/0043).

use std::path::Path;
use std::process::{Child, Stdio};

use cowl_tests::command::show;
use cowl_tests::conditions::can;
use cowl_tests::images::Kind;
use cowl_tests::mount::wait_until;
use cowl_tests::power_cut::moving::LINKED;
use cowl_tests::power_cut::phases::Phase;
use cowl_tests::process::signal;

use crate::moving_files::{Lab, NEEDS, Program, check_steps};

/// The maximum number of snapshots until one links its files before the daemon's time limit ends.
const ATTEMPTS: usize = 20;
/// The messages of a snapshot that the limit or an earlier snapshot prevents.
const REFUSALS: [&str; 2] = ["changed them again", "still being undone"];

/// The event while files are in the new layer of a refused snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    /// The daemon removes them.
    None,
    /// The daemon is killed. The mount has a keeper.
    Killed,
    /// The daemon is killed, and the mount ends.
    Ended,
}

/// Takes snapshots until one is refused whose files are in the new layer. Its command is stopped, so that it does not
/// discard this layer. The daemon waits as long as the file `waits` exists.
fn refused_snapshot(lab: &Lab, waits: &Path) -> Child {
    let phase = || Phase::of(lab.store.path());
    let has_links = || matches!(phase(), Some(Phase::Linking | Phase::Unlinking));
    for _ in 0..ATTEMPTS {
        std::fs::write(waits, "").unwrap();
        let mut command = lab.snapshot_command();
        let mut snapshot = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut ended = None;
        wait_until("files in the new layer, or the end of the command", || {
            ended = snapshot.try_wait().unwrap();
            ended.is_some() || has_links()
        });
        if ended.is_none() {
            signal(snapshot.id(), "-STOP");
            if has_links() {
                wait_until("the limit", || phase() == Some(Phase::Unlinking));
                return snapshot;
            }
            signal(snapshot.id(), "-CONT");
        }
        // It was refused before, or its layer was discarded in the meantime.
        std::fs::remove_file(waits).unwrap();
        let output = snapshot.wait_with_output().unwrap();
        let error = show(&output.stderr);
        let is_refused = REFUSALS.iter().any(|text| error.contains(text));
        assert!(is_refused && !output.status.success(), "{error}");
    }
    panic!("no snapshot of {ATTEMPTS} was refused after its files were linked");
}

/// The daemon waits after it has linked the files until its time limit ends, and then before it removes them.
fn refuse_a_snapshot(event: Event) {
    if !can(&[NEEDS, &Kind::Xfs.needs()].concat()) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let waits = dir.path().join("waits");
    let delay = format!("{LINKED}/{}", waits.display());
    let lab = Lab::new(Kind::Xfs, event == Event::Killed, [("COWL_DELAY", &*delay)]);
    let mut program = Program::start(&["step", lab.top.to_str().unwrap()]);
    assert_eq!(program.hear(), "wrote");
    let removed = lab.top.join("removed");
    let mut options = std::fs::File::options();
    let file = options.read(true).write(true).create_new(true);
    let file = file.open(&removed).unwrap();
    std::fs::write(&removed, "content").unwrap();
    let daemon = lab.store.daemon("web");
    let snapshot = refused_snapshot(&lab, &waits);
    // The moves are undone after that, and must not return the name.
    std::fs::remove_file(&removed).unwrap();
    assert_eq!(Phase::of(lab.store.path()), Some(Phase::Unlinking));
    if event != Event::None {
        signal(daemon, "-KILL");
    }
    std::fs::remove_file(&waits).unwrap();
    signal(snapshot.id(), "-CONT");
    let output = snapshot.wait_with_output().unwrap();
    let context = format!("{event:?}: {}", show(&output.stderr));
    // A daemon that is killed may have answered before.
    let is_refused = context.contains("changed them again");
    assert!(is_refused || event != Event::None, "{context}");
    let mut expected = "first\n";
    if event != Event::Ended {
        assert!(!output.status.success(), "{context}");
        for answer in ["wrote", "done"] {
            program.tell();
            assert_eq!(program.hear(), answer, "{context}");
        }
        assert_eq!(lab.store.snapshots("web").len(), 0, "{context}");
        expected = "first\nsecond\n";
    }
    program.end(&context);
    drop(file);
    if event != Event::Ended {
        // The next daemon has no delay.
        lab.store.cowl(["umount", "web"]).ok();
    }
    let remaining = lab.store.mount("web").join("removed").try_exists();
    assert!(!remaining.unwrap(), "{context}");
    check_steps(&lab, expected, &context);
    assert_eq!(Phase::of(lab.store.path()), None, "{context}");
}

#[test]
fn a_snapshot_that_is_refused_after_its_files_were_linked_leaves_nothing() {
    refuse_a_snapshot(Event::None);
}

#[test]
fn nothing_is_lost_if_the_daemon_is_killed_while_a_refused_snapshot_is_undone() {
    refuse_a_snapshot(Event::Killed);
}

#[test]
fn a_refused_snapshot_is_undone_without_the_daemon() {
    refuse_a_snapshot(Event::Ended);
}
