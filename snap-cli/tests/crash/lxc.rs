//! cowl called as `lxc-snapshot`, killed at every call that changes something: what the container holds is
//! what it held before or what it is to hold, no snapshot is half there, and the next command goes through.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use cowl::tree::digest_dir;
use cowl_tests::conditions::{Need, can};

const COWL: &str = env!("CARGO_BIN_EXE_cowl");
const CALLS: &str = "mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,fsync,syncfs,\
                     write,fchmodat,?fchmodat2,utimensat,fchownat,setxattr,flock,symlinkat,linkat,\
                     mknodat,copy_file_range,ioctl";

/// A folder of LXC containers with c1 and its snapshot snap0, and a name for cowl under which it is LXC's.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new(kept: bool) -> Self {
        let parent = std::env::var_os("COWL_TEST_DIR").unwrap_or_else(|| "/var/tmp".into());
        let dir = tempfile::Builder::new()
            .prefix("cowl-crash-lxc-")
            .tempdir_in(parent)
            .unwrap();
        let world = Self { dir };
        world.container("l/c1", "now");
        world.container("l/c1/snaps/snap0", "then");
        std::fs::write(world.path("l/c1/snaps/snap0/ts"), "2026:11:23 13:02:05").unwrap();
        std::os::unix::fs::symlink(COWL, world.path("lxc-snapshot")).unwrap();
        if kept {
            world.ok(&["-n", "c1"]);
        }
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
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

    fn set_up(&self, command: &mut Command) {
        command
            .env("COWL_STORE", self.path("store"))
            .env("TZ", "UTC")
            .stdin(Stdio::null());
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(self.path("lxc-snapshot"));
        command.arg("-P").arg(self.path("l")).args(args);
        self.set_up(&mut command);
        command.output().unwrap()
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn strace(&self, options: &[&str], args: &[&str]) -> Output {
        let mut command = Command::new("strace");
        command
            .arg("-qq")
            .args(options)
            .arg(self.path("lxc-snapshot"))
            .arg("-P")
            .arg(self.path("l"))
            .args(args);
        self.set_up(&mut command);
        command.output().unwrap()
    }

    fn calls(&self, args: &[&str]) -> Vec<(String, usize)> {
        let log = self.path("strace.log");
        let trace = format!("trace={CALLS}");
        let output = self.strace(&["-o", log.to_str().unwrap(), "-e", &trace], args);
        assert!(output.status.success(), "{output:?}");
        let mut calls: Vec<(String, usize)> = Vec::new();
        for line in std::fs::read_to_string(log).unwrap().lines() {
            if let Some((name, _)) = line.split_once('(') {
                let number = 1 + calls.iter().filter(|(other, _)| other == name).count();
                calls.push((name.to_owned(), number));
            }
        }
        assert!(calls.len() > 5, "{calls:?}");
        calls
    }

    fn kill_at(&self, (name, number): &(String, usize), args: &[&str]) -> bool {
        let trace = format!("trace={name}");
        let inject = format!("inject={name}:signal=KILL:when={number}");
        let options = ["-o", "/dev/null", "-e", &trace, "-e", &inject];
        let output = self.strace(&options, args);
        let killed = output.status.signal() == Some(9);
        assert!(killed || output.status.success(), "{args:?}: {output:?}");
        killed
    }

    /// What a state of the container holds: cowl's, where it keeps it.
    fn holds(&self, state: &str) -> Option<String> {
        let tar = self.path("x.tar");
        let mut command = Command::new(COWL);
        command.args(["export", state]).arg(&tar);
        self.set_up(&mut command);
        let done = command.output().unwrap();
        if !done.status.success() {
            return None;
        }
        let read = |name: &str| {
            let mut command = Command::new("tar");
            command.arg("-xOf").arg(&tar).arg(name);
            String::from_utf8(command.output().unwrap().stdout).unwrap()
        };
        let all = format!("{} {}", read("./etc/file"), read("./etc/deep/file"));
        std::fs::remove_file(&tar).unwrap();
        Some(all)
    }

    fn digest(&self, name: &str) -> Option<String> {
        let path = self.path(name);
        path.is_dir()
            .then(|| digest_dir(&path, &mut |_| ()).unwrap().to_string())
    }

    /// Nothing of ours lies about among LXC's containers.
    #[track_caller]
    fn is_clean(&self, what: &str) {
        let mut folders = vec![self.path("l")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                let name = entry_name(&path);
                // (An adopted root file system leaves a note where it was.)
                let ours = name.contains("cowl-re") || name.ends_with(".tmp");
                assert!(!ours, "{what}: {}", path.display());
                if path.symlink_metadata().unwrap().is_dir() {
                    folders.push(path);
                }
            }
        }
    }
}

/// Kills `args` at each of its calls in a world of its own, and has `check` look at what is left.
fn at_every_call(kept: bool, args: &[&str], check: impl Fn(&World, &str)) {
    let calls = World::new(kept).calls(args);
    let mut killed = 0;
    for call in &calls {
        let world = World::new(kept);
        killed += usize::from(world.kill_at(call, args));
        check(&world, &format!("{args:?} killed at {call:?}"));
    }
    eprintln!(
        "{args:?}, kept: {kept}: killed at {killed} of {} calls",
        calls.len()
    );
    assert!(
        killed * 10 >= calls.len() * 9,
        "{killed} of {}",
        calls.len()
    );
}

/// The times of both worlds differ, so contents are compared.
fn content(world: &World, rootfs: &str) -> String {
    let read = |name: &str| {
        std::fs::read_to_string(world.path(rootfs).join(name)).unwrap_or_else(|e| e.to_string())
    };
    format!("{} {}", read("etc/file"), read("etc/deep/file"))
}

#[test]
fn going_back_to_lxcs_snapshot() {
    if !can(&[Need::Root, Need::Program("strace")]) {
        return;
    }
    at_every_call(false, &["-n", "c1", "-r", "snap0"], |world, what| {
        let now = content(world, "l/c1/rootfs");
        assert!(now == "now now" || now == "then then", "{what}: {now}");
        assert_eq!(
            content(world, "l/c1/snaps/snap0/rootfs"),
            "then then",
            "{what}"
        );
        world.ok(&["-n", "c1", "-r", "snap0"]);
        assert_eq!(content(world, "l/c1/rootfs"), "then then", "{what}");
        let (one, other) = (
            world.digest("l/c1/rootfs"),
            world.digest("l/c1/snaps/snap0/rootfs"),
        );
        assert_eq!(one, other, "{what}");
        world.is_clean(what);
    });
}

#[test]
fn a_new_container_of_lxcs_snapshot() {
    if !can(&[Need::Root, Need::Program("strace")]) {
        return;
    }
    at_every_call(false, &["-n", "c1", "-r", "snap0", "c2"], |world, what| {
        let made = world.path("l/c2");
        if made.is_dir() {
            assert_eq!(content(world, "l/c2/rootfs"), "then then", "{what}");
            assert!(made.join("config").is_file(), "{what}");
        }
        assert_eq!(content(world, "l/c1/rootfs"), "now now", "{what}");
        // Any command that makes or removes something cleans up.
        world.ok(&["-n", "c1", "-r", "snap0", "c3"]);
        world.is_clean(what);
        assert_eq!(content(world, "l/c3/rootfs"), "then then", "{what}");
    });
}

#[test]
fn removing_lxcs_snapshot() {
    if !can(&[Need::Root, Need::Program("strace")]) {
        return;
    }
    at_every_call(false, &["-n", "c1", "-d", "snap0"], |world, what| {
        let list = world.ok(&["-n", "c1", "-L"]);
        if list != "No snapshots\n" {
            assert_eq!(
                content(world, "l/c1/snaps/snap0/rootfs"),
                "then then",
                "{what}"
            );
        }
        world.ok(&["-n", "c1", "-d", "ALL"]);
        assert_eq!(world.ok(&["-n", "c1", "-L"]), "No snapshots\n", "{what}");
        world.is_clean(what);
    });
}

#[test]
fn the_first_snapshot_has_cowl_keep_the_container() {
    if !can(&[Need::Root, Need::Program("strace")]) {
        return;
    }
    at_every_call(false, &["-n", "c1"], |world, what| {
        // The next command puts in order what is left, whichever it is.
        let list = world.ok(&["-n", "c1", "-L"]);
        let taken = list.lines().count() - 1;
        assert!(taken <= 1, "{what}: {list}");
        let now = world
            .holds("c1")
            .unwrap_or_else(|| content(world, "l/c1/rootfs"));
        assert_eq!(now, "now now", "{what}");
        if taken == 1 {
            assert_eq!(
                world.holds("c1@snap1").as_deref(),
                Some("now now"),
                "{what}"
            );
        }
        world.ok(&["-n", "c1"]);
        let list = world.ok(&["-n", "c1", "-L"]);
        // What was on the disk whole, and not in force yet, came into force.
        let more = list.lines().count() - 1 - taken;
        assert!(more == 1 || (taken == 0 && more == 2), "{what}: {list}");
        for line in list.lines().skip(1) {
            let name = line.split(' ').next().unwrap();
            let state = world.holds(&format!("c1@{name}"));
            assert_eq!(state.as_deref(), Some("now now"), "{what}: {name}");
        }
        world.is_clean(what);
    });
}

#[test]
fn going_back_takes_lxcs_snapshot_in() {
    if !can(&[Need::Root, Need::Program("strace")]) {
        return;
    }
    at_every_call(true, &["-n", "c1", "-r", "snap0"], |world, what| {
        let list = world.ok(&["-n", "c1", "-L"]);
        let times = list.matches("snap0 (").count();
        assert_eq!(times, 1, "{what}: {list}");
        let now = world.holds("c1").unwrap();
        assert!(now == "now now" || now == "then then", "{what}: {now}");
        world.ok(&["-n", "c1", "-r", "snap0"]);
        assert_eq!(world.holds("c1").as_deref(), Some("then then"), "{what}");
        assert_eq!(
            world.holds("c1@snap0").as_deref(),
            Some("then then"),
            "{what}"
        );
        assert_eq!(
            world.holds("c1@snap1").as_deref(),
            Some("now now"),
            "{what}"
        );
        assert!(!world.path("l/c1/snaps/snap0").is_dir(), "{what}");
    });
}

fn entry_name(path: &std::path::Path) -> String {
    path.file_name().unwrap().display().to_string()
}
