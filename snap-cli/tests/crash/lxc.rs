//! cowl called as `lxc-snapshot`, killed at each system call that changes something: the container has its content
//! from before or from afterwards, no snapshot is incomplete, and the next command succeeds.

use std::path::PathBuf;
use std::process::Command;

use cowl::tree::digest_dir;
use cowl_tests::command::{run, run_command, show};
use cowl_tests::conditions::{Need, can};

use crate::kill::{at_each, calls, kill_at};

/// A directory of LXC containers with c1 and its snapshot snap0, and a link to cowl under LXC's name.
struct World {
    cli: cowl_tests::cowl::Store,
}

impl World {
    /// Creates them; c1 becomes a container of cowl if it is `managed`.
    fn new(managed: bool) -> Self {
        let cli = cowl_tests::cowl::Store::for_test();
        let world = Self { cli };
        world.container("l/c1", "now");
        world.container("l/c1/snaps/snap0", "then");
        std::fs::write(world.path("l/c1/snaps/snap0/ts"), "2026:11:23 13:02:05").unwrap();
        let link = world.path("lxc-snapshot");
        std::os::unix::fs::symlink(cowl_tests::programs::cowl(), link).unwrap();
        if managed {
            world.ok(&["-n", "c1"]);
        }
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cli.beside(name)
    }

    fn container(&self, name: &str, content: &str) {
        let rootfs = self.path(name).join("rootfs");
        std::fs::create_dir_all(rootfs.join("etc/deep")).unwrap();
        for file in ["etc/file", "etc/deep/file"] {
            std::fs::write(rootfs.join(file), content).unwrap();
        }
        std::os::unix::fs::symlink("file", rootfs.join("etc/link")).unwrap();
        let config = format!("lxc.rootfs.path = dir:{}\n", rootfs.display());
        std::fs::write(self.path(name).join("config"), config).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.path("lxc-snapshot"));
        command
            .arg("-P")
            .arg(self.path("l"))
            .args(args)
            .env("COWL_STORE", self.cli.path())
            .env("TZ", "UTC");
        command
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        show(&run_command(self.command(args), b"").ok().stdout)
    }

    /// Returns the content of a state of the container, if cowl manages it.
    fn content_of(&self, state: &str) -> Option<String> {
        let tar = self.path("x.tar");
        let args = ["export".as_ref(), state.as_ref(), tar.as_os_str()];
        if self.cli.cowl(args).code != 0 {
            return None;
        }
        let read = |name: &str| run("tar", ["-xOf".as_ref(), tar.as_os_str(), name.as_ref()]).out();
        let all = format!("{} {}", read("./etc/file"), read("./etc/deep/file"));
        std::fs::remove_file(&tar).unwrap();
        Some(all)
    }

    fn digest(&self, name: &str) -> Option<String> {
        let path = self.path(name);
        path.is_dir()
            .then(|| digest_dir(&path, &mut |_| ()).unwrap().to_string())
    }

    /// Asserts that there are no leftovers of cowl among LXC's containers.
    #[track_caller]
    fn assert_clean(&self, label: &str) {
        let mut dirs = vec![self.path("l")];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                let name = entry_name(&path);
                // The note in place of an adopted root filesystem is not a leftover.
                let is_leftover = name.contains("cowl-re") || name.ends_with(".tmp");
                assert!(!is_leftover, "{label}: {}", path.display());
                if path.symlink_metadata().unwrap().is_dir() {
                    dirs.push(path);
                }
            }
        }
    }
}

/// Kills `args` at each of its calls in a world of its own, and has `check` inspect what is left.
fn at_every_call(managed: bool, args: &[&str], check: impl Fn(&World, &str) + Sync) {
    let first = World::new(managed);
    let calls = calls(&first.command(args), &first.path("strace.log"));
    at_each(&format!("{args:?}, managed: {managed}"), &calls, |call| {
        let world = World::new(managed);
        let killed = kill_at(&world.command(args), call);
        check(&world, &format!("{args:?} killed at {call:?}"));
        killed
    });
}

/// The times of both worlds differ, so contents are compared.
fn content(world: &World, rootfs: &str) -> String {
    let read = |name: &str| {
        std::fs::read_to_string(world.path(rootfs).join(name)).unwrap_or_else(|e| e.to_string())
    };
    format!("{} {}", read("etc/file"), read("etc/deep/file"))
}

#[test]
fn restore_from_a_snapshot_of_lxc_survives_a_kill() {
    if !can(&[Need::Root, Need::Program("strace")]) {
        return;
    }
    at_every_call(false, &["-n", "c1", "-r", "snap0"], |world, label| {
        let now = content(world, "l/c1/rootfs");
        assert!(now == "now now" || now == "then then", "{label}: {now}");
        assert_eq!(
            content(world, "l/c1/snaps/snap0/rootfs"),
            "then then",
            "{label}"
        );
        world.ok(&["-n", "c1", "-r", "snap0"]);
        assert_eq!(content(world, "l/c1/rootfs"), "then then", "{label}");
        let (one, other) = (
            world.digest("l/c1/rootfs"),
            world.digest("l/c1/snaps/snap0/rootfs"),
        );
        assert_eq!(one, other, "{label}");
        world.assert_clean(label);
    });
}

#[test]
fn new_container_from_a_snapshot_of_lxc_survives_a_kill() {
    if !can(&[Need::Root, Need::Program("strace")]) {
        return;
    }
    at_every_call(false, &["-n", "c1", "-r", "snap0", "c2"], |world, label| {
        let made = world.path("l/c2");
        if made.is_dir() {
            assert_eq!(content(world, "l/c2/rootfs"), "then then", "{label}");
            assert!(made.join("config").is_file(), "{label}");
        }
        assert_eq!(content(world, "l/c1/rootfs"), "now now", "{label}");
        // Any command that makes or removes something cleans up.
        world.ok(&["-n", "c1", "-r", "snap0", "c3"]);
        world.assert_clean(label);
        assert_eq!(content(world, "l/c3/rootfs"), "then then", "{label}");
    });
}

#[test]
fn removal_of_a_snapshot_of_lxc_survives_a_kill() {
    if !can(&[Need::Root, Need::Program("strace")]) {
        return;
    }
    at_every_call(false, &["-n", "c1", "-d", "snap0"], |world, label| {
        let list = world.ok(&["-n", "c1", "-L"]);
        if list != "No snapshots\n" {
            assert_eq!(
                content(world, "l/c1/snaps/snap0/rootfs"),
                "then then",
                "{label}"
            );
        }
        world.ok(&["-n", "c1", "-d", "ALL"]);
        assert_eq!(world.ok(&["-n", "c1", "-L"]), "No snapshots\n", "{label}");
        world.assert_clean(label);
    });
}

#[test]
fn first_snapshot_that_adopts_survives_a_kill() {
    if !can(&[Need::Root, Need::Program("strace")]) {
        return;
    }
    at_every_call(false, &["-n", "c1"], |world, label| {
        // Any next command completes or rolls back the interrupted one.
        let list = world.ok(&["-n", "c1", "-L"]);
        let taken = list.lines().count() - 1;
        assert!(taken <= 1, "{label}: {list}");
        let now = world
            .content_of("c1")
            .unwrap_or_else(|| content(world, "l/c1/rootfs"));
        assert_eq!(now, "now now", "{label}");
        if taken == 1 {
            assert_eq!(
                world.content_of("c1@snap1").as_deref(),
                Some("now now"),
                "{label}"
            );
        }
        world.ok(&["-n", "c1"]);
        let list = world.ok(&["-n", "c1", "-L"]);
        // A snapshot that was complete on disk but not committed was committed.
        let more = list.lines().count() - 1 - taken;
        assert!(more == 1 || (taken == 0 && more == 2), "{label}: {list}");
        for line in list.lines().skip(1) {
            let name = line.split(' ').next().unwrap();
            let state = world.content_of(&format!("c1@{name}"));
            assert_eq!(state.as_deref(), Some("now now"), "{label}: {name}");
        }
        world.assert_clean(label);
    });
}

#[test]
fn restore_that_imports_from_lxc_survives_a_kill() {
    if !can(&[Need::Root, Need::Program("strace")]) {
        return;
    }
    at_every_call(true, &["-n", "c1", "-r", "snap0"], |world, label| {
        let list = world.ok(&["-n", "c1", "-L"]);
        let times = list.matches("snap0 (").count();
        assert_eq!(times, 1, "{label}: {list}");
        let now = world.content_of("c1").unwrap();
        assert!(now == "now now" || now == "then then", "{label}: {now}");
        world.ok(&["-n", "c1", "-r", "snap0"]);
        assert_eq!(
            world.content_of("c1").as_deref(),
            Some("then then"),
            "{label}"
        );
        assert_eq!(
            world.content_of("c1@snap0").as_deref(),
            Some("then then"),
            "{label}"
        );
        assert_eq!(
            world.content_of("c1@snap1").as_deref(),
            Some("now now"),
            "{label}"
        );
        assert!(!world.path("l/c1/snaps/snap0").is_dir(), "{label}");
    });
}

fn entry_name(path: &std::path::Path) -> String {
    path.file_name().unwrap().display().to_string()
}
