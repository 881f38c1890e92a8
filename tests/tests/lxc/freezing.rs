//! Snapshots of a container whose programs write by passthrough without a pause (docs/decisions/0043): they are stopped
//! for that moment.

use std::time::Duration;

use cowl_tests::conditions::can;
use cowl_tests::lxc::{Lxc, NEEDS};
use cowl_tests::run::number;

/// Writes a number to one file and then to the other, again and again.
const WRITER: &str = "exec 3>>/first 4>>/second 5<>/marker; n=0; \
    while :; do n=$((n+1)); echo $n >&3; echo $n >&4; done";

/// Starts a container with a program that writes without a pause.
fn with_writer() -> Lxc {
    let lxc = Lxc::with_passthrough();
    lxc.create("web");
    lxc.adopt("web").ok();
    lxc.start("web");
    lxc.run(
        "web",
        "echo old > /first; echo old > /second; echo old > /marker",
    );
    lxc.run("web", &format!("({WRITER}) > /dev/null 2>&1 < /dev/null &"));
    lxc
}

/// Returns the last number in a file, which one write contains completely; 0 if there is none.
fn last(lxc: &Lxc, snapshot: &str, file: &str) -> u64 {
    let source = format!("web@{snapshot}:{file}");
    let text = lxc.store().ok(["cat", &source]);
    text.trim_end()
        .rsplit('\n')
        .next()
        .unwrap()
        .parse()
        .unwrap_or(0)
}

#[test]
fn programs_are_stopped_for_a_snapshot_and_continue() {
    if !can(NEEDS) {
        return;
    }
    let lxc = with_writer();
    let count = number("COWL_MOVING_SNAPSHOTS", 10);
    let mut stops = 0;
    for number in 0..count {
        let output = lxc.store().cowl(["-v", "snapshot", "web"]).ok();
        assert_eq!(output.out().trim(), format!("snap{number}"));
        stops += usize::from(
            output
                .err()
                .contains("the programs in the container were stopped"),
        );
        assert_eq!(lxc.state("web"), "RUNNING");
    }
    assert!(stops > 0, "no snapshot had to stop the programs");
    println!("{count} snapshots, {stops} with stopped programs");
    let mut before = 0;
    for number in 0..count {
        let snapshot = format!("snap{number}");
        let (first, second) = (
            last(&lxc, &snapshot, "/first"),
            last(&lxc, &snapshot, "/second"),
        );
        assert!(
            first == second || first == second + 1,
            "{snapshot}: {first} in the first file, {second} in the second"
        );
        assert!(first >= before, "{snapshot}");
        before = first;
    }
    assert!(before > 0, "no snapshot has a number");
    let now = |file: &str| lxc.run("web", &format!("tail -n 1 {file}"));
    let written = now("/second");
    lxc.wait("the programs to continue", || now("/second") != written);
    lxc.kill("web");
}

#[test]
fn programs_continue_after_a_kill_of_the_command() {
    if !can(NEEDS) {
        return;
    }
    let lxc = with_writer();
    let mut interrupted = 0;
    for delay in (0..200).step_by(8) {
        let mut command = lxc.store().command(["snapshot", "web"]);
        let mut child = command
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        interrupted += usize::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        lxc.wait_for("web", "RUNNING");
    }
    assert!(interrupted > 0, "no kill was during a snapshot");
    lxc.store().cowl(["snapshot", "web"]).ok();
    let now = || lxc.run("web", "tail -n 1 /second");
    let written = now();
    lxc.wait("the programs to continue", || now() != written);
    lxc.kill("web");
}

#[test]
fn a_container_that_the_user_has_frozen_stays_frozen() {
    if !can(NEEDS) {
        return;
    }
    let lxc = with_writer();
    lxc.tool("freeze", "web", [""; 0]).ok();
    lxc.store().cowl(["snapshot", "web"]).ok();
    assert_eq!(lxc.state("web"), "FROZEN");
    lxc.tool("unfreeze", "web", [""; 0]).ok();
    lxc.wait_for("web", "RUNNING");
    lxc.kill("web");
}
