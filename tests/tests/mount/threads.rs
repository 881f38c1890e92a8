//! The threads of a mount: no request waits for an unrelated one, and idle CPUs are kept awake if that is requested.

use std::fs;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use cowl_tests::conditions::{Need, can};
use cowl_tests::mount::{Overlay, Stack, wait_until};
use cowl_tests::scratch::Scratch;
use rustix::process::{Pid, Signal, kill_process};

const NEEDS: &[Need] = &[Need::Root, Need::Fuse];
const DEVICE: &str = "/dev/cpu_dma_latency";

/// A daemon that is stopped, as a disk that does not answer.
struct Stopped(Pid);

impl Stopped {
    fn new(overlay: &Overlay) -> Self {
        let pid = Pid::from_raw(overlay.pid().unwrap().cast_signed()).unwrap();
        kill_process(pid, Signal::STOP).unwrap();
        let stopped = Self(pid);
        // Each thread continues to run until the signal reaches it.
        wait_until("all its threads have stopped", || {
            let tasks = format!("/proc/{}/task", pid.as_raw_nonzero());
            fs::read_dir(tasks).unwrap().all(|task| {
                let stat = fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
                stat.rsplit_once(") ").unwrap().1.starts_with('T')
            })
        });
        stopped
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        kill_process(self.0, Signal::CONT).unwrap();
    }
}

fn plant(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    for file in 0..50 {
        fs::write(dir.join(format!("f{file}")), "a few bytes\n").unwrap();
    }
}

/// A request without a reply within this time waits for the others.
const PATIENCE: Duration = Duration::from_secs(60);
/// The number of programs that wait for the unresponsive layer.
const HUNG: usize = 3;

#[test]
fn an_unresponsive_layer_delays_no_other_request() {
    if !can(NEEDS) {
        return;
    }
    let scratch = Scratch::new("threads-held-up");
    plant(&scratch.make("below").join("slow"));
    plant(&scratch.make("fast").join("fast"));
    let lazy = Overlay::cowlfs(
        &Stack::of(&[&scratch.join("below")]),
        &scratch.make("lazy"),
        "",
    );
    let stack = Stack {
        lowers: vec![scratch.join("fast"), scratch.join("lazy")],
        upper: Some((scratch.make("upper"), scratch.make("work"))),
    };
    let overlay = Overlay::cowlfs(&stack, &scratch.make("m"), "");
    let mount_point = overlay.path().to_owned();
    // The kernel has both directories cached from here on.
    for dir in ["slow", "fast"] {
        fs::metadata(mount_point.join(dir)).unwrap();
    }
    let stopped = Stopped::new(&lazy);
    let (done, answers) = mpsc::channel();
    let (finish, finished) = mpsc::channel();
    // In a thread of its own, so that the layer answers again also where this hangs.
    let fast = thread::spawn(move || {
        for hung in 0..HUNG {
            let (slow, done) = (mount_point.join(format!("slow/f{hung}")), done.clone());
            thread::spawn(move || {
                let found = fs::metadata(slow);
                done.send(found.map(|found| found.len())).unwrap();
            });
            // Until this one waits there is nothing to hold up.
            for round in 0..50 {
                let name = mount_point.join(format!("fast/new{hung}-{round}"));
                fs::write(&name, "x").unwrap();
                assert_eq!(fs::read(&name).unwrap(), b"x");
                fs::remove_file(&name).unwrap();
            }
        }
        for file in 0..50 {
            let found = fs::read(mount_point.join(format!("fast/f{file}"))).unwrap();
            assert_eq!(found, b"a few bytes\n");
        }
        finish.send(()).unwrap();
    });
    let answered = finished.recv_timeout(PATIENCE);
    let held_up = answers.try_recv().is_err();
    drop(stopped);
    fast.join().unwrap();
    assert_eq!(answered, Ok(()), "others wait for the layer");
    assert!(held_up, "no request waited for the layer");
    for _ in 0..HUNG {
        assert_eq!(answers.recv().unwrap().unwrap(), 12);
    }
    overlay.unmount();
    lazy.unmount();
}

/// Returns whether a daemon has the device open that keeps CPUs awake.
fn holds_device(overlay: &Overlay) -> bool {
    let descriptors = format!("/proc/{}/fd", overlay.pid().unwrap());
    let mut open = fs::read_dir(descriptors).unwrap();
    open.any(|fd| fs::read_link(fd.unwrap().path()).is_ok_and(|to| to == Path::new(DEVICE)))
}

/// Returns the latency limit of idle CPUs in microseconds: the strictest of all requests on the machine.
fn wished() -> i32 {
    i32::from_ne_bytes(fs::read(DEVICE).unwrap().try_into().unwrap())
}

#[test]
fn cpus_are_kept_awake_on_request() {
    if !can(NEEDS) {
        return;
    }
    // The mount also works if the device cannot be opened.
    let may = fs::OpenOptions::new().write(true).open(DEVICE).is_ok();
    let scratch = Scratch::new("threads-awake");
    plant(&scratch.make("lower"));
    for (options, holds) in [("awake=on", may), ("awake=off", false)] {
        let stack = Stack {
            lowers: vec![scratch.join("lower")],
            upper: Some((scratch.make("upper"), scratch.make("work"))),
        };
        let overlay = Overlay::cowlfs(&stack, &scratch.make("m"), options);
        if holds {
            // The daemon opens it when it has left the mount namespace in which the mount shows already.
            wait_until("the device is open", || holds_device(&overlay));
            wait_until("the CPUs are awake", || {
                for name in 0..50 {
                    let name = overlay.path().join(format!("n{name}"));
                    fs::write(&name, "x").unwrap();
                    fs::remove_file(&name).unwrap();
                }
                wished() == 0
            });
            wait_until("they may sleep again", || wished() > 0);
        }
        assert_eq!(
            fs::read(overlay.path().join("f0")).unwrap(),
            b"a few bytes\n"
        );
        assert_eq!(holds_device(&overlay), holds, "{options}");
        overlay.unmount();
        for name in ["m", "upper", "work"] {
            fs::remove_dir_all(scratch.join(name)).unwrap();
        }
    }
}
