//! A container of LXC's that cowl has taken over lives as before: it starts, stops, reboots, freezes and is
//! destroyed by LXC's own tools.

use std::path::Path;

use super::mapped_exec;
use cowl_tests::conditions::can;
use cowl_tests::lxc::{Lxc, NEEDS};
use cowl_tests::tree::{self, Compare};

/// Starts no container: the tested commands change only files.
#[test]
fn a_released_container_is_identical_to_the_original() {
    if !can(NEEDS) {
        return;
    }
    let lxc = Lxc::for_test();
    lxc.create("c1");
    let config = lxc.config("c1");
    let before = tree::read(&lxc.dir("c1").join("rootfs")).unwrap();
    lxc.adopt("c1").ok();
    // One line is replaced, and lines are appended. Nothing else changes.
    let adopted = lxc.config("c1");
    let kept = adopted.lines().zip(config.lines()).filter(|(a, b)| a == b);
    assert_eq!(kept.count(), config.lines().count() - 1, "{adopted}");
    assert_eq!(
        adopted.lines().count(),
        config.lines().count() + 5,
        "{adopted}"
    );
    assert!(adopted.contains("lxc.rootfs.managed = 0\n"));
    let left: Vec<_> = std::fs::read_dir(lxc.dir("c1").join("rootfs"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["MOVED-TO-COWL.txt"]);
    lxc.store().cowl(["release", "c1"]).ok();
    assert_eq!(lxc.config("c1"), config);
    let after = tree::read(&lxc.dir("c1").join("rootfs")).unwrap();
    tree::assert_same("released", &before, &after, Compare::IDENTICAL);
    lxc.start("c1");
    lxc.kill("c1");
    let names: Vec<_> = lxc.store().cowl(["list", "--json"]).ok().json()["containers"]
        .as_array()
        .unwrap()
        .clone();
    assert!(names.is_empty(), "{names:?}");
}

#[test]
fn tools_of_lxc_work_on_an_adopted_container() {
    if !can(NEEDS) {
        return;
    }
    let lxc = Lxc::for_test();
    lxc.create("c1");
    lxc.adopt("c1").ok();

    lxc.start("c1");
    let list = cowl_tests::command::run(
        "lxc-ls",
        ["-P", lxc.path().to_str().unwrap(), "-1", "--running"],
    );
    assert_eq!(list.ok().out().trim(), "c1");
    let shown = lxc.run("c1", "head -1 /proc/mounts");
    assert!(shown.contains("fuse.cowlfs"), "{shown}");
    lxc.run("c1", "echo kept > /etc/written");

    // The daemon is none of the container's processes, and no freezer reaches it.
    let daemon = lxc.store().pid("c1");
    let inside = lxc.run("c1", "ps");
    assert!(!inside.contains("cowl"), "{inside}");
    let groups = std::fs::read_to_string(format!("/proc/{daemon}/cgroup")).unwrap();
    assert!(!groups.contains("lxc."), "{groups}");
    lxc.tool("freeze", "c1", [] as [&str; 0]).ok();
    lxc.wait_for("c1", "FROZEN");
    // A command that inspects the mount gets an answer.
    let mount_point = lxc.store().mount("c1");
    assert_eq!(
        std::fs::read(mount_point.join("etc/written")).unwrap(),
        b"kept\n"
    );
    lxc.store().cowl(["snapshot", "c1", "-m", "frozen"]).ok();
    lxc.tool("unfreeze", "c1", [] as [&str; 0]).ok();
    lxc.wait_for("c1", "RUNNING");

    // A reboot from inside the container.
    let before = lxc.pid("c1");
    // The reboot kills the shell that requested it.
    lxc.tool("attach", "c1", ["--", "/bin/reboot"]);
    lxc.wait("another first process", || {
        let now = lxc.pid("c1");
        now.is_some() && now != before
    });
    lxc.wait_for("c1", "RUNNING");
    assert_eq!(lxc.run("c1", "cat /etc/written"), "kept");
    let groups =
        std::fs::read_to_string(format!("/proc/{}/cgroup", lxc.store().pid("c1"))).unwrap();
    assert!(!groups.contains("lxc."), "{groups}");

    // In good order, and killed.
    lxc.tool("stop", "c1", ["-t", "60"]).ok();
    lxc.wait_for("c1", "STOPPED");
    lxc.start("c1");
    assert_eq!(lxc.run("c1", "cat /etc/written"), "kept");
    lxc.kill("c1");
    lxc.unmounted("c1");

    // LXC's own destruction ends in cowl's trash, and leaves nothing behind.
    lxc.tool("destroy", "c1", [] as [&str; 0]).ok();
    assert!(!lxc.dir("c1").try_exists().unwrap());
    lxc.store().cowl(["show", "c1"]).fails(3, &["c1"]);
    lxc.store().cowl(["undelete", "c1"]).ok();
    lxc.start("c1");
    assert_eq!(lxc.run("c1", "cat /etc/written"), "kept");
    lxc.kill("c1");
}

#[test]
fn a_running_container_is_refused_with_a_command_to_run() {
    if !can(NEEDS) {
        return;
    }
    let lxc = Lxc::for_test();
    lxc.create("c1");
    lxc.start("c1");
    lxc.adopt("c1")
        .fails(4, &["c1 is running", "lxc-stop", "-n c1"]);
    lxc.kill("c1");
    lxc.adopt("c1").ok();
    lxc.start("c1");
    lxc.run("c1", "echo old > /etc/written");
    lxc.store().cowl(["snapshot", "c1"]).ok();
    lxc.run("c1", "echo new > /etc/written");
    let pid = lxc.pid("c1").unwrap().to_string();
    let store = lxc.store();
    for refused in [
        &["restore", "c1", "snap0"][..],
        &["destroy", "c1", "--yes"],
        &["release", "c1", "--yes"],
    ] {
        let output = store
            .cowl(refused.iter().copied())
            .fails(4, &["lxc-stop", "-n c1"]);
        assert!(
            refused[0] == "release" || output.err().contains(&pid),
            "{}",
            output.report()
        );
    }
    store
        .cowl(["restore", "c1", "snap0"])
        .fails(4, &["--stop --start"]);
    // Layers are merged while it runs.
    store.cowl(["snapshot", "c1"]).ok();
    store.cowl(["flatten", "c1", "--base"]).ok();
    assert_eq!(lxc.pid("c1").unwrap().to_string(), pid);
    assert_eq!(lxc.run("c1", "cat /etc/written"), "new");
    // With both options, the container is stopped, restored and started.
    let config = lxc.config("c1");
    store
        .cowl(["restore", "c1", "snap0", "--stop", "--start"])
        .ok();
    lxc.wait_for("c1", "RUNNING");
    assert_eq!(lxc.run("c1", "cat /etc/written"), "old");
    assert_eq!(lxc.config("c1"), config);
    // A change that fails leaves it running, too.
    store
        .cowl(["restore", "c1", "none", "--stop", "--start"])
        .fails(3, &["none"]);
    lxc.wait_for("c1", "RUNNING");
    store.cowl(["destroy", "c1", "--yes", "--stop"]).ok();
    assert!(!lxc.dir("c1").try_exists().unwrap());
}

/// The config of a snapshot is restored only on request, and cowl's lines in it remain correct.
#[test]
fn the_config_is_restored_with_the_snapshot_on_request() {
    if !can(NEEDS) {
        return;
    }
    let lxc = Lxc::for_test();
    lxc.create("c1");
    lxc.adopt("c1").ok();
    let (store, before) = (lxc.store(), lxc.config("c1"));
    store.cowl(["snapshot", "c1"]).ok();
    let path = lxc.dir("c1").join("config");
    let changed = before.replace("# the end\n", "# the very end\n") + "lxc.start.auto = 1\n";
    std::fs::write(&path, &changed).unwrap();
    store.restore("c1", "snap0");
    assert_eq!(lxc.config("c1"), changed);
    store.cowl(["restore", "c1", "snap0", "--with-config"]).ok();
    assert_eq!(lxc.config("c1"), before);
    lxc.start("c1");
    lxc.kill("c1");
    lxc.unmounted("c1");
    // Lines that a user added survive a release.
    std::fs::write(&path, &changed).unwrap();
    store.cowl(["release", "c1", "--yes"]).ok();
    let released = lxc.config("c1");
    let rootfs_line = format!("lxc.rootfs.path = dir:{}/rootfs", lxc.dir("c1").display());
    let expected: Vec<_> = changed
        .lines()
        .map(|line| match line.starts_with("lxc.rootfs.path") {
            true => rootfs_line.as_str(),
            false => line,
        })
        .filter(|line| !line.contains("cowl") || *line == rootfs_line)
        .filter(|line| *line != "lxc.rootfs.managed = 0")
        .collect();
    assert_eq!(released.lines().collect::<Vec<_>>(), expected);
    lxc.start("c1");
}

/// A container whose root is another user of this machine, started by root.
#[test]
fn an_unprivileged_container_runs_on_an_adopted_root() {
    let needs = [NEEDS, &[cowl_tests::conditions::Need::Program("newuidmap")]].concat();
    if !can(&needs) {
        return;
    }
    let lxc = Lxc::for_test();
    let config = lxc.create_mapped("c1");
    let rootfs = lxc.dir("c1").join("rootfs");
    let node = rootfs.join("etc/node");
    cowl_tests::command::run("mknod", [node.to_str().unwrap(), "c", "1", "3"]).ok();
    cowl_tests::command::run("chown", ["100000", node.to_str().unwrap()]).ok();
    lxc.adopt("c1").ok();
    let line = "id -u; echo mine > /etc/written; stat -c %u /etc/written; cat /proc/self/uid_map";
    let out = lxc.run_mapped("c1", line);
    let words: Vec<_> = out.split_whitespace().collect();
    assert_eq!(words, ["0", "0", "0", "100000", "65536"], "{out}");
    // A command that cowl runs has the same ids, and no power over the host's.
    let line = "id -u; id -G; stat -c %u /etc/written; cat /proc/self/uid_map; echo x > /etc/by-exec
        chown 7 /etc/by-exec; mount -t tmpfs none /mnt; test -c /dev/null
        if echo 0 > /proc/sys/kernel/sysrq; then echo host; fi 2> /dev/null; sleep 0 < /dev/null; echo safe
        # The host's mounts are not reachable, /sys is read-only, devices of an image are disabled, and no input can be
        # inserted into the terminal.
        awk '{ print $5 }' /proc/self/mountinfo | grep -v -e '^/$' -e '^/proc' -e '^/sys' -e '^/dev' -e '^/mnt$'
        awk '$5 ~ \"^/sys\" && $6 !~ /^ro,nosuid,nodev,noexec/' /proc/self/mountinfo
        if cat /etc/node; then echo node; fi 2> /dev/null; grep Seccomp: /proc/self/status";
    let out = lxc
        .store()
        .cowl(["exec", "c1", "--", "sh", "-c", line])
        .ok()
        .out();
    let words: Vec<_> = out.split_whitespace().collect();
    assert_eq!(
        words,
        [
            "0", "0", "0", "0", "100000", "65536", "safe", "Seccomp:", "2"
        ],
        "{out}"
    );
    mapped_exec::has_processes_of_its_own(&lxc);
    mapped_exec::leaves_no_process(&lxc);
    mapped_exec::has_the_exit_code_of_the_command(&lxc);
    mapped_exec::works_on_a_terminal(&lxc);
    let bad = ["exec", "c1", "--", "sh", "-c", "exit 7"];
    assert_eq!(lxc.store().cowl(bad).code, 7);
    // It never runs with other ids than those of the container.
    let (path, text) = (lxc.dir("c1").join("config"), lxc.config("c1"));
    std::fs::write(&path, format!("{text}lxc.idmap = nonsense\n")).unwrap();
    lxc.store()
        .cowl(bad)
        .fails(125, &["lxc.idmap", "is invalid"]);
    std::fs::remove_file(&path).unwrap();
    lxc.store()
        .cowl(bad)
        .fails(125, &["config", "--with-config"]);
    std::fs::write(&path, text).unwrap();
    lxc.store().cowl(["release", "c1"]).ok();
    assert_eq!(lxc.config("c1"), config);
    use std::os::unix::fs::MetadataExt;
    let owner = |name| std::fs::metadata(rootfs.join(name)).unwrap().uid();
    assert_eq!(owner("etc/written"), 100_000);
    assert_eq!(owner("etc/by-exec"), 100_007);
}

/// `lxc-create -n NEW -t cowl -- NAME[@SNAP]`.
#[test]
fn the_template_creates_clones() {
    if !can(NEEDS) {
        return;
    }
    let lxc = Lxc::for_test();
    let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("../snap-cli/dist/lxc/lxc-cowl");
    let create = |name: &str, args: &[&str]| {
        let program = cowl_tests::programs::cowl();
        let programs = program.parent().unwrap();
        let path = std::env::var("PATH").unwrap();
        let mut command = std::process::Command::new("lxc-create");
        command
            .arg("-P")
            .arg(lxc.path())
            .args(["-n", name, "-t", template.to_str().unwrap(), "--"])
            .args(args)
            .env("PATH", format!("{}:{path}", programs.display()))
            .env("COWL_STORE", lxc.store().path());
        cowl_tests::command::run_command(command, b"")
    };
    let store = lxc.store();
    lxc.create("c1");
    lxc.adopt("c1").ok();
    store.exec("c1", "echo one > /etc/state");
    store.cowl(["snapshot", "c1"]).ok();
    store.exec("c1", "echo two > /etc/state");

    create("c2", &["c1@snap0"]).ok();
    create("c3", &["c1"]).ok();
    for (name, state) in [("c2", "one"), ("c3", "two")] {
        lxc.start(name);
        assert_eq!(
            lxc.run(name, "cat /etc/state; hostname"),
            format!("{state}\n{name}")
        );
        lxc.kill(name);
        lxc.unmounted(name);
        store.cowl(["snapshot", name]).ok();
        lxc.tool("destroy", name, [""; 0]).ok();
        assert!(!lxc.dir(name).try_exists().unwrap());
    }

    // A container without LXC's config keeps that of lxc-create.
    store.create("plain", &cowl_tests::rootfs::busybox_tar().unwrap());
    create("c4", &["plain"]).ok();
    let config = lxc.config("c4");
    assert!(config.contains("lxc.uts.name = c4"), "{config}");
    assert!(config.contains("common.conf"), "{config}");
    assert!(config.contains(" hook pre-start "), "{config}");
    lxc.tool("destroy", "c4", [""; 0]).ok();

    // A failure leaves nothing behind.
    let failed = create("c5", &["c9"]);
    assert!(
        failed.code != 0 && failed.err().contains("c9"),
        "{}",
        failed.report()
    );
    assert!(!lxc.dir("c5").try_exists().unwrap());
    let listed = store.cowl(["list", "--json"]).ok().json();
    assert_eq!(
        listed["containers"].as_array().map(Vec::len),
        Some(2),
        "{listed}"
    );
}
