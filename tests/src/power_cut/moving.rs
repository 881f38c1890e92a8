//! Takes snapshots of a container on the logged disk while a program writes to files by passthrough, which move to the
//! new layer (docs/decisions/0043), and changes names. [`super::moving_judge`] verifies the files and the snapshots after
//! power cuts.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::disk::Log;
use super::phases::{Aim, sync_in_each};
use super::store::{Care, Content, LIVE, content, cowl, store_on};
use super::work::{Base, commit_often};
use crate::command::{Output, run_command};
use crate::lxc_stub::LxcStub;
use crate::scratch::Scratch;

/// The ways of taking a snapshot.
const HOW: [&str; 3] = ["", "--sync", "--no-sync"];
/// The time that the moves stay in each phase if the rig syncs the file system in each of them. All of them together must
/// take less than the daemon's limit of 2 seconds.
const MILLISECONDS: u64 = 500;
/// The point at the end of each phase of a move.
pub const PHASE: &str = "in a phase of a move";

/// A snapshot that was taken while the program wrote.
#[derive(Debug, Clone)]
pub struct Taken {
    /// LIVE@SNAP.
    pub address: String,
    /// The times at which the command began and ended.
    pub span: (u64, u64),
    /// Whether it was acknowledged as durable.
    pub is_durable: bool,
    /// Its content.
    pub content: Content,
}

/// The names of a file after a change, and the time at which they were acknowledged as durable.
#[derive(Debug, Clone, Default)]
pub struct Names {
    /// The paths, sorted.
    pub paths: Vec<String>,
    /// The time of the acknowledgment, if there was one.
    pub durable: Option<u64>,
}

/// The history of a run.
#[derive(Debug, Default)]
pub struct Past {
    /// The snapshots.
    pub snapshots: Vec<Taken>,
    /// The numbers of the records after which a file was synced, each with the time of the acknowledgment.
    pub synced: Vec<(u64, u64)>,
    /// The names of each file whose names change, after each change.
    pub names: BTreeMap<u64, Vec<Names>>,
    /// The moments at which phases of the moves were durable.
    pub aims: Vec<Aim>,
}

/// The parameters of a run.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Seed of the program.
    pub seed: u64,
    /// Whether the program syncs its files, or only claims to.
    pub care: Care,
    /// The number of snapshots.
    pub snapshots: usize,
    /// Whether to sync the file system in each phase of the moves, which then take longer. A missing sync is found only
    /// without this.
    pub aim: bool,
}

/// The program in the container.
struct Program(Child);

impl Program {
    fn start(top: &Path, plan: Plan) -> Program {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/power_cut/moving.py");
        let sync = match plan.care {
            Care::Whole => "1",
            Care::NoSync => "0",
        };
        let child = Command::new("python3")
            .arg(script)
            .arg(top)
            .args([&plan.seed.to_string(), sync])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starting python3");
        Program(child)
    }

    fn tell(&mut self) {
        let input = self.0.stdin.as_mut().expect("a pipe");
        input.write_all(b"\n").expect("writing to the program");
    }
}

/// Records what the program prints, until it ends.
fn listen(output: impl BufRead, log: &Log, past: &mut Past) {
    for line in output.lines() {
        let event: serde_json::Value =
            serde_json::from_str(&line.expect("a line")).expect("an event");
        let now = log.now();
        if let Some(number) = event["record"].as_u64() {
            past.synced.push((number, now));
        } else if let Some(file) = event["file"].as_u64() {
            let names = event["names"].as_array().expect("names").iter();
            let mut paths: Vec<_> = names
                .map(|name| name.as_str().expect("a path").to_owned())
                .collect();
            paths.sort();
            let durable = (event["synced"] == true).then_some(now);
            // At first it has no name.
            let all = past
                .names
                .entry(file)
                .or_insert_with(|| vec![Names::default()]);
            all.push(Names { paths, durable });
        }
    }
}

/// Creates a container on a new disk, takes snapshots of it while a program writes, and detaches the disk. An image of
/// the disk before the run is written to `before`.
///
/// On a file system without shared blocks, cowl stops the program for each snapshot, as one in an LXC container.
#[must_use]
pub fn run(scratch: &Scratch, base: &Base, plan: Plan, before: &Path) -> (Past, Arc<Log>) {
    let (disk, mount_point) = base.make(scratch);
    let store = store_on(&mount_point);
    let rootfs = mount_point.join("rootfs");
    std::fs::create_dir(&rootfs).expect("creating a directory");
    let stub = (base.kind == "ext4").then(|| LxcStub::new(scratch, LIVE, &rootfs));
    let run = |args: &[&str]| -> Output {
        let mut command = cowl(&store, Care::Whole);
        command.args(args);
        if plan.aim {
            command.env("COWL_DELAY", format!("{PHASE}/{MILLISECONDS}"));
        }
        if let Some(stub) = stub.as_ref().filter(|_| args.contains(&"snapshot")) {
            command.env("PATH", stub.path_variable());
        }
        run_command(command, b"")
    };
    match &stub {
        Some(stub) => {
            let mut command = cowl(&store, Care::Whole);
            command.args(stub.adopt());
            run_command(command, b"").ok();
        }
        None => {
            let from = rootfs.to_str().expect("a plain path");
            run(&["create", LIVE, "--from", from]).ok();
        }
    }
    let mounted = run(&["mount", LIVE, "--passthrough", "all"]).ok().out();
    let mut program = Program::start(Path::new(&mounted), plan);
    if let Some(stub) = &stub {
        stub.add(program.0.id());
    }
    let mut output = BufReader::new(program.0.stdout.take().expect("a pipe"));
    let mut ready = String::new();
    output.read_line(&mut ready).expect("a line");
    crate::command::run("sync", ["-f".as_ref(), mount_point.as_os_str()]).ok();
    disk.watch(before);
    let log = disk.log();
    let (over, current) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut past = Past::default();
    std::thread::scope(|scope| {
        let listener = scope.spawn(|| {
            let mut heard = Past::default();
            listen(output, &log, &mut heard);
            heard
        });
        let aims = plan
            .aim
            .then(|| scope.spawn(|| sync_in_each(&store, &log, (&current, &over))));
        if plan.seed.is_multiple_of(2) {
            scope.spawn(|| commit_often(&mount_point, &over));
        }
        program.tell();
        let take = |number: usize| {
            current.store(number, Ordering::SeqCst);
            snapshot(&run, HOW[number % HOW.len()], &log)
        };
        let taken = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            (0..plan.snapshots).map(take).collect()
        }));
        over.store(true, Ordering::SeqCst);
        program.tell();
        let ended = program.0.wait().expect("waiting for the program");
        past = listener.join().expect("the listener");
        past.aims = aims.map_or_else(Vec::new, |aims| aims.join().expect("the moments"));
        match taken {
            Ok(taken) => past.snapshots = taken,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        assert!(ended.success(), "the program failed");
    });
    for taken in &mut past.snapshots {
        taken.content = content(&run(&["export", &taken.address, "-"]).ok().stdout);
    }
    run(&["umount", LIVE]).ok();
    drop(stub);
    crate::mount::unmount_free(&mount_point);
    disk.unplug();
    (past, log)
}

fn snapshot(run: &dyn Fn(&[&str]) -> Output, how: &str, log: &Log) -> Taken {
    std::thread::sleep(Duration::from_millis(50));
    loop {
        let begin = log.now();
        let mut args = vec!["-v", "snapshot", LIVE];
        args.extend(Some(how).filter(|how| !how.is_empty()));
        let output = run(&args);
        let refusals = [
            "changed them again",
            "takes too long to copy",
            "requests were running",
        ];
        if output.code != 0 && refusals.iter().any(|text| output.err().contains(text)) {
            continue;
        }
        let output = output.ok();
        assert!(output.err().contains("were copied"), "{}", output.report());
        return Taken {
            address: format!("{LIVE}@{}", output.out()),
            span: (begin, log.now()),
            is_durable: how == "--sync",
            content: Content::default(),
        };
    }
}
