//! Measures snapshots while a program has files open by passthrough (docs/decisions/0043), by the number and the size of
//! the files: for how long the program waits, and how long the command takes.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowl_tests::conditions::Need;
use cowl_tests::images::Kind;
use cowl_tests::lxc_stub::{LxcStub, freezer};
use cowl_tests::programs::in_path;
use cowl_tests::scratch::Scratch;

use super::ground::unmount;
use super::writer::{Gaps, Writer};
use crate::run::{Result, Run, failure, note, title};

/// The container.
const NAME: &str = "web";
/// The time for which the program runs before the first snapshot, and after each.
const SETTLE: Duration = Duration::from_millis(300);
/// The maximum total size of files that cowl copies where blocks cannot be shared, in MiB.
const MOST_COPIED: usize = 256;
/// The space beside the files, in MiB. XFS requires 300.
const SPARE: usize = 2048;
/// The number of attempts for each snapshot that is measured.
const ATTEMPTS: usize = 5;
/// Messages of snapshots that are refused because the program writes.
const REFUSALS: [&str; 3] = ["passthrough", "still being undone", "requests were running"];

/// The files of a program.
#[derive(Clone, Copy, Debug)]
struct Files {
    kind: Kind,
    count: usize,
    mib: usize,
}

/// The measurements of one snapshot.
#[derive(Clone, Copy, Debug, Default)]
struct Snapshot {
    gaps: Gaps,
    command: Duration,
}

/// The measurements of all snapshots for the same files.
#[derive(Debug, Default)]
struct Row {
    idle: Gaps,
    snapshots: Vec<Snapshot>,
    refused: usize,
}

/// Measures each combination, and prints a table.
pub(super) fn run(cowl: &Path, counts: &[usize], sizes: &[usize], rounds: usize) -> Result<()> {
    title("snapshots while a program writes by passthrough");
    let (mut lines, mut failed) = (Vec::new(), Ok(()));
    for kind in [Kind::Xfs, Kind::Ext4] {
        for mib in sizes {
            for count in counts {
                let (count, mib) = (*count, *mib);
                let row = match measure(cowl, Files { kind, count, mib }, rounds.max(1)) {
                    Ok(row) => row,
                    Err(error) => {
                        // The other rows are still measured.
                        note(&format!("failed: {error}"));
                        failed = failed.and(Err(error));
                        None
                    }
                };
                let cells = row.map_or_else(|| ["-"; 5].map(str::to_owned), |row| row.cells());
                let name = kind.name();
                lines.push(format!(
                    "| {name} | {count} | {mib} MiB | {} |",
                    cells.join(" | ")
                ));
            }
        }
    }
    title("results");
    println!(
        "| file system | open files | size of each | longest gap between writes, without a snapshot | the same, during one | \
         longest gap between requests | `cowl snapshot` | refused attempts |"
    );
    println!("|{}", "---|".repeat(8));
    for line in lines {
        println!("{line}");
    }
    failed
}

impl Row {
    fn cells(&self) -> [String; 5] {
        let of = |part: fn(&Snapshot) -> Duration| {
            let mut all: Vec<_> = self.snapshots.iter().map(part).collect();
            all.sort();
            match (all.get(all.len() / 2), all.last()) {
                (Some(median), Some(most)) => format!("{} ({})", shown(*median), shown(*most)),
                _ => "-".to_owned(),
            }
        };
        let attempts = self.refused + self.snapshots.len();
        [
            shown(self.idle.writes),
            of(|snapshot| snapshot.gaps.writes),
            of(|snapshot| snapshot.gaps.requests),
            of(|snapshot| snapshot.command),
            format!("{} of {attempts}", self.refused),
        ]
    }
}

fn shown(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

/// Measures snapshots of a new container; `None` if the machine lacks a requirement.
fn measure(cowl: &Path, files: Files, rounds: usize) -> Result<Option<Row>> {
    let Files { kind, count, mib } = files;
    let total = count * mib;
    note(&format!("{}: {count} files of {mib} MiB", kind.name()));
    if let Some(reason) = kind.needs().into_iter().find_map(Need::missing) {
        note(&format!("skipped: {reason}"));
        return Ok(None);
    }
    if kind == Kind::Ext4 && total > MOST_COPIED {
        note("cowl does not copy as much");
        return Ok(None);
    }
    if kind == Kind::Ext4 && (freezer().is_none() || in_path("lxc-info").is_none()) {
        note("skipped: it needs lxc-info, and a control group that can be frozen");
        return Ok(None);
    }
    let scratch = Scratch::new("bench");
    let free = rustix::fs::statvfs(&*scratch).map_err(std::io::Error::from)?;
    let (bytes, free) = (
        ((total + SPARE) as u64) << 20,
        free.f_bavail * free.f_frsize,
    );
    if bytes > free {
        note(&format!(
            "skipped: it needs {} MiB of disk space",
            bytes >> 20
        ));
        return Ok(None);
    }
    let mount = kind.mount_with_size(&scratch, "disk", bytes);
    let measured = on_disk(cowl, &scratch, &mount, (files, rounds));
    let unmounted = unmount(&mount);
    measured.and_then(|row| unmounted.map(|()| Some(row)))
}

/// Measures snapshots of a new container on a mounted file system.
fn on_disk(
    cowl: &Path,
    scratch: &Scratch,
    mount: &Path,
    (files, rounds): (Files, usize),
) -> Result<Row> {
    let (rootfs, store) = (mount.join("rootfs"), mount.join("store"));
    std::fs::create_dir(&rootfs)?;
    let command = || Run::new(cowl).arg("--store").arg(&store).unseen();
    // On ext4, cowl stops the programs of an LXC container.
    let stub = (files.kind == Kind::Ext4).then(|| LxcStub::new(scratch, NAME, &rootfs));
    let made = match &stub {
        Some(stub) => command().args(stub.adopt()),
        None => command().args(["create", NAME, "--from"]).arg(&rootfs),
    };
    made.output()?;
    let mounted = command().args(["mount", NAME, "--passthrough", "all"]);
    let top = PathBuf::from(mounted.output()?);
    let snapshot = || {
        let run = command().args(["-v", "snapshot", NAME]);
        match &stub {
            Some(stub) => run.env("PATH", stub.path_variable()),
            None => run,
        }
    };
    let row = Writer::start(&top, (files.count, files.mib)).and_then(|mut writer| {
        if let Some(stub) = &stub {
            stub.add(writer.id());
        }
        let row = snapshots(&mut writer, &snapshot, (files.count, rounds))?;
        writer.end().map(|()| row)
    });
    let unmounted = command().args(["umount", NAME]).run();
    row.and_then(|row| unmounted.map(|()| row))
}

/// Takes snapshots while the program writes. A refused one is attempted again.
fn snapshots(
    writer: &mut Writer,
    snapshot: &dyn Fn() -> Run,
    (count, rounds): (usize, usize),
) -> Result<Row> {
    std::thread::sleep(SETTLE);
    writer.reset()?;
    std::thread::sleep(SETTLE);
    let mut row = Row {
        idle: writer.gaps()?,
        ..Row::default()
    };
    while row.snapshots.len() < rounds && row.refused < rounds * ATTEMPTS {
        writer.reset()?;
        let start = Instant::now();
        let (code, text) = snapshot().code_and_text()?;
        let command = start.elapsed();
        // A gap that lasts until now ends.
        std::thread::sleep(SETTLE);
        let gaps = writer.gaps()?;
        match code {
            Some(0) if !text.contains(&format!("{count} files that programs access")) => {
                return failure(format!("`cowl snapshot` did not move all files: {text}"));
            }
            Some(0) => row.snapshots.push(Snapshot { gaps, command }),
            _ if REFUSALS.iter().any(|refusal| text.contains(refusal)) => row.refused += 1,
            _ => return failure(format!("`cowl snapshot` failed: {text}")),
        }
    }
    let lasts = row.cells().join(", ");
    note(&format!(
        "gaps without a snapshot, between writes, between requests, command, refused: {lasts}"
    ));
    Ok(row)
}
