//! Replacing the daemon while files move to a new layer (docs/decisions/0043 and 0034).

use std::process::Stdio;
use std::time::Duration;

use cowl_tests::conditions::can;
use cowl_tests::images::Kind;
use cowl_tests::programs;

use crate::moving_files::{Lab, NEEDS, Program, check_steps, snapshots_of_a_busy_container};
use crate::upgrade::send_request;

fn possible() -> bool {
    can(&[NEEDS, &Kind::Xfs.needs()].concat())
}

/// Registrations, and the files that a mapping alone keeps in use, are those of the predecessor.
fn upgrades_between_snapshots(keepers: bool) {
    let lab = Lab::new(Kind::Xfs, keepers, None);
    let mut upgrades = 0;
    let mut before = lab.store.pid("web");
    snapshots_of_a_busy_container(&lab, || {
        lab.store.cowl(["upgrade", "web"]).ok();
        let now = lab.store.pid("web");
        assert_ne!(now, before);
        before = now;
        upgrades += 1;
    });
    assert!(upgrades > 5, "{upgrades}");
}

#[test]
fn snapshots_and_upgrades_alternate_while_a_program_writes() {
    if possible() {
        upgrades_between_snapshots(false);
    }
}

#[test]
fn snapshots_and_upgrades_alternate_on_a_mount_with_a_keeper() {
    if possible() {
        upgrades_between_snapshots(true);
    }
}

/// The request to replace the daemon arrives while the files move, and after that. Each change takes a while.
#[test]
fn a_daemon_that_is_replaced_during_a_snapshot_completes_it_first() {
    if !possible() {
        return;
    }
    let mut interrupted = 0;
    for milliseconds in (50..1300).step_by(400) {
        let lab = Lab::new(Kind::Xfs, false, Some(("COWL_DELAY", "after a change/15")));
        let mut program = Program::start(&["step", lab.top.to_str().unwrap()]);
        assert_eq!(program.hear(), "wrote");
        let before = lab.store.pid("web");
        let mut snapshot = lab.snapshot_command();
        let mut snapshot = snapshot
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        interrupted += usize::from(snapshot.try_wait().unwrap().is_none());
        let response = send_request(&lab.store, &programs::cowl());
        assert!(response.contains("upgraded"), "{response}");
        assert!(
            snapshot.wait().unwrap().success(),
            "after {milliseconds} ms"
        );
        assert_ne!(lab.store.pid("web"), before);
        for answer in ["wrote", "done"] {
            program.tell();
            assert_eq!(program.hear(), answer);
        }
        let context = format!("after {milliseconds} ms");
        program.end(&context);
        assert_eq!(lab.store.snapshots("web").len(), 1, "{context}");
        check_steps(&lab, "first\nsecond\n", &context);
    }
    assert!(interrupted > 0, "no request was during a snapshot");
}
