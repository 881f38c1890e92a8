//! Runs programs on the mount, several at a time, and records which changes are acknowledged as durable.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::disk::{Disk, Log};
use super::kinds::{DIRS, KINDS, Kind, Subject};
use crate::mount::{Overlay, Stack};
use crate::random::rng::Rng;
use crate::scratch::Scratch;

/// Number of concurrent programs.
const PROGRAMS: usize = 4;

/// The file system that contains the layers.
#[derive(Debug, Clone)]
pub struct Base {
    /// Type of the file system.
    pub kind: String,
    /// Mount options of the file system.
    pub options: String,
    /// Additional arguments for mkfs.
    pub mkfs: String,
    /// Mount options of the overlay.
    pub overlay: String,
}

impl Base {
    /// Returns a base of the type `kind`, with the mount and mkfs options that the environment gives.
    #[must_use]
    pub fn from_env(kind: &str) -> Base {
        let text = |variable: &str| std::env::var(variable).unwrap_or_default();
        let options = text("COWL_BASE_OPTIONS");
        Base {
            kind: kind.to_owned(),
            options: if options.is_empty() {
                "relatime".to_owned()
            } else {
                options
            },
            mkfs: text("COWL_MKFS"),
            overlay: text("COWL_OPTIONS"),
        }
    }

    /// Creates the file system on a new disk with a log, and mounts it. Returns the disk and the mount point.
    #[must_use]
    pub fn make(&self, scratch: &Scratch) -> (Disk, PathBuf) {
        let disk = Disk::new(scratch);
        let more = self.mkfs.split_whitespace();
        let args = std::iter::once("-q").chain(more).chain([disk.device()]);
        crate::command::run(format!("mkfs.{}", self.kind), args).ok();
        let mount_point = scratch.make("base");
        mount(self, disk.device(), &mount_point);
        (disk, mount_point)
    }

    /// Mounts the image of a disk on a loop device.
    pub fn mount_image(&self, image: &Path, mount_point: &Path) {
        let with_loop = Base {
            options: format!("loop,{}", self.options),
            ..self.clone()
        };
        mount(
            &with_loop,
            image.to_str().expect("a plain path"),
            mount_point,
        );
    }
}

/// A completed step, in times of the disk.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Time at which it began. Before that, no part of it may be visible.
    pub began: u64,
    /// Time at which it ended.
    pub ended: u64,
    /// Time at which the change was acknowledged as durable, if it was.
    pub durable: Option<u64>,
}

/// The history of a run.
#[derive(Debug)]
pub struct Past {
    /// All subjects with their steps.
    pub subjects: Vec<(Subject, Vec<Step>)>,
    /// First and last time of the run.
    pub span: (u64, u64),
}

/// Returns the layers on a disk that is mounted at `mount_point`.
#[must_use]
pub fn stack(mount_point: &Path) -> Stack {
    Stack {
        lowers: vec![mount_point.join("lower")],
        upper: Some((mount_point.join("upper"), mount_point.join("work"))),
    }
}

/// Mounts the file system on `device`.
pub fn mount(base: &Base, device: &str, mount_point: &Path) {
    let args = ["-t", &base.kind, "-o", &base.options, device];
    let mount_point = mount_point.as_os_str();
    crate::command::run("mount", args.iter().map(AsRef::as_ref).chain([mount_point])).ok();
}

/// Creates layers on a disk, runs programs in a mount of them, and detaches the disk. An image of the disk before the
/// run is written to `before`.
#[must_use]
pub fn run(
    scratch: &Scratch,
    base: &Base,
    seed: u64,
    count: usize,
    before: &Path,
) -> (Past, std::sync::Arc<Log>) {
    let (disk, mount_point) = base.make(scratch);
    let mut rng = Rng::new(seed);
    let subjects: Vec<Subject> = (0..count)
        .map(|id| Subject {
            kind: if id % 60 == 59 {
                Kind::PokeBig
            } else {
                rng.pick(KINDS)
            },
            id,
            synced: rng.chance(30),
            both_names: base.kind == "btrfs",
            owner_first: base.kind == "ext4",
        })
        .collect();
    for name in ["upper", "work", "lower"] {
        std::fs::create_dir(mount_point.join(name)).unwrap();
    }
    for number in 0..DIRS {
        std::fs::create_dir(mount_point.join(format!("lower/d{number}"))).unwrap();
    }
    for subject in &subjects {
        subject.plant(&mount_point.join("lower"));
    }
    crate::command::run("sync", ["-f".as_ref(), mount_point.as_os_str()]).ok();
    let log = disk.log();
    disk.watch(before);
    let overlay = Overlay::cowlfs(&stack(&mount_point), &scratch.make("mount"), &base.overlay);
    let began = log.now();
    // Half of the runs have no other process that commits the journal: such commits can hide a missing sync, and can
    // expose a wrong order of writes.
    let alone = seed % 2 == 1 && !base.overlay.contains("volatile");
    let subjects = run_programs(overlay.path(), &mount_point, &log, subjects, (seed, alone));
    let span = (began, log.now());
    overlay.unmount();
    crate::mount::unmount_free(&mount_point);
    disk.unplug();
    (Past { subjects, span }, log)
}

/// Performs the steps of all subjects in several threads, while other threads write to the same file system and sync
/// it.
fn run_programs(
    root: &Path,
    base: &Path,
    log: &Log,
    subjects: Vec<Subject>,
    (seed, alone): (u64, bool),
) -> Vec<(Subject, Vec<Step>)> {
    let next = AtomicUsize::new(0);
    let over = AtomicBool::new(false);
    let done = Mutex::new(Vec::new());
    let syncs = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let programs: Vec<_> = (0..PROGRAMS)
            .map(|program| {
                let (next, subjects, done) = (&next, &subjects, &done);
                scope.spawn(move || {
                    let mut rng = Rng::new(seed ^ (program as u64) << 32);
                    while let Some(subject) = subjects.get(next.fetch_add(1, Ordering::SeqCst)) {
                        let steps = steps(subject, root, log, &mut rng);
                        done.lock().unwrap().push((subject.clone(), steps));
                    }
                })
            })
            .collect();
        if !alone {
            scope.spawn(|| commit_often(base, &over));
        }
        scope.spawn(|| sync_periodically(base, log, &over, &syncs));
        for program in programs {
            program.join().unwrap();
        }
        over.store(true, Ordering::SeqCst);
    });
    let mut done = done.into_inner().unwrap();
    for (from, to) in syncs.into_inner().unwrap() {
        for step in done.iter_mut().flat_map(|(_, steps)| steps) {
            if step.ended <= from {
                step.durable = Some(step.durable.map_or(to, |at| at.min(to)));
            }
        }
    }
    done
}

fn steps(subject: &Subject, root: &Path, log: &Log, rng: &mut Rng) -> Vec<Step> {
    (1..=subject.steps())
        .map(|step| {
            let began = log.now();
            let synced = subject.take(root, step);
            let ended = log.now();
            std::thread::sleep(Duration::from_micros(rng.below(6000)));
            Step {
                began,
                ended,
                durable: synced.then_some(ended),
            }
        })
        .collect()
}

/// Writes and fsyncs a file next to the overlay, which commits the file system's journal with all pending metadata.
pub(super) fn commit_often(base: &Path, over: &AtomicBool) {
    let mut file = File::create(base.join("database")).unwrap();
    let mut rng = Rng::new(file.metadata().unwrap().ino());
    while !over.load(Ordering::SeqCst) {
        file.write_all(b"a record").unwrap();
        file.sync_all().unwrap();
        std::thread::sleep(Duration::from_micros(rng.below(10_000)));
    }
}

/// Syncs all completed steps periodically. It syncs the file system of the layers: since Linux 6.16, syncfs(2) on a
/// FUSE mount does not send a request, and sync(2) would sync every disk of the machine.
fn sync_periodically(base: &Path, log: &Log, over: &AtomicBool, syncs: &Mutex<Vec<(u64, u64)>>) {
    let directory = File::open(base).unwrap();
    let mut rounds = 0;
    while !over.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(100));
        rounds += 1;
        if rounds % 15 == 0 {
            let from = log.now();
            rustix::fs::syncfs(&directory).unwrap();
            syncs.lock().unwrap().push((from, log.now()));
        }
    }
}
