//! Containers whose daemon is killed and replaced again and again while they run (docs/decisions/0035).
//!
//! `COWL_UNDER_FIRE=1` kills each one 100 times, with 20 upgrades in between.

use cowl_tests::conditions::{Need, can};
use cowl_tests::killer::{Killer, daemon_of};
use cowl_tests::lxc::{Lxc, NEEDS};
use cowl_tests::mount::wait_until;

/// The time in milliseconds for which a daemon answers requests.
const LIFETIME: u64 = 300;

/// A line for each passage of a loop in the container, with appended, created, renamed and removed files.
const LOOP: &str = r"
    set -eu; mkdir -p /var/loop; cd /var/loop; n=0
    while [ ! -e stop ]; do
        n=$((n + 1)); echo $n >> lines; echo $n > new$n; mv new$n last
        [ $(cat last) = $n ] || echo wrong $n >> errors
        mkdir d$n; ln last d$n/link; rm d$n/link; rmdir d$n; cat /etc/hostname > /dev/null
    done; echo $n > ended";

/// Kills and replaces the daemon of a container.
fn attack(lxc: &Lxc, name: &str) {
    let many = std::env::var_os("COWL_UNDER_FIRE").is_some();
    let (kills, upgrades) = if many { (100, 20) } else { (10, 2) };
    let killer = Killer::start(lxc.store().path(), LIFETIME..=LIFETIME);
    let mut replaced = 0;
    let mut refused = 0;
    for upgrade in 1..=upgrades {
        // An upgrade whose predecessor or successor is killed can fail. The mount continues.
        let (mut done, mut killed) = (false, 0);
        while !done || killer.kills() < kills * upgrade / upgrades {
            let before = killer.kills();
            let output = lxc.store().cowl(["upgrade", name]);
            is_mounted(lxc, name);
            if output.code == 0 {
                (done, replaced) = (true, replaced + 1);
            } else {
                assert_eq!(output.code, 1, "{}", output.report());
                refused += 1;
                killed += 1;
                assert!(killed < 50, "{}", output.report());
            }
            wait_until("a kill", || killer.kills() > before);
        }
    }
    let kills = killer.stop();
    eprintln!("{kills} kills, {replaced} upgrades, {refused} upgrades that were refused");
    assert!(kills >= 10 && replaced >= upgrades);
}

/// Verifies that `cowl` sees the mount; otherwise prints the daemon's log.
#[track_caller]
fn is_mounted(lxc: &Lxc, name: &str) {
    let status = lxc.store().cowl(["status", name, "--json"]).ok();
    if status.json()["state"] != "mounted" {
        for dir in lxc.store().run_dirs() {
            let log = std::fs::read_to_string(dir.join("log")).unwrap_or_default();
            eprintln!("{}:\n{log}", dir.display());
        }
        panic!("not mounted: {}", status.report());
    }
}

/// Returns the text of a file of a running container.
fn text(lxc: &Lxc, name: &str, path: &str) -> String {
    lxc.run(name, &format!("cat {path} 2>/dev/null || true"))
}

/// Ends the loop, and verifies that it has missed nothing.
#[track_caller]
fn end_loop(lxc: &Lxc, name: &str) {
    lxc.run(name, "touch /var/loop/stop");
    lxc.wait("the end of the loop", || {
        !text(lxc, name, "/var/loop/ended").is_empty()
    });
    assert_eq!(text(lxc, name, "/var/loop/errors"), "");
    let number: u32 = text(lxc, name, "/var/loop/ended").parse().unwrap();
    let expected: Vec<_> = (1..=number).map(|line| line.to_string()).collect();
    assert!(number > 20, "{number}");
    assert_eq!(text(lxc, name, "/var/loop/lines"), expected.join("\n"));
    assert_eq!(
        lxc.run(name, "ls /var/loop"),
        "ended\nlast\nlines\nstop",
        "nothing else is left"
    );
}

/// Waits until a daemon has continued after the last kill.
fn daemon_is_back(lxc: &Lxc, name: &str) {
    is_mounted(lxc, name);
    wait_until("another daemon", || {
        daemon_of(lxc.store().pid(name)).is_some()
    });
}

#[test]
fn busybox_continues() {
    if !can(NEEDS) {
        return;
    }
    let lxc = Lxc::with_keepers();
    lxc.create("c1");
    lxc.adopt("c1").ok();
    lxc.start("c1");
    let init = lxc.pid("c1").unwrap();
    lxc.run("c1", &format!("( {LOOP}\n) >/var/output 2>&1 </dev/null &"));
    attack(&lxc, "c1");
    end_loop(&lxc, "c1");
    assert_eq!(text(&lxc, "c1", "/var/output"), "");
    assert_eq!(lxc.pid("c1"), Some(init));
    assert_eq!(lxc.state("c1"), "RUNNING");
    daemon_is_back(&lxc, "c1");
    // Its snapshot is what it sees.
    lxc.store().cowl(["snapshot", "c1"]).ok();
    lxc.kill("c1");
    lxc.unmounted("c1");
    lxc.store().cowl(["check"]).ok();
    lxc.start("c1");
    assert_eq!(lxc.run("c1", "ls /var/loop | wc -l"), "4");
    lxc.kill("c1");
    lxc.unmounted("c1");
}

/// Creates a container of Debian with systemd, and a service in it.
fn create_debian(lxc: &Lxc, name: &str) {
    lxc.create_with_systemd(name);
    let root = lxc.dir(name).join("rootfs");
    let unit = "[Service]\nExecStart=/bin/sh /root/loop\nStandardOutput=file:/var/output\nStandardError=file:/var/output\n";
    std::fs::write(root.join("etc/systemd/system/loop.service"), unit).unwrap();
    std::fs::write(root.join("root/loop"), LOOP).unwrap();
}

#[test]
fn systemd_continues() {
    let needs = [NEEDS, &[Need::DebianWithSystemd]].concat();
    if !can(&needs) {
        return;
    }
    let lxc = Lxc::with_keepers();
    create_debian(&lxc, "deb");
    lxc.adopt("deb").ok();
    lxc.start_systemd("deb");
    let state = || {
        lxc.tool("attach", "deb", ["--", "systemctl", "is-system-running"])
            .out()
    };
    let init = lxc.pid("deb").unwrap();
    let units = || {
        lxc.run("deb", "systemctl list-units --plain --no-legend --state=active --type=service | cut -d' ' -f1 | sort")
    };
    lxc.run("deb", "systemctl start loop");
    let before = units();
    assert!(before.contains("systemd-journald.service"), "{before}");
    attack(&lxc, "deb");
    assert_eq!(units(), before);
    assert_eq!(state(), "running");
    // systemd starts and stops services as before, and its journal is sound.
    lxc.run(
        "deb",
        "systemctl restart systemd-journald; journalctl --verify 2>&1 | grep -v PASS || true",
    );
    end_loop(&lxc, "deb");
    assert_eq!(text(&lxc, "deb", "/var/output"), "");
    assert_eq!(lxc.run("deb", "systemctl --failed --no-legend"), "");
    assert_eq!(lxc.pid("deb"), Some(init));
    daemon_is_back(&lxc, "deb");
    lxc.kill("deb");
    lxc.unmounted("deb");
    lxc.store().cowl(["check"]).ok();
}
