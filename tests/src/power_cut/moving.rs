//! Takes snapshots of a container on the logged disk while a program writes to files by passthrough, which move to the
//! new layer (docs/decisions/0043), and changes names. [`super::moving_judge`] verifies the files and the snapshots after
//! power cuts.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::disk::Log;
use super::phases::{Aim, Phase, sync_in_each};
use super::store::{Care, Content, LIVE, content, cowl, store_on};
use super::work::{Base, commit_often};
use crate::command::{Output, run_command};
use crate::lxc_stub::LxcStub;
use crate::scratch::Scratch;

/// The ways of taking a snapshot.
const HOW: [&str; 3] = ["", "--sync", "--no-sync"];
/// The time in milliseconds that the moves stay in each phase, if the rig syncs the file system in each of them. The
/// three until the files are linked must take less than the daemon's limit of 2 seconds.
const SHORT: u64 = 400;
/// The time for a snapshot that is refused: the limit must end in the third phase.
const LONG: u64 = 750;
/// The maximum number of attempts until such a snapshot is durable in its last phase.
const ATTEMPTS: usize = 20;
/// The maximum number of attempts until a snapshot succeeds while the program writes.
const MOST_REFUSED: usize = 100;
/// The number of records that are synced before the first snapshot.
const FIRST_SYNCED: usize = 20;
/// Messages of snapshots that fail because a program writes.
const REFUSALS: [&str; 3] = [
    "changed them again",
    "takes too long to copy",
    "requests were running",
];
/// The message of a snapshot that fails because an earlier one is not undone yet.
const UNDOING: &str = "still being undone";
/// The point at the end of each phase of a move.
pub const PHASE: &str = "in a phase of a move";
/// The point at which the files are linked into the new layer.
pub const LINKED: &str = "once files are linked";

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
    /// For each snapshot that was refused after its files were linked, the times at which the command began, and at which
    /// its result was durable.
    pub refused: Vec<(u64, u64)>,
    /// The moments at which phases of the moves were durable.
    pub aims: Vec<Aim>,
}

/// The snapshots of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Course {
    /// Each succeeds.
    Plain,
    /// Each succeeds, and the rig syncs the file system in each phase of the moves, which then take longer. A missing
    /// sync is found only without this.
    Synced,
    /// Each is refused after the files were linked into the new layer, with such syncs.
    Refused,
}

impl Course {
    /// Returns the time in milliseconds that the moves stay in each phase, if the rig syncs the file system in each.
    fn phase_time(self) -> Option<u64> {
        match self {
            Course::Plain => None,
            Course::Synced => Some(SHORT),
            Course::Refused => Some(LONG),
        }
    }
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
    /// Their results.
    pub course: Course,
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

/// Records what the program prints, until it ends. `synced` is the number of synced records.
fn listen(output: impl BufRead, log: &Log, past: &mut Past, synced: &AtomicUsize) {
    for line in output.lines() {
        let event: serde_json::Value =
            serde_json::from_str(&line.expect("a line")).expect("an event");
        let now = log.now();
        if let Some(number) = event["record"].as_u64() {
            past.synced.push((number, now));
            synced.store(past.synced.len(), Ordering::SeqCst);
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
        if let Some(time) = plan.course.phase_time() {
            command.env("COWL_DELAY", format!("{PHASE}/{time}"));
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
    sync(&mount_point);
    disk.watch(before);
    let log = disk.log();
    let (over, current) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (synced, aims) = (AtomicUsize::new(0), Mutex::default());
    let mut past = Past::default();
    std::thread::scope(|scope| {
        let listener = scope.spawn(|| {
            let mut heard = Past::default();
            listen(output, &log, &mut heard, &synced);
            heard
        });
        let is_aimed = plan.course.phase_time().is_some();
        if is_aimed {
            scope.spawn(|| sync_in_each(&store, &log, (&current, &over), &aims));
        }
        if plan.seed.is_multiple_of(2) {
            scope.spawn(|| commit_often(&mount_point, &over));
        }
        program.tell();
        let taken = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // A stopped program syncs nothing.
            crate::mount::wait_until("synced records", || {
                synced.load(Ordering::SeqCst) >= FIRST_SYNCED
            });
            take_snapshots(plan, (&run, &store), &log, (&current, &aims))
        }));
        over.store(true, Ordering::SeqCst);
        program.tell();
        let ended = program.0.wait().expect("waiting for the program");
        past = listener.join().expect("the listener");
        match taken {
            Ok((taken, refused)) => (past.snapshots, past.refused) = (taken, refused),
            Err(panic) => std::panic::resume_unwind(panic),
        }
        assert!(ended.success(), "the program failed");
    });
    past.aims = aims.into_inner().expect("the moments");
    for taken in &mut past.snapshots {
        taken.content = content(&run(&["export", &taken.address, "-"]).ok().stdout);
    }
    run(&["umount", LIVE]).ok();
    drop(stub);
    crate::mount::unmount_free(&mount_point);
    disk.unplug();
    (past, log)
}

/// Runs a command of cowl.
type Cowl<'a> = &'a dyn Fn(&[&str]) -> Output;

fn sync(dir: &Path) {
    crate::command::run("sync", ["-f".as_ref(), dir.as_os_str()]).ok();
}

/// Takes the snapshots of a run. Returns them, and the times at which refused ones began and were durable.
fn take_snapshots(
    plan: Plan,
    (run, store): (Cowl<'_>, &Path),
    log: &Log,
    (current, aims): (&AtomicUsize, &Mutex<Vec<Aim>>),
) -> (Vec<Taken>, Vec<(u64, u64)>) {
    let (mut taken, mut refused) = (Vec::new(), Vec::new());
    for number in 0..plan.snapshots {
        current.store(number, Ordering::SeqCst);
        let is_hit = || {
            let hit = |aim: &Aim| (aim.snapshot, aim.phase) == (number, Phase::Unlinking);
            aims.lock().expect("the moments").iter().any(hit)
        };
        match plan.course {
            Course::Refused => {
                let begin = refused_snapshot(run, log, &is_hit);
                sync(store);
                refused.push((begin, log.now()));
            }
            Course::Plain | Course::Synced => {
                taken.push(snapshot(run, HOW[number % HOW.len()], log));
            }
        }
    }
    (taken, refused)
}

fn is_refused(output: &Output) -> bool {
    output.code != 0 && REFUSALS.iter().any(|text| output.err().contains(text))
}

/// Attempts to take a snapshot until one is refused after its files were linked, and `is_hit` reports that this was
/// durable. Returns the time at which the command began.
fn refused_snapshot(run: &dyn Fn(&[&str]) -> Output, log: &Log, is_hit: &dyn Fn() -> bool) -> u64 {
    for _ in 0..ATTEMPTS {
        let begin = log.now();
        let output = run(&["-v", "snapshot", LIVE]);
        let is_expected = is_refused(&output) || output.err().contains(UNDOING);
        assert!(is_expected, "{}", output.report());
        // Others are refused earlier, because the program writes.
        if is_hit() {
            return begin;
        }
    }
    panic!("no snapshot of {ATTEMPTS} was refused after its files were linked");
}

fn snapshot(run: Cowl<'_>, how: &str, log: &Log) -> Taken {
    std::thread::sleep(Duration::from_millis(50));
    let mut last = String::new();
    for _ in 0..MOST_REFUSED {
        let begin = log.now();
        let mut args = vec!["-v", "snapshot", LIVE];
        args.extend(Some(how).filter(|how| !how.is_empty()));
        let output = run(&args);
        if is_refused(&output) {
            last = output.report();
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
    panic!("{MOST_REFUSED} snapshots were refused: {last}");
}
