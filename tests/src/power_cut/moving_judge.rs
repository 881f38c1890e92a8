//! Judges a container of which a snapshot was being taken when the power was cut ([`super::moving`]).

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::disk::Log;
use super::judge::{Cuts, Findings};
use super::moving::{Names, Past};
use super::phases::Phase;
use super::store::{LIVE, content};
use super::store_judge::{After, Shown};
use super::work::Base;
use crate::scratch::Scratch;

/// The files to which the program writes: record N goes to the file N % 4.
const FILES: [&str; 4] = ["plain", "dir/one", "dir/two", "dir/linked"];
/// A second name of the last file.
const LINK: &str = "other-name";
/// The length of a record. Records are not aligned with blocks.
const RECORD: usize = 5000;

/// The number of cuts by the phase in which they left the moves; `None` without moves.
pub type Hits = HashMap<Option<Phase>, u64>;

fn record(number: u64) -> Vec<u8> {
    let text = format!("{number:019} ");
    text.bytes().cycle().take(RECORD).collect()
}

/// Returns the file of a record, and the offset there.
fn location(number: u64) -> (usize, u64) {
    let count = FILES.len() as u64;
    let file = usize::try_from(number % count).unwrap_or_default();
    (file, number / count * RECORD as u64)
}

/// A loop device that is in use, so that the disk after a cut has another device number than before, as after a reboot.
struct OtherDevice {
    device: String,
}

impl OtherDevice {
    fn new(scratch: &Scratch) -> Self {
        let path = scratch.join("other-device");
        let file = std::fs::File::create(&path).expect("creating an image");
        file.set_len(1 << 20).expect("creating an image");
        let words = ["--find".as_ref(), "--show".as_ref(), path.as_os_str()];
        let device = crate::command::run("losetup", words).ok().out();
        Self { device }
    }
}

impl Drop for OtherDevice {
    fn drop(&mut self) {
        let output = crate::command::run("losetup", ["--detach", &self.device]);
        if output.code != 0 {
            eprintln!("{}", output.report());
        }
    }
}

/// Makes `cuts` cuts at random moments of each snapshot, refused ones included, and one at each moment in `past.aims`, and
/// when a refusal was durable, and verifies the container after each.
#[must_use]
pub fn cut_often(
    scratch: &Scratch,
    base: &Base,
    past: &Past,
    (log, before): (&Log, &Path),
    (seed, cuts): (u64, u64),
) -> (Findings, Hits) {
    let (mut findings, mut hits) = (Findings::default(), Hits::new());
    let _other = OtherDevice::new(scratch);
    let spans = past.snapshots.iter().map(|taken| &taken.span);
    let spans = spans.chain(&past.refused);
    let spans = spans.map(|span| ((span.0, span.1 + 1), cuts));
    let aims = past
        .aims
        .iter()
        .map(|aim| ((aim.moment, aim.moment + 1), 1));
    let ends = past.refused.iter().map(|(_, end)| ((*end, end + 1), 1));
    for (number, (span, count)) in (0..).zip(spans.chain(aims).chain(ends)) {
        let cuts = Cuts {
            log,
            before,
            span,
            count,
            seed: seed ^ number << 40,
        };
        findings += cuts.make(scratch, |image, moment| {
            let after = After::of(scratch, base, image, moment);
            *hits.entry(Phase::of(&after.store())).or_default() += 1;
            let wrong = judge(&after, past, (moment, base), &scratch.make("found"));
            after.end(image);
            wrong
        });
    }
    (findings, hits)
}

fn judge(after: &After, past: &Past, (moment, base): (u64, &Base), found: &Path) -> Vec<String> {
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
    let known = |address: &String| past.snapshots.iter().any(|taken| taken.address == *address);
    let mut refusals = past.refused.iter();
    if !past.refused.is_empty() && refusals.all(|(_, end)| *end <= moment) {
        let snapshots = shown.keys().filter(|shown| shown.contains('@'));
        for address in snapshots.filter(|address| !known(address)) {
            wrong.push(format!("{address} was refused, but exists"));
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
            store = after.store().display(),
        ),
        [""; 0],
    );
    if copy.code != 0 {
        wrong.push(copy.report());
    }
    if let Some(phase) = Phase::of(&after.store()) {
        wrong.push(format!("after a mount, the moves are still {phase:?}"));
    }
    let check = after.must(&["check", "--deep"], &mut wrong);
    if let Some(check) = check.filter(|check| check.out().contains("damaged:")) {
        wrong.push(check.report());
    }
    wrong.extend(lost(found, past, moment));
    let renamed = renamed(found, past, (moment, base.kind == "btrfs"));
    if !renamed.is_empty() {
        let list = "find layers -path '*/tree/*' -printf '%p %y %i %n %s\\n'";
        let mut command = std::process::Command::new("sh");
        command.args(["-c", list]).current_dir(after.store());
        wrong.push(crate::command::run_command(command, b"").report());
    }
    wrong.extend(renamed);
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

/// A file as it was found.
#[derive(Debug, Default)]
struct Found {
    paths: Vec<String>,
    inodes: Vec<(u64, u64)>,
}

/// Returns the names of the files whose names change, by their numbers, which are in their content.
fn find(top: &Path) -> BTreeMap<u64, Found> {
    let mut found: BTreeMap<u64, Found> = BTreeMap::new();
    let mut dirs = vec![top.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = path.symlink_metadata().unwrap();
            if meta.is_dir() {
                dirs.push(path);
                continue;
            }
            let text = std::fs::read(&path).unwrap();
            let number = text.strip_prefix(b"file ").and_then(|rest| rest.get(..6));
            let Some(number) = number.and_then(|digits| str::from_utf8(digits).ok()?.parse().ok())
            else {
                continue;
            };
            let file = found.entry(number).or_default();
            let path = path.strip_prefix(top).unwrap();
            file.paths.push(path.to_str().unwrap().to_owned());
            file.inodes.push((meta.ino(), meta.nlink()));
        }
    }
    found
}

/// Returns the files that have other names than those of a permitted state: one that is not older than the last one that
/// was durable. With `any_order`, each unsynced change of a name may be missing.
fn renamed(top: &Path, past: &Past, (moment, any_order): (u64, bool)) -> Vec<String> {
    let mut found = find(top);
    let mut wrong = Vec::new();
    for (number, states) in &past.names {
        let file = found.remove(number).unwrap_or_default();
        let mut paths = file.paths;
        paths.sort();
        let is_durable = |names: &Names| names.durable.is_some_and(|at| at <= moment);
        let least = states.iter().rposition(is_durable).unwrap_or(0);
        let later = states.get(least..).unwrap_or_default();
        let is_permitted = match any_order {
            false => later.iter().any(|state| state.paths == paths),
            true => {
                let has = |state: &Names, path: &String| state.paths.contains(path);
                let mut known = later.iter().flat_map(|state| &state.paths);
                paths
                    .iter()
                    .all(|path| later.iter().any(|state| has(state, path)))
                    && known.all(|path| {
                        paths.contains(path) || !later.iter().all(|state| has(state, path))
                    })
            }
        };
        if !is_permitted {
            let permitted: Vec<_> = later.iter().map(|state| &state.paths).collect();
            wrong.push(format!(
                "file {number} has the names {paths:?}, which it never had from then on: {permitted:?}"
            ));
        }
        // On btrfs, a rename of a lower file that was not synced can leave both names, of different files.
        let is_state = later.iter().any(|state| state.paths == paths);
        let count = paths.len() as u64;
        let first = file.inodes.first().copied();
        let is_single = |other: &(u64, u64)| Some(*other) == first && other.1 == count;
        if is_state && !file.inodes.iter().all(is_single) {
            wrong.push(format!(
                "the names of file {number} are not those of one file: {paths:?}, {:?} (inode number, links)",
                file.inodes
            ));
        }
    }
    for number in found.keys() {
        wrong.push(format!("file {number} was never created"));
    }
    wrong
}
