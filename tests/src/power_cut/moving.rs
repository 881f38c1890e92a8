//! Takes snapshots of a container on the logged disk while a program writes to files by passthrough, which move to the
//! new layer (docs/decisions/0043), and verifies the files and the snapshots after power cuts.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::disk::Log;
use super::judge::{Cuts, Findings};
use super::store::{Care, Content, LIVE, content, cowl, store_on};
use super::store_judge::{After, Shown};
use super::work::{Base, commit_often};
use crate::command::{Output, run_command};
use crate::random::rng::Rng;
use crate::scratch::Scratch;

/// The files to which the program writes: record N goes to the file N % 4.
const FILES: [&str; 4] = ["plain", "dir/one", "dir/two", "dir/linked"];
/// A second name of the last file.
const LINK: &str = "other-name";
/// The length of a record. Records are not aligned with blocks.
const RECORD: usize = 5000;
/// The ways of taking a snapshot.
const HOW: [&str; 3] = ["", "--sync", "--no-sync"];

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

/// The history of a run.
#[derive(Debug, Default)]
pub struct Past {
    /// The snapshots.
    pub snapshots: Vec<Taken>,
    /// The numbers of the records after which a file was synced, each with the time of the acknowledgment.
    pub synced: Vec<(u64, u64)>,
}

fn record(number: u64) -> Vec<u8> {
    let text = format!("{number:019} ");
    text.bytes().cycle().take(RECORD).collect()
}

/// Creates a container on a new disk, takes `count` snapshots of it while a program writes, and detaches the disk. An
/// image of the disk before the run is written to `before`. With [`Care::NoSync`], the program only claims to sync its files.
#[must_use]
pub fn run(
    scratch: &Scratch,
    base: &Base,
    (seed, care, count): (u64, Care, usize),
    before: &Path,
) -> (Past, Arc<Log>) {
    let (disk, mount_point) = base.make(scratch);
    let store = store_on(&mount_point);
    let run = |args: &[&str]| -> Output {
        let mut command = cowl(&store, Care::Whole);
        command.args(args);
        run_command(command, b"")
    };
    let root = scratch.make("root");
    std::fs::create_dir(root.join("dir")).unwrap();
    run(&["create", LIVE, "--from", root.to_str().unwrap()]).ok();
    let mounted = run(&["mount", LIVE, "--passthrough", "all"]).ok().out();
    let files = FILES.map(|name| create(&Path::new(&mounted).join(name)));
    std::fs::hard_link(
        Path::new(&mounted).join(FILES[3]),
        Path::new(&mounted).join(LINK),
    )
    .unwrap();
    crate::command::run("sync", ["-f".as_ref(), mount_point.as_os_str()]).ok();
    disk.watch(before);
    let log = disk.log();
    let over = AtomicBool::new(false);
    let mut past = Past::default();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write(&files, (seed, care), &log, &over));
        if seed % 2 == 0 {
            scope.spawn(|| commit_often(&mount_point, &over));
        }
        let taken = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            (0..count)
                .map(|number| snapshot(&run, HOW[number % HOW.len()], &log))
                .collect()
        }));
        over.store(true, Ordering::SeqCst);
        match taken {
            Ok(taken) => past.snapshots = taken,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        past.synced = writer.join().unwrap();
    });
    drop(files);
    for taken in &mut past.snapshots {
        taken.content = content(&run(&["export", &taken.address, "-"]).ok().stdout);
    }
    run(&["umount", LIVE]).ok();
    crate::mount::unmount_free(&mount_point);
    disk.unplug();
    (past, log)
}

fn create(path: &Path) -> File {
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap()
}

/// Writes records, and syncs the file after some of them. Returns these with the times of the acknowledgments.
fn write(
    files: &[File],
    (seed, care): (u64, Care),
    log: &Log,
    over: &AtomicBool,
) -> Vec<(u64, u64)> {
    let mut rng = Rng::new(seed ^ 43);
    let mut synced = Vec::new();
    for number in 0.. {
        if over.load(Ordering::SeqCst) {
            break;
        }
        let (file, offset) = location(number);
        let file = &files[file];
        file.write_all_at(&record(number), offset).unwrap();
        if rng.chance(30) {
            if care == Care::Whole {
                file.sync_data().unwrap();
            }
            synced.push((number, log.now()));
        }
        std::thread::sleep(Duration::from_micros(rng.below(3000)));
    }
    synced
}

/// Returns the file of a record, and the offset there.
fn location(number: u64) -> (usize, u64) {
    let count = FILES.len() as u64;
    let file = usize::try_from(number % count).unwrap_or_default();
    (file, number / count * RECORD as u64)
}

fn snapshot(run: &dyn Fn(&[&str]) -> Output, how: &str, log: &Log) -> Taken {
    std::thread::sleep(Duration::from_millis(50));
    loop {
        let begin = log.now();
        let mut args = vec!["-v", "snapshot", LIVE];
        args.extend(Some(how).filter(|how| !how.is_empty()));
        let output = run(&args);
        if output.err().contains("changed them again") {
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

/// Makes cuts during each snapshot, and verifies the container after each.
#[must_use]
pub fn cut_often(
    scratch: &Scratch,
    base: &Base,
    past: &Past,
    (log, before): (&Log, &Path),
    (seed, cuts): (u64, u64),
) -> Findings {
    let mut findings = Findings::default();
    for (number, taken) in (0..).zip(&past.snapshots) {
        let cuts = Cuts {
            log,
            before,
            span: (taken.span.0, taken.span.1 + 1),
            count: cuts,
            seed: seed ^ number << 40,
        };
        findings += cuts.make(scratch, |image, moment| {
            let after = After::of(scratch, base, image, moment);
            let wrong = judge(&after, past, moment, &scratch.make("found"));
            after.end(image);
            wrong
        });
    }
    findings
}

fn judge(after: &After, past: &Past, moment: u64, found: &Path) -> Vec<String> {
    let mut wrong = Vec::new();
    let Some(shown) = after.shown(&mut wrong) else {
        return wrong;
    };
    for taken in &past.snapshots {
        let Some(state) = shown.get(&taken.address) else {
            if taken.span.1 <= moment {
                wrong.push(format!(
                    "{} was acknowledged, but does not exist",
                    taken.address
                ));
            }
            continue;
        };
        match state {
            Shown::Durable => {
                let export = after.must(&["export", &taken.address, "-"], &mut wrong);
                if export.is_none_or(|export| content(&export.stdout) != taken.content) {
                    wrong.push(format!("{} differs", taken.address));
                }
            }
            Shown::Incomplete if taken.is_durable && taken.span.1 <= moment => {
                wrong.push(format!("{} was durable, but is incomplete", taken.address));
            }
            Shown::Incomplete => {}
        }
    }
    after.must(&["check", "--repair"], &mut wrong);
    let copy = after.script(
        &format!(
            "trap '\"$@\" umount {LIVE} || :' EXIT; at=$(\"$@\" mount {LIVE}); cp -a \"$at\"/. {}; \
             test \"$at\"/{linked} -ef \"$at\"/{LINK} || {{ stat -c '%n %i %h %s' \"$at\"/{linked} \"$at\"/{LINK} >&2; \
             find {store} \\( -name {LINK} -o -name linked -o -path '*/tree/dir*' \\) -printf '%p %i %n %s\\n' >&2; exit 1; }}; \
             \"$@\" snapshot {LIVE} --sync",
            found.display(),
            linked = FILES[3],
            store = found.with_file_name("after").display(),
        ),
        [""; 0],
    );
    if copy.code != 0 {
        wrong.push(copy.report());
    }
    let check = after.must(&["check", "--deep"], &mut wrong);
    if let Some(check) = check.filter(|check| check.out().contains("damaged:")) {
        wrong.push(check.report());
    }
    wrong.extend(lost(found, past, moment));
    std::fs::remove_dir_all(found).unwrap();
    wrong
}

/// Returns the synced records that files do not contain.
fn lost(dir: &Path, past: &Past, moment: u64) -> Vec<String> {
    let mut wrong = Vec::new();
    for (index, name) in FILES.iter().enumerate() {
        let path: PathBuf = dir.join(name);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) => {
                wrong.push(format!("{name}: {error}"));
                continue;
            }
        };
        let acknowledged = past.synced.iter();
        let last = acknowledged
            .filter(|(number, at)| location(*number).0 == index && *at <= moment)
            .map(|(number, _)| *number)
            .max();
        let count = FILES.len();
        for number in (index as u64..=last.unwrap_or(0)).step_by(count) {
            if last.is_none() {
                break;
            }
            let start = usize::try_from(location(number).1).unwrap_or_default();
            if bytes.get(start..start + RECORD) != Some(&record(number)[..]) {
                wrong.push(format!(
                    "{name}: record {number} was synced, but is not intact ({} bytes)",
                    bytes.len()
                ));
            }
        }
    }
    wrong
}
