//! A mount outlives its daemon: programs do not notice that it was killed (docs/decisions/0035).

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use cowl_tests::conditions::{Need, can};
use cowl_tests::killer::{Killer, daemon_of, daemons, find_pair, kill_both, with_variable};
use cowl_tests::mount::{self, Overlay, Stack, wait_until};
use cowl_tests::scratch::Scratch;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const NEEDS: &[Need] = &[Need::Root, Need::Fuse, Need::Program("python3")];

fn stack(dir: &Scratch) -> Stack {
    Stack {
        lowers: vec![dir.make("lower")],
        upper: Some((dir.make("upper"), dir.make("work"))),
    }
}

/// Kills the daemon, never the keeper, and waits for another one.
fn kill_daemon(overlay: &Overlay) {
    let keeper = overlay.program().unwrap();
    // The mount is visible before its daemon is forked.
    wait_until("a daemon with a keeper", || daemon_of(keeper).is_some());
    let Some(daemon) = daemon_of(keeper) else {
        panic!("the daemon ended by itself");
    };
    kill(Pid::from_raw(daemon.cast_signed()), Signal::SIGKILL).unwrap();
    // The killed one is visible until it is dead.
    wait_until("another daemon", || {
        daemon_of(keeper).is_some_and(|other| other != daemon)
    });
}

/// A script in the background, which answers each line.
struct Script(Child, BufReader<std::process::ChildStdout>);

impl Script {
    fn start(name: &str, args: &[&str]) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/mount")
            .join(name);
        let mut child = Command::new("python3")
            .arg(path)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self(child, output)
    }

    fn read(&mut self) -> String {
        let mut line = String::new();
        self.1.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.0.stdin.as_mut().unwrap(), "{line}").unwrap();
    }
}

fn fill(lower: &Path) {
    let write = |name: &str, content: &str| std::fs::write(lower.join(name), content).unwrap();
    let lines: Vec<String> = (0..1000).map(|line| format!("{line}\n")).collect();
    write("lines", &lines.concat());
    write("blocks", &"b".repeat(16384));
    write("gone", "removed while open");
    write("gone-lower", "lower content");
    write("replaced", "old");
    write("replacement", "new");
    std::fs::create_dir(lower.join("many")).unwrap();
    for number in 0..3000 {
        write(&format!("many/{number:05}"), "");
    }
    std::fs::create_dir(lower.join("removed")).unwrap();
    std::fs::copy("/bin/sleep", lower.join("program")).unwrap();
    std::fs::copy("/bin/sleep", lower.join("executed")).unwrap();
    write("path-lower", "a");
    write("path-copied", "b");
    write("path-linked", "c");
    std::os::unix::fs::symlink("lower target", lower.join("symlink-lower")).unwrap();
}

#[test]
fn open_files_continue_after_the_daemon_was_killed() {
    if !can(NEEDS) {
        return;
    }
    for options in [
        "keeper=on",
        "keeper=on,passthrough=off",
        "keeper=on,timeout=0",
        "keeper=on,passthrough=all,metacopy=off",
    ] {
        let dir = Scratch::new("killed-open");
        let stack = stack(&dir);
        fill(&stack.lowers[0]);
        let overlay = Overlay::cowlfs(&stack, &dir.make("m"), options);
        let mut script = Script::start("killed_daemon.py", &[overlay.path().to_str().unwrap()]);
        assert_eq!(script.read(), "ready", "{options}");
        for round in 0..6 {
            // Also without a kill in between, and with two.
            for _ in 0..round % 3 {
                kill_daemon(&overlay);
            }
            script.tell("check");
            assert_eq!(script.read(), "checked", "{options}, round {round}");
        }
        script.tell("end");
        assert_eq!(script.read(), "done", "{options}");
        assert!(script.0.wait().unwrap().success());
        overlay.unmount();
    }
}

#[test]
fn every_change_is_made_exactly_once() {
    if !can(NEEDS) {
        return;
    }
    const WORKERS: usize = 3;
    for options in ["keeper=on", "keeper=on,metacopy=off,timeout=0"] {
        let dir = Scratch::new("exactly-once");
        let stack = stack(&dir);
        let lower = stack.lowers[0].join("lower");
        std::fs::create_dir(&lower).unwrap();
        for worker in 0..WORKERS {
            for number in 0..900 {
                let name = format!("{worker}-{number}");
                std::fs::write(lower.join(&name), &name).unwrap();
                let inner = lower.join(format!("dir{name}"));
                std::fs::create_dir(&inner).unwrap();
                std::fs::write(inner.join("inner"), "inner").unwrap();
            }
        }
        let overlay = Overlay::cowlfs(&stack, &dir.make("m"), options);
        let top = overlay.path().to_str().unwrap().to_owned();
        let killer = Killer::start(overlay.path(), 20..=80);
        let scripts: Vec<_> = (0..WORKERS)
            .map(|worker| Script::start("exactly_once.py", &[&top, &worker.to_string(), "6"]))
            .collect();
        for mut script in scripts {
            let rounds = script.read();
            assert!(script.0.wait().unwrap().success(), "{options}: {rounds}");
            assert!(rounds.parse::<u32>().unwrap() > 0, "{rounds}");
        }
        let kills = killer.stop();
        assert!(kills >= 10, "{kills} kills");
        wait_until("another daemon", || overlay.pid() != overlay.program());
        overlay.unmount();
        // Nothing is left of interrupted changes.
        let mut left = std::fs::read_dir(dir.join("work/work")).unwrap();
        let left = left.find(|entry| {
            !entry
                .as_ref()
                .unwrap()
                .file_name()
                .as_encoded_bytes()
                .starts_with(b"#")
        });
        assert!(left.is_none(), "{left:?}");
    }
}

fn kill_process(pid: u32) {
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
}

#[test]
fn mount_gets_a_new_keeper() {
    if !can(NEEDS) {
        return;
    }
    for options in ["keeper=on", "keeper=on,passthrough=off"] {
        let dir = Scratch::new("killed-keeper");
        let stack = stack(&dir);
        fill(&stack.lowers[0]);
        let name = dir.join("m").to_str().unwrap().to_owned();
        let tag = format!("COWL_TEST_TAG={name}");
        let variables = [("COWL_TEST_TAG", name.as_str())];
        let overlay = Overlay::cowlfs_with(&stack, &dir.make("m"), options, &variables);
        let path = overlay.path().to_owned();
        let wait_for_pair = |is_wanted: &dyn Fn((u32, u32)) -> bool| {
            let mut found = None;
            wait_until("a keeper and a daemon", || {
                found = find_pair(&tag).filter(|pair| is_wanted(*pair));
                found.is_some()
            });
            found.unwrap()
        };
        let mut pair = wait_for_pair(&|_| true);
        let mut script = Script::start("killed_daemon.py", &[path.to_str().unwrap()]);
        assert_eq!(script.read(), "ready", "{options}");
        let mut random = u64::from(std::process::id()) | 1;
        for round in 0..20 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let (keeper, daemon) = pair;
            let killed = match random % 3 {
                0 => daemon,
                _ => keeper,
            };
            kill_process(killed);
            pair = wait_for_pair(&|(one, two)| ![one, two].contains(&killed));
            if round % 2 == 0 {
                script.tell("check");
                let checked = script.read();
                assert_eq!(
                    checked, "checked",
                    "{options}, {round}: {keeper} {daemon} {killed}"
                );
            }
        }
        script.tell("end");
        assert_eq!(script.read(), "done", "{options}");
        assert!(script.0.wait().unwrap().success());
        std::fs::write(path.join("file"), "written").unwrap();
        mount::unmount_free(&path);
        wait_until("the end of all processes", || {
            with_variable(&tag).is_empty()
        });
        assert_eq!(std::fs::read(dir.join("upper/file")).unwrap(), b"written");
        drop(overlay);
    }
}

#[test]
fn mount_without_a_keeper_ends_with_its_daemon() {
    if !can(NEEDS) {
        return;
    }
    let dir = Scratch::new("no-keeper");
    let overlay = Overlay::cowlfs(&stack(&dir), &dir.make("m"), "keeper=off");
    assert_eq!(overlay.pid(), overlay.program());
    kill_both(overlay.pid().unwrap());
    wait_until("a dead mount", || {
        let found = std::fs::read_dir(overlay.path());
        found.is_err_and(|error| error.raw_os_error() == Some(nix::libc::ENOTCONN))
    });
}

#[test]
fn a_mount_from_fstab_outlives_its_daemon() {
    if !can(NEEDS) || !can(&[Need::Program("mount.fuse")]) {
        return;
    }
    let dir = Scratch::new("fstab");
    let (lower, mount_point) = (dir.make("lower"), dir.make("mounted"));
    let (upper, work) = (dir.make("upper"), dir.make("work"));
    std::fs::write(lower.join("file"), "below").unwrap();
    let program = cowl_tests::programs::cowlfs();
    let line = format!(
        "{}#overlay {} fuse lowerdir={},upperdir={},workdir={},noauto 0 0\n",
        program.display(),
        mount_point.display(),
        lower.display(),
        upper.display(),
        work.display()
    );
    let fstab = dir.join("fstab");
    std::fs::write(&fstab, line).unwrap();
    let args = [Path::new("-T"), &fstab, &mount_point];
    cowl_tests::command::run("mount", args).ok();
    let held = std::fs::File::open(mount_point.join("file")).unwrap();
    let text = mount_point.to_str().unwrap().as_bytes();
    for round in 0..10 {
        wait_until("a daemon", || daemons(text).len() == 1);
        let Some(daemon) = daemons(text).pop() else {
            panic!("the daemon ended by itself");
        };
        kill(Pid::from_raw(daemon.cast_signed()), Signal::SIGKILL).unwrap();
        std::fs::write(mount_point.join(format!("new{round}")), "new").unwrap();
        wait_until("another daemon", || !daemons(text).contains(&daemon));
    }
    assert_eq!(std::io::read_to_string(&held).unwrap(), "below");
    assert_eq!(std::fs::read_dir(&upper).unwrap().count(), 10);
    drop(held);
    cowl_tests::command::run("umount", [&mount_point]).ok();
    wait_until("the end", || daemons(text).is_empty());
}
