//! Daemons that end, are killed or are stopped: what commands report, what happens to the mount, and which commands
//! are refused.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use cowl_tests::command::run;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::killer::daemon_of;
use cowl_tests::killer::kill_both;
use cowl_tests::lxc::{self, Lxc};
use cowl_tests::mount::{self, Overlay, Stack, wait_until};
use cowl_tests::process::{Inside, signal};
use cowl_tests::scratch::Scratch;

const NEEDS: &[Need] = &[Need::Root, Need::Fuse];

fn created(store: &Store, names: &[&str]) -> Vec<PathBuf> {
    let source = store.scratch().make("source");
    std::fs::write(source.join("file"), "one\n").unwrap();
    names
        .iter()
        .map(|name| {
            store.create(name, &source);
            store.mount(name)
        })
        .collect()
}

/// The answer to an unmount arrives after the client's read timed out, and the daemon has exited by the time the client
/// checks whether it is alive. The unmount succeeded, and the command must say so.
#[test]
fn a_reply_is_read_even_if_its_daemon_has_exited() {
    let needs = [NEEDS, &[Need::Program("strace")]].concat();
    if !can(&needs) {
        return;
    }
    let store = Store::for_test();
    created(&store, &["web"]);
    let pid = store.daemon("web").to_string();
    let trace = |syscalls: &str, delay: &str| {
        let mut strace = Command::new("strace");
        strace
            .args(["-f", "-qq", "-o", "/dev/null", "-e"])
            .arg(format!("trace={syscalls}"))
            .args(["-e", &format!("inject={syscalls}:{delay}")]);
        strace
    };
    // Longer than the client waits before it checks, and shorter than the client's delay.
    let mut daemon = trace("sendto", "delay_enter=300000");
    let mut daemon = daemon.args(["-p", &pid]).spawn().unwrap();
    let tracer = format!("TracerPid:\t{}", daemon.id());
    wait_until("the daemon is traced", || {
        std::fs::read_to_string(format!("/proc/{pid}/status"))
            .is_ok_and(|text| text.contains(&tracer))
    });
    let mut client = trace("recvfrom", "delay_exit=2500000");
    client
        .arg(cowl_tests::programs::cowl())
        .arg("--store")
        .arg(store.path())
        .args(["umount", "web"]);
    cowl_tests::command::run_command(client, b"").ok();
    daemon.wait().unwrap();
}

/// A signal unmounts in all namespaces and keeps all written data.
#[test]
fn a_signal_unmounts_everywhere_and_ends_the_daemon() {
    let needs = [NEEDS, &[Need::Program("unshare")]].concat();
    if !can(&needs) {
        return;
    }
    let dir = Scratch::new("life-signal");
    let stack = Stack {
        lowers: vec![dir.make("l")],
        upper: Some((dir.make("u"), dir.make("w"))),
    };
    for (which, namespace) in [("-TERM", "-m"), ("-INT", "-Urm"), ("-HUP", "-m")] {
        let overlay = Overlay::cowlfs(&stack, &dir.make("m"), "");
        let mount_point = overlay.path().to_owned();
        std::fs::write(mount_point.join(which), "written").unwrap();
        let script = "echo; read line || true";
        let mut holder = Command::new("unshare")
            .args([namespace, "--propagation", "private", "sh", "-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0];
        holder.stdout.take().unwrap().read_exact(&mut line).unwrap();
        signal(overlay.pid().unwrap(), which);
        // Exits with code 0, and is waited for.
        overlay.ended();
        assert!(mount::at(&mount_point).is_none());
        let content = std::fs::read(dir.join("u").join(which)).unwrap();
        assert_eq!(content, b"written");
        assert!(holder.try_wait().unwrap().is_none(), "it was killed");
        drop(holder.stdin.take());
        holder.wait().unwrap();
    }
    // Users of the mount continue for some seconds and then get errors.
    let overlay = Overlay::cowlfs(&stack, &dir.make("m"), "");
    let mut file = std::fs::File::create(overlay.path().join("used")).unwrap();
    let inside = Inside::of(overlay.path());
    signal(overlay.pid().unwrap(), "-TERM");
    wait_until("it is unmounted", || mount::at(overlay.path()).is_none());
    file.write_all(b"late").unwrap();
    overlay.ended();
    assert_eq!(std::fs::read(dir.join("u/used")).unwrap(), b"late");
    drop(inside);
    // A second signal ends the daemon immediately.
    let overlay = Overlay::cowlfs(&stack, &dir.make("m"), "");
    let inside = Inside::of(overlay.path());
    signal(overlay.pid().unwrap(), "-TERM");
    wait_until("it is unmounted", || mount::at(overlay.path()).is_none());
    signal(overlay.pid().unwrap(), "-TERM");
    overlay.ended();
    drop(inside);
}

#[test]
fn a_container_whose_daemon_got_a_signal_is_unmounted() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let mount_point = created(&store, &["web"]).remove(0);
    std::fs::write(mount_point.join("new"), "new").unwrap();
    signal(store.pid("web"), "-TERM");
    let start = std::time::Instant::now();
    loop {
        let status = store.cowl(["status", "web"]).ok();
        if status.out().contains("not mounted") {
            break;
        }
        assert!(
            start.elapsed() < std::time::Duration::from_secs(180),
            "still mounted: {}\n{}",
            status.report(),
            store.cowl(["status", "web", "--json"]).ok().out()
        );
    }
    assert_eq!(store.cowl(["cat", "web:new"]).ok().out(), "new");
    store.cowl(["umount", "web"]).fails(1, &["not mounted"]);
}

/// A stopped daemon is reported with its pid and a command that ends it, affects no other container, and blocks no
/// command.
#[test]
fn a_stopped_daemon_is_named_and_can_be_ended() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    created(&store, &["one", "two"]);
    let pid = store.daemon("one");
    signal(pid, "-STOP");
    let cont = format!("kill -cont {pid}");
    let words = [&*format!("pid {pid}"), "state t", &cont];
    let status = store.cowl(["status"]).ok();
    assert!(
        status.err().to_lowercase().contains(&cont),
        "{}",
        status.report()
    );
    for line in status.out().lines().skip(1) {
        let words: Vec<_> = line.split_whitespace().collect();
        let state = match words[0] {
            "one" => "silent",
            _ => "mounted",
        };
        assert_eq!(words[1], state, "{line}");
    }
    for verb in [
        &["umount", "one"][..],
        &["mount", "one"],
        &["snapshot", "one"],
        &["destroy", "one", "--yes", "--now"],
        &["stats", "one"],
    ] {
        store.cowl(verb.iter().copied()).fails(4, &words);
    }
    store.cowl(["list"]).ok();
    store.cowl(["snapshot", "two"]).ok();
    // The daemon continues, and none of the refused commands had an effect.
    signal(pid, "-CONT");
    store.cowl(["snapshot", "one"]).ok();
    assert_eq!(store.daemon("one"), pid);
    assert_eq!(store.snapshots("one"), ["snap0"]);
    signal(pid, "-STOP");
    let ended = store.cowl(["umount", "--force", "one"]).ok();
    assert!(ended.err().contains(&pid.to_string()), "{}", ended.report());
    assert!(std::fs::read_link(format!("/proc/{pid}/exe")).is_err());
    let status = store.cowl(["status", "one"]).ok().out();
    assert!(status.contains("not mounted"), "{status}");
    // For a daemon that answers, the option makes no difference.
    let inside = Inside::of(&store.mount("two"));
    store
        .cowl(["umount", "--force", "two"])
        .fails(4, &["working directory"]);
    drop(inside);
    store.cowl(["umount", "--force", "two"]).ok();
}

#[test]
fn a_stopped_daemon_of_a_snapshot_can_be_ended() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    created(&store, &["web"]);
    store.cowl(["snapshot", "web"]).ok();
    store.cowl(["mount", "web@snap0"]).ok();
    let status = store.cowl(["status", "web", "--json"]).ok().json();
    let pid = u32::try_from(status["browsed"][0]["pid"].as_u64().unwrap()).unwrap();
    let pid = daemon_of(pid).unwrap_or(pid);
    signal(pid, "-STOP");
    store.cowl(["status"]).ok();
    store
        .cowl(["umount", "web@snap0"])
        .fails(4, &[&format!("pid {pid}"), "state t"]);
    store.cowl(["umount", "--force", "web@snap0"]).ok();
    store.cowl(["rm", "web", "snap0"]).ok();
}

/// A killed daemon is never treated as alive, although its process takes time to end.
#[test]
fn a_killed_daemon_is_treated_as_dead_immediately() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let mount_point = created(&store, &["web"]).remove(0);
    // Give the daemon memory to tear down, and have a daemon of a snapshot next to it.
    run(
        "sh",
        [
            "-euc",
            &format!(
                "cd {}; for n in $(seq 2000); do echo $n > $n; done",
                mount_point.display()
            ),
        ],
    )
    .ok();
    for round in 0..24 {
        store.kill_daemon("web");
        match round % 4 {
            0 => {
                let output = store.cowl(["mount", "web"]).ok();
                assert!(output.err().contains(" died"), "{}", output.report());
            }
            1 => {
                store
                    .cowl(["snapshot", "web", "--name", &format!("s{round}")])
                    .ok();
            }
            2 => {
                store.cowl(["umount", "web"]).ok();
                store.cowl(["mount", "web"]).ok();
            }
            _ => {
                let output = store.cowl(["status", "web"]).ok();
                assert!(output.err().contains(" died"), "{}", output.report());
            }
        }
        std::fs::write(mount_point.join("round"), round.to_string()).unwrap();
    }
}

/// Until it has ended, a killed process may hold its lock, and the kernel accepts connections for it.
#[test]
fn commands_wait_for_a_killed_daemon_to_exit() {
    if !can(NEEDS) {
        return;
    }
    use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};
    let store = Store::for_test();
    let mount_point = created(&store, &["web"]).remove(0);
    let pid = Pid::from_raw(i32::try_from(store.pid("web")).unwrap()).unwrap();
    let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
    // The descriptors that the process would still hold.
    let held: Vec<_> = std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero()))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let to = std::fs::read_link(path).unwrap().display().to_string();
            to.ends_with(".lock") || to.starts_with("socket:")
        })
        .map(|path| path.file_name().unwrap().to_str().unwrap().parse().unwrap())
        .map(|fd| rustix::process::pidfd_getfd(&process, fd, PidfdGetfdFlags::empty()).unwrap())
        .collect();
    assert!(held.len() >= 2, "{held:?}");
    store.kill_daemon("web");
    let mut asked = store.command(["mount", "web"]);
    let asked = asked.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut asked = asked.spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(700));
    assert!(
        asked.try_wait().unwrap().is_none(),
        "it took the dead for alive"
    );
    drop(held);
    let output = asked.wait_with_output().unwrap();
    let err = output.stderr.escape_ascii().to_string();
    assert!(output.status.success() && err.contains(" died"), "{err}");
    assert_eq!(std::fs::read(mount_point.join("file")).unwrap(), b"one\n");
}

/// Processes in the mount of a dead daemon no longer see the container, even after it is mounted again.
#[test]
fn processes_on_a_dead_mount_are_named() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let mount_point = created(&store, &["web"]).remove(0);
    store.cowl(["snapshot", "web"]).ok();
    let inside = Inside::of(&mount_point);
    let (user, daemon) = (format!("pid {}", inside.id()), store.pid("web"));
    kill_both(daemon);
    let daemon = format!("pid {daemon}");
    let words = [&*daemon, "died", "dead mount", &user, "sleep"];
    let output = store.cowl(["status", "web"]).ok();
    for word in words {
        assert!(output.err().contains(word), "{word}: {}", output.report());
    }
    assert!(output.out().contains("dead mount"), "{}", output.report());
    // For other processes it is mounted again.
    std::fs::write(mount_point.join("file"), "two\n").unwrap();
    let json = store.cowl(["status", "web", "--json"]).ok().json();
    assert_eq!(json["dead_mounts"][0]["users"][0]["pid"], inside.id());
    for verb in [
        &["restore", "web", "snap0"][..],
        &["destroy", "web", "--yes"],
    ] {
        store.cowl(verb.iter().copied()).fails(4, &words);
    }
    assert_eq!(std::fs::read(mount_point.join("file")).unwrap(), b"two\n");
    // Also after it was unmounted.
    store.cowl(["umount", "web"]).ok();
    store.cowl(["restore", "web", "snap0"]).fails(4, &words);
    drop(inside);
    store.cowl(["restore", "web", "snap0"]).ok();
    assert_eq!(store.cowl(["cat", "web:file"]).ok().out(), "one");
    let json = store.cowl(["status", "web", "--json"]).ok().json();
    assert!(json["dead_mounts"].is_null(), "{json}");
}

#[test]
fn an_lxc_container_on_a_dead_mount_is_named() {
    if !can(lxc::NEEDS) {
        return;
    }
    let lxc = Lxc::for_test();
    lxc.create("c1");
    lxc.adopt("c1").ok();
    lxc.start("c1");
    lxc.run("c1", "echo old > /etc/written");
    let store = lxc.store();
    store.cowl(["snapshot", "c1"]).ok();
    lxc.run("c1", "echo new > /etc/written");
    store.kill_daemon("c1");
    let pid = lxc.pid("c1").unwrap().to_string();
    let words = ["died", "container c1 still runs on the dead mount", &pid];
    let output = store.cowl(["status", "c1"]).ok();
    for word in words {
        assert!(output.err().contains(word), "{word}: {}", output.report());
    }
    let words = [&words[..], &["--stop --start"]].concat();
    store.cowl(["restore", "c1", "snap0"]).fails(4, &words);
    store
        .cowl(["restore", "c1", "snap0", "--stop", "--start"])
        .ok();
    lxc.wait_for("c1", "RUNNING");
    assert_eq!(lxc.run("c1", "cat /etc/written"), "old");
    let output = store.cowl(["status", "c1"]).ok();
    assert!(!output.err().contains("died"), "{}", output.report());
}

/// LXC's own tools, while unrelated mount namespaces hold copies of the mount.
#[test]
fn an_lxc_container_stops_despite_unused_copies() {
    let needs = [lxc::NEEDS, &[Need::Program("unshare")]].concat();
    if !can(&needs) {
        return;
    }
    let lxc = Lxc::for_test();
    lxc.create("c1");
    lxc.adopt("c1").ok();
    lxc.start("c1");
    let mut holders: Vec<_> = ["private", "slave"]
        .map(|how| {
            let mut command = Command::new("unshare");
            command.args(["-m", "--propagation", how, "sleep", "1000"]);
            command.spawn().unwrap()
        })
        .into();
    let mount_point = lxc.store().mount("c1");
    wait_until("they have copies", || {
        holders.iter().all(|holder| {
            let table = format!("/proc/{}/mountinfo", holder.id());
            let table = std::fs::read_to_string(table).unwrap();
            table.contains(mount_point.to_str().unwrap())
                && std::fs::read_link(format!("/proc/{}/ns/mnt", holder.id())).unwrap()
                    != std::fs::read_link("/proc/self/ns/mnt").unwrap()
        })
    });
    lxc.store().cowl(["snapshot", "c1"]).ok();
    lxc.store()
        .cowl(["restore", "c1", "snap0", "--stop", "--start"])
        .ok();
    lxc.wait_for("c1", "RUNNING");
    lxc.kill("c1");
    // The hook has unmounted it.
    let status = lxc.store().cowl(["status", "c1"]).ok().out();
    assert!(status.contains("not mounted"), "{status}");
    for holder in &mut holders {
        assert!(holder.try_wait().unwrap().is_none(), "it was killed");
        holder.kill().unwrap();
        holder.wait().unwrap();
    }
}
