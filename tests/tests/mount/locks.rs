//! Locks and leases between two processes: flock, record locks of processes and of open file descriptions, leases.
//! The same commands run on a mount and on a plain directory and must have the same results, also if the locked file
//! is copied up, moved, removed or accessed by another name in between.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Barrier;
use std::thread;

use cowl_tests::command::sh_in;
use cowl_tests::conditions::{Need, can};
use cowl_tests::mount::{Overlay, Stack};
use cowl_tests::scratch::Scratch;
use rustix::fs::{FlockOperation, flock};

const NEEDS: [Need; 3] = [Need::Root, Need::Fuse, Need::Program("python3")];

/// A process that executes commands, with files relative to its directory.
struct Locker {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Locker {
    fn new(dir: &Path) -> Locker {
        let mut child = Command::new("python3")
            .args(["-c", include_str!("../../src/locker.py")])
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Locker {
            orders: child.stdin.take(),
            answers: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    fn order(&mut self, line: &str) {
        writeln!(self.orders.as_mut().unwrap(), "{line}").unwrap();
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "the locker ended");
        line.trim_end().to_owned()
    }
}

impl Drop for Locker {
    fn drop(&mut self) {
        // The locker exits at the end of its input.
        self.orders = None;
        if let Err(error) = self.child.wait() {
            eprintln!("waiting for a locker: {error}");
        }
    }
}

/// Runs the commands of `script` in `dir`, and returns the output, each command with its result. Lines begin with the
/// process (`a`, `b`); `a+` does not wait for the result, `a?` waits for that result; `!` is a line for the shell.
fn play(dir: &Path, script: &str) -> Vec<String> {
    let mut lockers = [Locker::new(dir), Locker::new(dir)];
    let mut answers = Vec::new();
    for line in script
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
    {
        if let Some(shell) = line.strip_prefix('!') {
            sh_in(dir, shell).ok();
            continue;
        }
        let (name, order) = line.split_once(' ').unwrap_or((line, ""));
        let [a, b] = &mut lockers;
        let locker = if name.starts_with('a') { a } else { b };
        match name.get(1..).unwrap_or("") {
            "" => {
                locker.order(order);
                answers.push(format!("{line} -> {}", locker.answer()));
            }
            "+" => locker.order(order),
            _ => answers.push(format!("{line} -> {}", locker.answer())),
        }
    }
    answers
}

const CONTENT: &str = "mkdir dir; for f in one two three four five dir/six; do echo $f > $f; done
    ln one alias; ln five dir/alias; touch -d 2015-01-01 *";

/// Plays `script` on both; the answers named in `expected` must have been given, so that the script
/// itself is known to lock.
fn same(script: &str, expected: &[&str]) {
    if !can(&NEEDS) {
        return;
    }
    let scratch = Scratch::new("locks");
    let (lower, plain) = (scratch.make("lower"), scratch.make("plain"));
    sh_in(&lower, CONTENT).ok();
    sh_in(&plain, CONTENT).ok();
    let stack = Stack {
        lowers: vec![lower],
        upper: Some((scratch.make("upper"), scratch.make("work"))),
    };
    let mounted = Overlay::cowlfs(&stack, &scratch.make("tested"), "");
    let answers = play(&plain, script);
    for line in expected {
        assert!(
            answers.iter().any(|answer| answer == line),
            "{line}: {answers:#?}"
        );
    }
    assert_eq!(play(mounted.path(), script), answers, "mounted, then plain");
    // No process is left, so no lock and no open file may be left.
    mounted.unmount();
}

#[test]
fn flock_survives_copy_up_and_applies_to_all_names() {
    same(
        "a open r RDONLY one
         a flock r sh
         b open w RDWR one
         b flock w ex
         b flock w sh
         b write w more
         a flock r ex
         b flock w un
         a flock r ex
         b open other RDWR alias
         b flock other sh
         b+ flock_wait other ex
         a close r
         b? flock_wait other ex
         a open again RDONLY alias
         a flock again sh
         ! mv alias dir/moved
         a open moved RDONLY dir/moved
         a flock moved sh
         ! rm one dir/moved
         a flock moved sh
         b close other
         a flock moved sh
         a flock again ex",
        &["b flock w ex -> EAGAIN", "a flock moved sh -> ok"],
    );
}

#[test]
fn record_locks_belong_to_processes() {
    same(
        "a open f RDWR two
         a lock f w 0 10
         b open f RDONLY two
         b locked f r 0 0
         b lock f r 5 10
         b lock f r 10 10
         b open w RDWR two
         b lock w w 5 1
         b write w overwritten
         a locked f w 0 0
         b+ lock_wait w w 0 5
         a lock f u 0 5
         b? lock_wait w w 0 5
         a locked f w 0 0
         b close f
         a locked f w 0 0
         a lock f w 0 0
         b locked w w 3 1
         a open second RDONLY two
         a close second
         b lock w w 0 0
         a read f 0",
        &["b lock f r 5 10 -> EAGAIN", "b locked f r 0 0 -> w 0 10"],
    );
}

#[test]
fn record_locks_of_open_files_conflict_within_a_process() {
    same(
        "a open one RDONLY five
         a ofd one r 0 100
         a open two RDWR dir/alias
         a ofd two w 50 1
         a ofd two w 200 10
         a ofd_locked one r 0 0
         b open three RDWR five
         b ofd three w 205 1
         b lock three w 205 1
         a write two text
         b ofd_locked three w 0 0
         b+ ofd_wait three w 0 10
         a close one
         b? ofd_wait three w 0 10
         ! mv five dir/five
         a open late RDWR dir/five
         a ofd late w 0 1
         b close three
         a ofd late w 0 1",
        &["a ofd two w 50 1 -> EAGAIN", "a ofd late w 0 1 -> ok"],
    );
}

#[test]
fn leases_are_broken_by_an_open() {
    same(
        "a open r RDONLY three
         a lease r r
         a leased r
         b open r RDONLY three
         b open w WRONLY|NONBLOCK three
         a broken
         a lease r u
         b open w WRONLY|NONBLOCK three
         b write w more
         a lease r r
         b close w
         a lease r r
         b+ open w RDWR|TRUNC three
         a broken
         a leased r
         a close r
         b? open w RDWR|TRUNC three
         a open w RDWR dir/six
         a lease w w
         b open r RDONLY|NONBLOCK dir/six
         a broken
         a lease w r
         a lease w u
         b open r RDONLY|NONBLOCK dir/six
         a lease w w
         a open first RDONLY four
         a open second RDONLY four
         a lease first w
         a close second
         a lease first w
         a leased first",
        &[
            "b open w WRONLY|NONBLOCK three -> EAGAIN",
            "a lease w w -> ok",
            "a lease r r -> EAGAIN",
        ],
    );
}

/// Two openers of a lower file meet in its copy-up. Were they given two inodes, both would get the lock.
#[test]
fn only_one_of_several_first_writers_gets_the_lock() {
    const FILES: usize = 400;
    const WRITERS: usize = 3;
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let scratch = Scratch::for_test();
    let lower = scratch.make("lower");
    for number in 0..FILES {
        fs::write(lower.join(number.to_string()), "content").unwrap();
    }
    let stack = Stack {
        lowers: vec![lower],
        upper: Some((scratch.make("upper"), scratch.make("work"))),
    };
    let mounted = Overlay::cowlfs(&stack, &scratch.make("m"), "");
    let start = Barrier::new(WRITERS);
    let lock_all = || {
        let lock = |number: usize| {
            let path = mounted.path().join(number.to_string());
            start.wait();
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .unwrap();
            let locked = flock(&file, FlockOperation::NonBlockingLockExclusive);
            // Every file stays open until all have asked.
            start.wait();
            locked.is_ok()
        };
        (0..FILES).map(lock).collect::<Vec<bool>>()
    };
    let locked: Vec<Vec<bool>> = thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS).map(|_| scope.spawn(lock_all)).collect();
        writers
            .into_iter()
            .map(|writer| writer.join().unwrap())
            .collect()
    });
    for number in 0..FILES {
        let holders = locked.iter().filter(|got| got[number]).count();
        assert_eq!(holders, 1, "file {number}");
    }
    mounted.unmount();
}
