//! Replacing the daemon of a mount of `cowlfs`, with files that the kernel accesses by passthrough.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cowl_tests::command::{Output, run_command};
use cowl_tests::conditions::{Need, can};
use cowl_tests::mount::{at, detach, unmount_free, wait_until};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;

/// A mount with a control socket, whose daemon runs in the background.
struct Mounted {
    scratch: Scratch,
    root: PathBuf,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if at(&self.root).is_some() {
            drop(detach(&self.root));
        }
    }
}

impl Mounted {
    fn new(options: &str) -> Mounted {
        let scratch = Scratch::for_test();
        let [lower, upper, work, root] =
            ["lower", "upper", "work", "root"].map(|name| scratch.make(name));
        for program in ["cat", "sleep"] {
            fs::copy(Path::new("/bin").join(program), lower.join(program)).unwrap();
        }
        fs::write(lower.join("lower"), "lower").unwrap();
        fs::write(upper.join("upper"), "upper").unwrap();
        let options = format!(
            "lowerdir={},upperdir={},workdir={},control={},{options}",
            lower.display(),
            upper.display(),
            work.display(),
            scratch.join("sock").display()
        );
        let mut command = Command::new(programs::cowlfs());
        command.arg("-o").arg(options).arg(&root);
        run_command(command, b"").ok();
        Mounted { scratch, root }
    }

    fn upgrade(&self) -> Output {
        let mut command = Command::new(programs::cowlfs());
        command.arg("--upgrade").arg(self.scratch.join("sock"));
        run_command(command, b"")
    }

    /// Replaces the daemon, and returns the process id of the new one.
    #[track_caller]
    fn upgraded(&self) -> u32 {
        let text = self.upgrade().ok().out();
        let pid = text
            .strip_prefix("pid ")
            .and_then(|text| text.split(':').next());
        pid.unwrap().parse().unwrap()
    }

    fn unmount(self, pid: u32) {
        unmount_free(&self.root);
        wait_until("the daemon has ended", || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.is_empty() || status.contains("State:\tZ")
        });
    }
}

#[test]
fn passthrough_files_remain_open_and_can_be_opened_again() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    for options in [
        "passthrough=all",
        "passthrough=all,coherence=overlay",
        "passthrough=off",
    ] {
        let mounted = Mounted::new(options);
        let root = mounted.root.as_path();
        let both = OpenOptions::new().read(true).write(true).clone();
        let upper = both.open(root.join("upper")).unwrap();
        let created = both
            .clone()
            .create_new(true)
            .open(root.join("created"))
            .unwrap();
        created.write_all_at(b"created", 0).unwrap();
        let lower = File::open(root.join("lower")).unwrap();
        let mut running = Command::new(root.join("sleep"))
            .arg("1000")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut pid = 0;
        for round in 0..5_u64 {
            pid = mounted.upgraded();
            let letter = [b'a' + u8::try_from(round).unwrap()];
            for (file, name) in [(&upper, "upper"), (&created, "created")] {
                file.write_all_at(&letter, round).unwrap();
                // The kernel accepts only the same backing file as that of the descriptor that is open.
                let again = both.open(root.join(name)).unwrap();
                let mut content = [0];
                again.read_exact_at(&mut content, round).unwrap();
                assert_eq!(content, letter, "{options} {name}");
                again.write_all_at(b"!", 6).unwrap();
                assert_eq!(file.metadata().unwrap().size(), 7);
            }
            let mut content = [0; 5];
            lower.read_exact_at(&mut content, 0).unwrap();
            assert_eq!(&content, b"lower");
            let mut cat = Command::new(root.join("cat"));
            cat.arg(root.join("upper"));
            let output = run_command(cat, b"").ok();
            assert_eq!(output.stdout.len(), 7);
        }
        running.kill().unwrap();
        running.wait().unwrap();
        drop((upper, created, lower));
        // After the last close, another backing file can be registered.
        fs::rename(root.join("created"), root.join("upper")).unwrap();
        assert_eq!(fs::read_to_string(root.join("upper")).unwrap(), "abcdee!");
        mounted.unmount(pid);
    }
}

#[test]
fn a_state_of_another_version_is_refused() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    for (bytes, reason) in [
        (
            b"cowltake\x63\0\0\0body".as_slice(),
            "has version 99; this program reads version",
        ),
        (b"cowltake\x03\0\0\0body", "its fields cannot be decoded"),
        (b"?", "does not begin with the magic number"),
    ] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut child = Command::new(programs::cowlfs())
            .arg("--take-over")
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut length = [0; 8];
        ours.read_exact(&mut length).unwrap();
        let mut hello = vec![0; usize::try_from(u64::from_le_bytes(length)).unwrap()];
        ours.read_exact(&mut hello).unwrap();
        ours.write_all(&(bytes.len() as u64).to_le_bytes()).unwrap();
        ours.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        ours.read_to_end(&mut answer).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1));
        let mut error = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut error)
            .unwrap();
        assert!(error.contains(reason), "{error}");
        assert!(
            cowl_tests::command::show(&answer).contains(reason),
            "{error}"
        );
    }
    let mut command = Command::new(programs::cowlfs());
    command.arg("--take-over").stdin(Stdio::null());
    run_command(command, b"").fails(1, &["cannot receive the state"]);
}

#[test]
fn a_socket_without_a_daemon_is_reported() {
    let mut command = Command::new(programs::cowlfs());
    command.args(["--upgrade", "/no/such/socket"]);
    run_command(command, b"").fails(1, &["cannot replace the daemon"]);
}

/// Returns the processes that have a descriptor of a mount's FUSE device and threads that read requests.
fn serving(root: &Path) -> Vec<u32> {
    let mut found = Vec::new();
    // A daemon has just begun to serve when it reports that it does, and its threads may not have their names yet.
    wait_until("a daemon that serves", || {
        found = have_threads(root);
        !found.is_empty()
    });
    found
}

/// Returns the processes that have the device of the mount open and threads that read requests.
fn have_threads(root: &Path) -> Vec<u32> {
    let minor = rustix::fs::minor(fs::metadata(root).unwrap().dev());
    let connection = format!("fuse_connection:\t{minor}\n");
    let entries = |path: String| fs::read_dir(path).into_iter().flatten().flatten();
    let pids = entries("/proc".to_owned())
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let has = |pid: u32, list: &str, file: &str, wanted: &str| {
        entries(format!("/proc/{pid}/{list}")).any(|entry| {
            let path = entry.path().join(file);
            let path = if file.is_empty() { entry.path() } else { path };
            fs::read_to_string(path).is_ok_and(|text| text.contains(wanted))
        })
    };
    pids.filter(|pid| has(*pid, "fdinfo", "", &connection) && has(*pid, "task", "comm", "fuser-"))
        .collect()
}

fn kill(pid: u32) {
    let raw = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    // It may have ended already.
    let _ended = rustix::process::kill_process(raw, rustix::process::Signal::KILL);
}

fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    let text: String = tasks
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .collect();
    text.split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect()
}

#[test]
fn a_daemon_that_is_killed_after_an_upgrade_is_replaced() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    for options in ["keeper=on,passthrough=all", "keeper=on,passthrough=off"] {
        let mounted = Mounted::new(options);
        let root = mounted.root.as_path();
        let both = OpenOptions::new().read(true).write(true).clone();
        let upper = both.open(root.join("upper")).unwrap();
        let lower = File::open(root.join("lower")).unwrap();
        let unlinked = both.clone().create_new(true).open(root.join("unlinked"));
        let unlinked = unlinked.unwrap();
        fs::remove_file(root.join("unlinked")).unwrap();
        let ino = lower.metadata().unwrap().ino();
        let mut pid = 0;
        for round in 0..6_u64 {
            pid = mounted.upgraded();
            for kills in 0..2 {
                let before = serving(root);
                assert_eq!(children(pid), before, "{options}: the daemon of the keeper");
                kill(before[0]);
                let letter = [b'a' + u8::try_from(round * 2 + kills).unwrap()];
                upper.write_all_at(&letter, 0).unwrap();
                unlinked.write_all_at(&letter, 0).unwrap();
                let mut content = [0];
                for file in [&upper, &unlinked, &both.open(root.join("upper")).unwrap()] {
                    file.read_exact_at(&mut content, 0).unwrap();
                    assert_eq!(content, letter, "{options}");
                }
                let mut content = [0; 5];
                lower.read_exact_at(&mut content, 0).unwrap();
                assert_eq!(&content, b"lower");
                assert_eq!(fs::metadata(root.join("lower")).unwrap().ino(), ino);
                assert_ne!(serving(root), before);
            }
        }
        drop((upper, lower, unlinked));
        mounted.unmount(pid);
    }
}

/// Two daemons must never serve one mount, and a kill at any moment must leave one.
#[test]
fn a_mount_survives_kills_during_upgrades() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let mounted = Mounted::new("keeper=on,passthrough=all");
    let root = mounted.root.as_path();
    let mut kept = File::create(root.join("kept")).unwrap();
    let mut replaced = 0;
    for round in 0..40_u64 {
        let [daemon] = serving(root)[..] else {
            panic!("{:?} serve", serving(root));
        };
        let mut command = Command::new(programs::cowlfs());
        command
            .arg("--upgrade")
            .arg(mounted.scratch.join("sock"))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut client = command.spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(round));
        // The process that takes over is a child of the daemon until that has ended.
        let victim = match round % 2 {
            0 => Some(daemon),
            _ => children(daemon).first().copied(),
        };
        if let Some(victim) = victim {
            kill(victim);
        }
        replaced += u64::from(client.wait().unwrap().success());
        writeln!(kept, "{round}").unwrap();
        let text = fs::read_to_string(root.join("kept")).unwrap();
        assert_eq!(text.lines().count() as u64, round + 1);
        assert_eq!(serving(root).len(), 1, "round {round}");
    }
    assert!(replaced > 0, "an upgrade succeeded");
    drop(kept);
    unmount_free(root);
}
