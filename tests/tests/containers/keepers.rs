//! Containers whose keeper or daemon is killed or stopped: what continues, and what commands report.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use cowl_tests::command::{run, run_command};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::killer::daemon_of;
use cowl_tests::mount::wait_until;
use cowl_tests::process::{Inside, signal};

const NEEDS: &[Need] = &[Need::Root, Need::Fuse];

fn mounted() -> (Store, PathBuf) {
    let store = Store::for_test().with_keepers();
    let source = store.scratch().make("source");
    fs::write(source.join("file"), "one\n").unwrap();
    store.create("web", &source);
    let root = store.mount("web");
    wait_until("a daemon", || daemon_of(store.pid("web")).is_some());
    (store, root)
}

fn has_ended(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.is_empty() || status.contains("State:\tZ")
}

#[test]
fn container_gets_a_new_keeper() {
    if !can(NEEDS) {
        return;
    }
    let (store, root) = mounted();
    let open = fs::File::open(root.join("file")).unwrap();
    let inside = Inside::of(&root);
    for round in 0..3 {
        let keeper = store.pid("web");
        signal(keeper, "-KILL");
        wait_until("another keeper", || {
            let pid = store.pid("web");
            pid != keeper && daemon_of(pid).is_some()
        });
        let keeper = store.pid("web");
        let daemon = daemon_of(keeper).unwrap();
        signal(daemon, "-KILL");
        fs::write(root.join("new"), round.to_string()).unwrap();
        store.cowl(["snapshot", "web"]).ok();
        assert_eq!(store.pid("web"), keeper);
        let status = store.cowl(["status", "web", "--json"]).ok().json();
        assert_eq!(status["keeper"], "running", "{status}");
        assert_eq!(status["state"], "mounted", "{status}");
    }
    let mut content = String::new();
    std::io::Read::read_to_string(&mut &open, &mut content).unwrap();
    assert_eq!(content, "one\n");
    drop((open, inside));
    let keeper = store.pid("web");
    store.cowl(["umount", "web"]).ok();
    wait_until("the keeper's end", || has_ended(keeper));
}

#[test]
fn counters_continue_after_a_kill() {
    if !can(NEEDS) {
        return;
    }
    let (store, root) = mounted();
    let keeper = store.pid("web");
    for round in 0..5 {
        fs::create_dir(root.join(format!("dir{round}"))).unwrap();
        let daemon = daemon_of(keeper).unwrap();
        signal(daemon, "-KILL");
        wait_until("another daemon", || {
            daemon_of(keeper).is_some_and(|other| other != daemon)
        });
    }
    let stats = store.cowl(["stats", "web", "--json"]).ok().json();
    let made = stats["requests"]["mkdir"].as_u64().unwrap();
    // A request that was sent again is counted again.
    assert!((5..=10).contains(&made), "{stats}");
    assert_eq!(stats["refused"], 0);
    assert_eq!(stats["keeper"], "running");
    store.cowl(["umount", "web"]).ok();
}

#[test]
fn container_is_served_without_a_keeper_that_cannot_be_started() {
    let needs = [NEEDS, &[Need::Program("strace")]].concat();
    if !can(&needs) {
        return;
    }
    let (store, root) = mounted();
    let keeper = store.pid("web");
    let daemon = daemon_of(keeper).unwrap();
    let mut strace = Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=execve"])
        .args([
            "-e",
            "inject=execve:error=EACCES",
            "-p",
            &daemon.to_string(),
        ])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let traced = format!("TracerPid:\t{}", strace.id());
    wait_until("strace", || {
        let status = fs::read_to_string(format!("/proc/{daemon}/status"));
        status.is_ok_and(|status| status.contains(&traced))
    });
    signal(keeper, "-KILL");
    wait_until("the loss of the keeper", || {
        let stats = store.cowl(["stats", "web", "--json"]).ok().json();
        stats["keeper"] == "lost"
    });
    let log = store.cowl(["status", "web", "--json"]).ok();
    assert_eq!(log.json()["pid"], daemon);
    assert!(log.err().contains("keeper was killed"), "{}", log.report());
    let file = fs::File::create(root.join("unnamed")).unwrap();
    fs::remove_file(root.join("unnamed")).unwrap();
    fs::create_dir(root.join("dir")).unwrap();
    fs::remove_dir(root.join("dir")).unwrap();
    strace.kill().unwrap();
    strace.wait().unwrap();
    wait_until("another keeper", || daemon_of(store.pid("web")).is_some());
    let keeper = store.pid("web");
    signal(daemon_of(keeper).unwrap(), "-KILL");
    std::io::Write::write_all(&mut &file, b"text").unwrap();
    drop(file);
    store.cowl(["umount", "web"]).ok();
}

/// Ends each daemon of a keeper, not by the fault of a request, until the keeper gives the mount up.
fn make_give_up(keeper: u32) {
    let mut killed = Vec::new();
    wait_until("the keeper's end", || {
        if let Some(daemon) = daemon_of(keeper).filter(|daemon| !killed.contains(daemon)) {
            signal(daemon, "-ABRT");
            killed.push(daemon);
        }
        has_ended(keeper)
    });
}

#[test]
fn mount_that_was_given_up_is_explained() {
    if !can(NEEDS) {
        return;
    }
    let (store, root) = mounted();
    let inside = Inside::of(&root);
    let keeper = store.pid("web");
    make_give_up(keeper);
    let reason = "5 daemons in a row ended before they answered a request";
    let commands = "cowl umount web; cowl mount web";
    let list = store.cowl(["list", "--json"]).ok();
    let container = &list.json()["containers"][0];
    assert_eq!(container["state"], "dead", "{}", list.report());
    assert_eq!(container["ended"], reason);
    let list = store.cowl(["list"]).ok();
    for words in [reason, commands] {
        assert!(list.err().contains(words), "{}", list.report());
    }
    let status = store.cowl(["status", "web", "--json"]).ok();
    for words in [reason, commands, "mounted again"] {
        assert!(status.err().contains(words), "{}", status.report());
    }
    assert_eq!(status.json()["dead_mounts"][0]["reason"], reason);
    let log = status.json()["log"].as_str().unwrap().to_owned();
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains(reason) && log.contains(commands), "{log}");
    drop(inside);
    store.cowl(["umount", "web"]).ok();
    let list = store.cowl(["list", "--json"]).ok().json();
    assert_eq!(list["containers"][0]["state"], "not-mounted");
}

/// A process with an exclusive lock on a file that has the inode number of a daemon's lock, on another file system.
struct Bystander(Child, PathBuf);

fn bystander(store: &Store, disk: &Path) -> Bystander {
    let run_dirs = store.run_dirs();
    let mut files = run_dirs.iter().flat_map(|dir| fs::read_dir(dir).unwrap());
    let is_lock = |path: &PathBuf| {
        let name = path.file_name().unwrap().as_encoded_bytes();
        name.ends_with(b".lock") && !name.starts_with(b"exec")
    };
    let lock = files.find_map(|file| Some(file.unwrap().path()).filter(is_lock));
    let wanted = fs::metadata(lock.unwrap()).unwrap().ino();
    run("mount", ["-t", "tmpfs", "tmpfs", disk.to_str().unwrap()]).ok();
    // The inode numbers of a tmpfs ascend.
    let file = disk.join("file");
    loop {
        fs::write(&file, "").unwrap();
        let own = fs::metadata(&file).unwrap().ino();
        if own == wanted {
            break;
        }
        assert!(own < wanted, "{own} > {wanted}");
        fs::remove_file(&file).unwrap();
    }
    let ready = disk.join("ready");
    let child = Command::new("flock")
        .arg(&file)
        .args(["sh", "-c", "touch \"$1\"; exec sleep 1000", "sh"])
        .arg(&ready)
        .spawn()
        .unwrap();
    wait_until("the lock", || ready.try_exists().unwrap());
    Bystander(child, disk.to_owned())
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let ended = self.0.try_wait().unwrap();
        run("pkill", ["-P", &self.0.id().to_string()]);
        self.0.wait().unwrap();
        run("umount", [&self.1]).ok();
        assert!(ended.is_none() || std::thread::panicking(), "it was killed");
    }
}

#[test]
fn stopped_processes_of_a_mount_are_ended_by_force() {
    if !can(NEEDS) {
        return;
    }
    for stopped in ["the keeper", "the daemon", "both"] {
        let (store, _) = mounted();
        let keeper = store.pid("web");
        let daemon = daemon_of(keeper).unwrap();
        if stopped != "the daemon" {
            signal(keeper, "-STOP");
        }
        if stopped != "the keeper" {
            signal(daemon, "-STOP");
        }
        let disk = store.scratch().make(stopped);
        let bystander = bystander(&store, &disk);
        store.cowl(["umount", "--force", "web"]).ok();
        drop(bystander);
        for pid in [keeper, daemon] {
            wait_until("the process's end", || has_ended(pid));
        }
        // The layers are not locked any more.
        store.cowl(["mount", "web"]).ok();
        store.cowl(["umount", "web"]).ok();
    }
}

#[test]
fn refused_requests_are_counted() {
    let is_debug = cowl_tests::programs::cowl()
        .parent()
        .is_some_and(|dir| dir.ends_with("debug"));
    if !can(NEEDS) || !is_debug {
        return;
    }
    let store = Store::for_test().with_keepers();
    let source = store.scratch().make("source");
    store.create("web", &source);
    let mut command = store.command(["mount", "web"]);
    command.env("COWL_TEST_FAULT", "segv symlink bad");
    let root = PathBuf::from(run_command(command, b"").ok().out().trim());
    let made = std::os::unix::fs::symlink("target", root.join("bad"));
    assert_eq!(made.unwrap_err().raw_os_error(), Some(nix::libc::EIO));
    let stats = store.cowl(["stats", "web", "--json"]).ok().json();
    assert_eq!(stats["refused"], 1);
    let status = store.cowl(["status", "web", "--json"]).ok().json();
    let log = fs::read_to_string(status["log"].as_str().unwrap()).unwrap();
    assert!(
        log.contains("symlink of inode 1, name bad: refused"),
        "{log}"
    );
    store.cowl(["umount", "web"]).ok();
}

/// Mounts a snapshot, and returns its keeper.
fn mounted_snapshot(store: &Store) -> u32 {
    store.cowl(["mount", "web@snap0"]).ok();
    let status = store.cowl(["status", "web", "--json"]).ok().json();
    let keeper = status["browsed"][0]["pid"].as_u64().unwrap();
    let keeper = u32::try_from(keeper).unwrap();
    wait_until("a daemon", || daemon_of(keeper).is_some());
    keeper
}

#[test]
fn mounted_snapshots_are_ended_by_force_or_explained_when_given_up() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test().with_keepers();
    let source = store.scratch().make("source");
    store.create("web", &source);
    store.cowl(["snapshot", "web"]).ok();
    for stopped in ["the keeper", "the daemon", "both"] {
        let keeper = mounted_snapshot(&store);
        let daemon = daemon_of(keeper).unwrap();
        if stopped != "the daemon" {
            signal(keeper, "-STOP");
        }
        if stopped != "the keeper" {
            signal(daemon, "-STOP");
        }
        store.cowl(["umount", "--force", "web@snap0"]).ok();
        for pid in [keeper, daemon] {
            wait_until("the process's end", || has_ended(pid));
        }
    }
    let keeper = mounted_snapshot(&store);
    make_give_up(keeper);
    let next = store.cowl(["snapshot", "web"]).ok();
    let reason = "5 daemons in a row ended before they answered a request";
    assert!(next.err().contains(reason), "{}", next.report());
    mounted_snapshot(&store);
    store.cowl(["umount", "web@snap0"]).ok();
}
