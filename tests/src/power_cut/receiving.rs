//! Receives a container into a store on the logged disk, cuts the power, and continues the transfer afterwards.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::disk::Log;
use super::judge::{Cuts, Findings};
use super::store::{Care, Content, content, cowl, store_on};
use super::store_judge::After;
use super::work::Base;
use crate::command::{Output, run_command};
use crate::random::rng::Rng;
use crate::scratch::Scratch;

/// The number of snapshots that are sent.
const SNAPSHOTS: usize = 6;
/// The number of snapshots in the first transfer; the second one adds the others.
const FIRST: usize = 3;

/// The history of a run.
#[derive(Debug)]
pub struct Past {
    /// The store from which the container is sent. It is not on the disk.
    source: PathBuf,
    /// The content of each snapshot.
    contents: Vec<Content>,
    /// The numbers of snapshots in the store, each with the time at which the transfer was acknowledged.
    acknowledged: Vec<(u64, usize)>,
    /// First and last time of the run.
    pub span: (u64, u64),
}

impl Past {
    /// Returns the part of the run in which a cut is made: the first transfer is divided among three quarters of the cuts,
    /// so that some of them interrupt it between two layers, and the second one among the others.
    fn span_of(&self, cut: u64, count: u64) -> (u64, u64) {
        let (began, ended) = self.span;
        let between = self.acknowledged.first().map_or(ended, |(at, _)| *at);
        let first = count - count / 4;
        let (from, to, part, parts) = match cut < first {
            true => (began, between, cut, first),
            false => (between, ended, cut - first, count - first),
        };
        let at = |part: u64| from + (to - from) * part / parts;
        (at(part), at(part + 1).max(at(part) + 1))
    }
}

/// The results of all cuts.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counts {
    /// Cuts after which the store had no container, and layers of the interrupted transfer.
    pub continued: usize,
    /// Cuts after which it had the container.
    pub committed: usize,
}

fn run_with(store: &Path, care: Care, args: &[&str], input: &[u8]) -> Output {
    let mut command = cowl(store, care);
    command.args(args);
    run_command(command, input)
}

/// Creates a container with snapshots, and returns their contents.
fn make_source(store: &Path, root: &Path, seed: u64) -> Vec<Content> {
    let run = |args: &[&str]| run_with(store, Care::Whole, args, b"").ok();
    std::fs::write(root.join("base"), vec![b'b'; 100_000]).unwrap();
    run(&["create", "web", "--from", root.to_str().unwrap()]);
    let mut rng = Rng::new(seed);
    let mut contents = Vec::new();
    for round in 0..SNAPSHOTS {
        let head = run(&["show", "web", "--json"]).json()["head"].clone();
        let head = Path::new(head.as_str().unwrap()).join(format!("round{round}"));
        std::fs::create_dir(&head).unwrap();
        for file in 0..10 {
            let length = usize::try_from(1 + rng.below(20_000)).unwrap_or(1);
            let byte = b'a' + u8::try_from(rng.below(26)).unwrap_or(0);
            std::fs::write(head.join(format!("f{file}")), vec![byte; length]).unwrap();
        }
        let name = run(&["snapshot", "--no-sync", "web"]).out();
        contents.push(content(
            &run(&["export", &format!("web@{name}"), "-"]).stdout,
        ));
    }
    contents
}

/// Creates a container, receives it in two transfers into a store on a new disk, and detaches the disk. An image of the
/// disk before the run is written to `before`.
#[must_use]
pub fn run(
    scratch: &Scratch,
    base: &Base,
    (seed, care): (u64, Care),
    before: &Path,
) -> (Past, Arc<Log>) {
    let source = scratch.join("source");
    let contents = make_source(&source, &scratch.make("root"), seed);
    let send = |state: &str| {
        let args = ["send", state, "--compress", "none"];
        run_with(&source, Care::Whole, &args, b"").ok().stdout
    };
    let streams = [send(&format!("web@..snap{}", FIRST - 1)), send("web")];
    let (disk, mount_point) = base.make(scratch);
    let store = store_on(&mount_point);
    crate::command::run("sync", ["-f".as_ref(), mount_point.as_os_str()]).ok();
    disk.watch(before);
    let log = disk.log();
    let began = log.now();
    let mut acknowledged = Vec::new();
    for (stream, count) in streams.iter().zip([FIRST, SNAPSHOTS]) {
        run_with(&store, care, &["receive"], stream).ok();
        acknowledged.push((log.now(), count));
    }
    let span = (began, log.now());
    crate::mount::unmount_free(&mount_point);
    disk.unplug();
    let past = Past {
        source,
        contents,
        acknowledged,
        span,
    };
    (past, log)
}

/// Makes the cuts. After each, the transfer is continued, and the container must be complete.
#[must_use]
pub fn cut_often(
    scratch: &Scratch,
    base: &Base,
    past: &Past,
    cuts: Cuts<'_>,
) -> (Findings, Counts) {
    let mut counts = Counts::default();
    let span_of = |cut| past.span_of(cut, cuts.count);
    let findings = cuts.make_in(scratch, span_of, |image, moment| {
        let after = After::of(scratch, base, image, moment);
        let mut wrong = Vec::new();
        // The rest of the transfer cannot be requested if the list of layers cannot be read.
        judge(
            &after,
            past,
            (moment, &scratch.join("rest")),
            &mut wrong,
            &mut counts,
        );
        after.end(image);
        wrong
    });
    (findings, counts)
}

fn judge(
    after: &After,
    past: &Past,
    (moment, rest): (u64, &Path),
    wrong: &mut Vec<String>,
    counts: &mut Counts,
) -> Option<()> {
    let names = |wrong: &mut Vec<String>| -> Option<HashSet<String>> {
        let listed = after.must(&["list", "--format", "{name}"], wrong)?;
        if listed.out().is_empty() {
            return Some(HashSet::new());
        }
        let listed = after.must(&["list", "web", "--format", "{name}"], wrong)?;
        Some(listed.out().lines().map(str::to_owned).collect())
    };
    let found = names(wrong)?;
    let done = past.acknowledged.iter().filter(|(at, _)| *at <= moment);
    for number in 0..done.map(|(_, count)| *count).max().unwrap_or(0) {
        if !found.contains(&format!("snap{number}")) {
            wrong.push(format!("snap{number} was acknowledged, but does not exist"));
        }
    }
    let have = after.must(&["receive", "--have"], wrong)?;
    let is_empty = have.json()["layers"].as_array().is_none_or(Vec::is_empty);
    counts.committed += usize::from(!found.is_empty());
    counts.continued += usize::from(found.is_empty() && !is_empty);
    // The layers that survived are not sent again, so they must be complete.
    let send = ["send", "web", "--have", "-"];
    let stream = run_with(&past.source, Care::Whole, &send, &have.stdout)
        .ok()
        .stdout;
    std::fs::write(rest, stream).unwrap();
    let script = format!("exec \"$@\" receive < '{}'", rest.display());
    let received = after.script(&script, [""; 0]);
    if received.code != 0 {
        wrong.push(received.report());
        return None;
    }
    for (number, expected) in past.contents.iter().enumerate() {
        let address = format!("web@snap{number}");
        let export = after.must(&["export", &address, "-"], wrong)?;
        if content(&export.stdout) != *expected {
            wrong.push(format!("{address} differs"));
        }
    }
    let check = after.must(&["check", "--deep"], wrong)?;
    if check.out().contains("damaged:") {
        wrong.push(check.report());
    }
    Some(())
}
