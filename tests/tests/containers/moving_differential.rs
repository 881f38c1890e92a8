//! Random operations in a mounted container and in a plain directory return the same results and leave the same tree,
//! while snapshots are taken between the operations, and by another process during them. Each snapshot that is taken
//! between two operations must contain the tree of that moment.
//!
//! With the defaults of a managed mount, and on XFS and btrfs also with passthrough for all files, which move at each
//! snapshot (docs/decisions/0043). `COWL_DIFFERENTIAL_SECONDS=N` runs new seeds for N seconds, `COWL_SEED=S` a single
//! one, `COWL_STEPS=N` operations in each.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cowl_tests::command::sh_in;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::images::Kind;
use cowl_tests::layers::{self, LayerSpec, Links};
use cowl_tests::pair::{Pair, Under};
use cowl_tests::run::{Course, caught, number, run, show};
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::Compare;

const NEEDS: &[Need] = &[Need::Root, Need::Fuse];

/// Which files the kernel reads and writes without the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Passthrough {
    Default,
    All,
}

/// Messages of snapshots that fail because operations prevent them.
const REFUSALS: [&str; 3] = [
    "changed them again",
    "takes too long to copy",
    "requests were running",
];

/// Takes snapshots of a container until this is stopped.
struct Snapshots {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<usize, String>>>,
}

impl Snapshots {
    fn begin(pair: &Pair) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (ended, command) = (stop.clone(), pair.commands());
        let thread = std::thread::spawn(move || {
            let mut taken = 0;
            while !ended.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(30));
                let output = command("snapshot");
                if output.code == 0 {
                    taken += 1;
                } else if !REFUSALS.iter().any(|text| output.err().contains(text)) {
                    return Err(output.report());
                }
            }
            Ok(taken)
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    /// Returns the number of snapshots.
    fn end(mut self) -> Result<usize, String> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().unwrap();
        thread.join().unwrap_or_else(|_| Err("a panic".to_owned()))
    }
}

impl Drop for Snapshots {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("the thread that takes snapshots panicked");
        }
    }
}

/// Runs one seed, and returns the numbers of snapshots between and during operations.
fn one_seed(store: Store, seed: u64) -> Result<(usize, usize), String> {
    let spec = LayerSpec {
        seed,
        stray: false,
        links: Links::OnTop,
        rich: true,
        by_kernel: false,
    };
    let (lowers, plain) = layers::make_three(store.scratch(), spec).unwrap();
    let mut pair = Pair::new(store, Under::Container, lowers, plain, true);
    pair.mount();
    let course = Course {
        seed,
        count: number("COWL_STEPS", 200),
        others: 12,
        snapshots: 8,
        whiteouts: false,
        noise: false,
    };
    let beside = (!seed.is_multiple_of(2)).then(|| Snapshots::begin(&pair));
    let done = caught(|steps| run(course, &mut pair, None, steps, true).map(drop));
    let during = beside.map(Snapshots::end).transpose()?.unwrap_or_default();
    if let Err(failure) = done {
        let last = failure.steps.iter().rev().take(12).rev();
        let lines: String = last.map(|step| format!("\n  {}", show(step))).collect();
        return Err(format!("{}; the last steps:{lines}", failure.message));
    }
    pair.unmount();
    pair.mount();
    pair.compare("after a new mount", &pair.tested, Compare::HISTORY)?;
    pair.unmount();
    pair.check_snapshots()?;
    let check = pair.commands()("check");
    match check.code {
        0 => Ok((pair.snapshots(), during)),
        _ => Err(check.report()),
    }
}

fn compare(kind: Kind, passthrough: Passthrough) {
    if !can(&[NEEDS, &kind.needs()].concat()) {
        return;
    }
    let disk = Scratch::in_memory();
    let top = kind.mount_with_size(&disk, "disk", 4 << 30);
    let seeds = match std::env::var("COWL_SEED") {
        Ok(seed) => seed.parse().unwrap()..=seed.parse().unwrap(),
        Err(_) => 1..=u64::MAX,
    };
    let end = Instant::now() + Duration::from_secs(number("COWL_DIFFERENTIAL_SECONDS", 5));
    let (mut between, mut during, mut count) = (0, 0, 0);
    for seed in seeds {
        // One seed with and one without concurrent snapshots in any case.
        if count > 1 && Instant::now() > end {
            break;
        }
        let store = Store::in_scratch(Scratch::new_in(&top, "differential"));
        let store = match passthrough {
            Passthrough::Default => store,
            Passthrough::All => store.with_passthrough(),
        };
        match one_seed(store, seed) {
            Ok(taken) => (between, during) = (between + taken.0, during + taken.1),
            Err(error) => panic!("COWL_SEED={seed}, {kind:?}, {passthrough:?}: {error}"),
        }
        count += 1;
    }
    println!(
        "{kind:?}, {passthrough:?}: {count} seeds, {between} snapshots between operations, {during} during them"
    );
    assert!(between > 0 && (during > 0 || count < 2));
}

#[test]
fn a_container_behaves_like_a_plain_directory_while_snapshots_are_taken() {
    compare(Kind::Ext4, Passthrough::Default);
}

#[test]
fn a_container_behaves_like_a_plain_directory_while_its_files_move_on_xfs() {
    compare(Kind::Xfs, Passthrough::All);
}

#[test]
fn a_container_behaves_like_a_plain_directory_while_its_files_move_on_btrfs() {
    compare(Kind::Btrfs, Passthrough::All);
}

/// XFS changes the mtime of a directory that is exchanged with another object, and a whiteout is replaced in this way.
#[test]
fn a_directory_that_gets_a_removed_name_retains_its_mtime_on_xfs() {
    let kind = Kind::Xfs;
    if !can(&[NEEDS, &kind.needs()].concat()) {
        return;
    }
    let store = Store::on(|scratch, name| kind.mount(scratch, name));
    let source = store.scratch().make("source");
    sh_in(
        &source,
        "mkdir a b c; touch a/file c/file; touch -d @1000 b c",
    )
    .ok();
    store.create("web", &source);
    let top = store.mount("web");
    sh_in(
        &top,
        "rm a/file c/file; touch -d @1000 c; mv b a/file; mv c a/new",
    )
    .ok();
    let mtime = |name: &str| std::fs::metadata(top.join(name)).unwrap().mtime();
    assert_eq!((mtime("a/file"), mtime("a/new")), (1000, 1000));
    store.cowl(["umount", "web"]).ok();
}
