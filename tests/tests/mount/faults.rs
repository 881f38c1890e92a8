//! Requests that end the daemon by a fault fail with EIO, and the mount lives (docs/decisions/0035).
//!
//! The faults are injected by a variable that only programs with debug assertions read.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use cowl_tests::conditions::{Need, can};
use cowl_tests::killer::daemon_of;
use cowl_tests::mount::{Overlay, Stack, wait_until};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;
use nix::libc::{EIO, O_TRUNC};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;

const NEEDS: &[Need] = &[Need::Root, Need::Fuse];

/// Whether the program under test contains the injected faults.
fn can_inject() -> bool {
    programs::cowlfs()
        .parent()
        .is_some_and(|dir| dir.ends_with("debug"))
}

fn mounted(dir: &Scratch, options: &str, fault: &str) -> Overlay {
    let stack = Stack {
        lowers: vec![dir.make("lower")],
        upper: Some((dir.make("upper"), dir.make("work"))),
    };
    for name in ["one", "two"] {
        fs::write(stack.lowers[0].join(name), "lower").unwrap();
    }
    let variables = [("COWL_TEST_FAULT", fault)];
    Overlay::cowlfs_with(&stack, &dir.make("m"), options, &variables)
}

fn errno<T>(done: std::io::Result<T>) -> Option<i32> {
    done.err().and_then(|error| error.raw_os_error())
}

/// Sets a flag when it is dropped, also by a panic.
struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Changes other files until `stop` is set.
fn work_beside(path: &Path, stop: &AtomicBool) -> u32 {
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        let file = path.join("beside");
        fs::write(&file, rounds.to_string()).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), rounds.to_string());
        fs::rename(&file, path.join("moved")).unwrap();
        rounds += 1;
    }
    rounds
}

#[test]
fn request_that_ends_the_daemon_fails_with_eio() {
    if !can(NEEDS) || !can_inject() {
        return;
    }
    for action in ["segv", "overflow", "bus", "ill", "abort"] {
        let dir = Scratch::new("fault-create");
        let overlay = mounted(&dir, "keeper=on", &format!("{action} create bad"));
        let path = overlay.path();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let beside = scope.spawn(|| work_beside(path, &stop));
            let stopping = Stopping(&stop);
            for round in 0..3 {
                let created = File::create(path.join("bad"));
                assert_eq!(errno(created), Some(EIO), "{action}, round {round}");
                fs::write(path.join("good"), action).unwrap();
            }
            drop(stopping);
            assert!(beside.join().unwrap() > 0, "{action}");
        });
        assert!(!path.join("bad").try_exists().unwrap());
        overlay.unmount();
        assert_eq!(fs::read_to_string(dir.join("upper/good")).unwrap(), action);
    }
}

#[test]
fn requests_of_many_programs_that_end_the_daemon_fail_with_eio() {
    if !can(NEEDS) || !can_inject() {
        return;
    }
    let dir = Scratch::new("fault-many");
    let overlay = mounted(&dir, "keeper=on", "segv getxattr user.bad");
    let path = overlay.path();
    std::thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                let file = File::open(path.join("one")).unwrap();
                let mut value = [0; 10];
                let got = rustix::fs::fgetxattr(&file, "user.bad", &mut value[..]);
                assert_eq!(got, Err(rustix::io::Errno::IO));
            });
        }
    });
    assert_eq!(fs::read(path.join("one")).unwrap(), b"lower");
    overlay.unmount();
}

#[test]
fn writes_and_closes_that_end_the_daemon_leave_a_mount_that_can_be_unmounted() {
    if !can(NEEDS) || !can_inject() {
        return;
    }
    for (request, wanted) in [
        ("write", Some(EIO)),
        ("release", None),
        ("setattr", Some(EIO)),
    ] {
        let dir = Scratch::new("fault-write");
        // The daemon serves the upper layer, and is notified of each close.
        let options = "keeper=on,passthrough=read";
        let overlay = mounted(&dir, options, &format!("segv {request}"));
        let path = overlay.path();
        let mut truncating = File::options();
        truncating.write(true).custom_flags(O_TRUNC);
        let mut file = truncating.open(path.join("one")).unwrap();
        let done = match request {
            "setattr" => file.set_len(3),
            _ => file.write_all(b"text"),
        };
        assert_eq!(errno(done), wanted, "{request}");
        drop(file);
        assert_eq!(fs::read(path.join("two")).unwrap(), b"lower");
        overlay.unmount();
    }
}

#[test]
fn reading_ahead_that_ends_the_daemon_is_not_repeated() {
    if !can(NEEDS) || !can_inject() {
        return;
    }
    let dir = Scratch::new("fault-ahead");
    let overlay = mounted(&dir, "keeper=on", "segv readahead");
    let path = overlay.path();
    let keeper = overlay.program().unwrap();
    let mut daemons = BTreeSet::new();
    for round in 0..20 {
        fs::write(path.join(format!("new{round}")), "text").unwrap();
        let names = fs::read_dir(path).unwrap().map(Result::unwrap);
        let created = names.filter(|entry| entry.file_name().as_bytes().starts_with(b"new"));
        assert_eq!(created.count(), round + 1);
        daemons.extend(daemon_of(keeper));
    }
    assert!(daemons.len() <= 2, "{daemons:?}");
    overlay.unmount();
}

#[test]
fn request_that_is_slow_is_never_blamed_for_kills() {
    if !can(NEEDS) || !can_inject() {
        return;
    }
    let dir = Scratch::new("fault-slow");
    let overlay = mounted(&dir, "keeper=on", "slow mkdir slow");
    let path = overlay.path();
    let keeper = overlay.program().unwrap();
    wait_until("a daemon", || daemon_of(keeper).is_some());
    std::thread::scope(|scope| {
        let made = scope.spawn(|| fs::create_dir(path.join("slow")));
        for _ in 0..10 {
            std::thread::sleep(std::time::Duration::from_millis(300));
            let killed = daemon_of(keeper).unwrap();
            kill(Pid::from_raw(killed.cast_signed()), Signal::SIGKILL).unwrap();
            wait_until("another daemon", || {
                daemon_of(keeper).is_some_and(|other| other != killed)
            });
        }
        made.join().unwrap().unwrap();
    });
    assert!(path.join("slow").is_dir());
    overlay.unmount();
}
