//! Differential tests: random operations on a mounted stack and on a plain directory with the same content must
//! return the same results and error numbers, and leave the same tree with the same inode numbers. The trees are
//! compared during the run, which contains new mounts, snapshots and flattens, most of them while files are open; at the end; after a new mount; in the
//! snapshots; and as kernel overlayfs reads the layers. cowlfs must also show layers that kernel overlayfs has
//! written as the kernel does, and continue from them.
//!
//! `COWL_SEEDS=N` runs N seeds from `COWL_FIRST`, `COWL_SEED=S` a single one, `COWL_STEPS=N` operations in each,
//! `COWL_JOBS=N` seeds at a time, `COWL_NOISE=1` all of them beside a process that reads everything.
//! `COWL_SHRINK=1` searches for the fewest operations that still fail, `COWL_COMPARE=1` compares the trees after
//! each operation. `COWL_UNDER_TEST=plain` (or `kernel`) replaces cowlfs with a plain directory (or kernel
//! overlayfs), to test the test itself.

use std::sync::Mutex;

use cowl_tests::conditions::{Need, can, own_umask};
use cowl_tests::cowl::Store;
use cowl_tests::disk::Disk;
use cowl_tests::killer::Killer;
use cowl_tests::layers::{self, LayerSpec, Links};
use cowl_tests::mount::{Overlay, Stack};
use cowl_tests::pair::{Pair, Under, same};
use cowl_tests::programs;
use cowl_tests::random::{Generator, Side};
use cowl_tests::run::{Course, Failure, Step, caught, number, run, show, shrink};
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare};

const NEEDS: [Need; 4] = [
    Need::Root,
    Need::Fuse,
    Need::KernelOverlay,
    Need::Program("mkfs.ext4"),
];

/// A kind of run: by seed, with the steps that are given, or with random ones.
type OneSeed = fn(&Disk, u64, Option<&[Step]>, &mut Vec<Step>) -> Result<(), String>;

#[test]
fn a_mounted_stack_behaves_like_a_plain_directory() {
    if can(&NEEDS) {
        every_seed(150, against_plain);
    }
}

#[test]
fn layers_of_kernel_overlayfs_are_read_and_modified() {
    if can(&NEEDS) {
        every_seed(50, after_kernel);
    }
}

#[test]
fn killed_daemons_change_nothing() {
    if can(&NEEDS) {
        let disk = Disk::new("differential");
        let killer = Killer::start(&disk.path(), 20..=200);
        every_seed_on(&disk, 10, under_fire);
        let kills = killer.stop();
        assert!(kills > 20, "{kills} kills");
    }
}

fn every_seed(default: u64, one_seed: OneSeed) {
    every_seed_on(&Disk::new("differential"), default, one_seed);
}

fn every_seed_on(disk: &Disk, default: u64, one_seed: OneSeed) {
    let seeds: Vec<u64> = match std::env::var("COWL_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => {
            let first = number("COWL_FIRST", 1);
            (first..first + number("COWL_SEEDS", default)).collect()
        }
    };
    let open = Mutex::new(seeds.iter().rev().copied().collect::<Vec<u64>>());
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..number("COWL_JOBS", 2) {
            scope.spawn(|| {
                own_umask();
                loop {
                    let Some(seed) = open.lock().unwrap().pop() else {
                        break;
                    };
                    if let Err(failure) = caught(|steps| one_seed(disk, seed, None, steps)) {
                        report(disk, seed, failure, one_seed);
                        failed.lock().unwrap().push(seed);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(
        failed.is_empty(),
        "{} of {} seeds failed: {failed:?}; COWL_SEED={} COWL_SHRINK=1 looks for the shortest way there",
        failed.len(),
        seeds.len(),
        failed.first().unwrap_or(&0)
    );
}

/// Prints the last steps, or the fewest that fail.
fn report(disk: &Disk, seed: u64, failure: Failure, one_seed: OneSeed) {
    let mut text = format!("\nseed {seed}: {}\n", failure.message);
    let steps = if std::env::var_os("COWL_SHRINK").is_some() {
        let again = |fewer: &[Step]| caught(|steps| one_seed(disk, seed, Some(fewer), steps));
        let (steps, message) = shrink(failure.steps, again);
        text.push_str(&format!("{} steps are enough: {message}\n", steps.len()));
        steps
    } else {
        let steps = failure.steps.iter();
        steps.rev().take(6).rev().cloned().collect()
    };
    for step in steps {
        text.push_str(&format!("  {}\n", show(&step)));
    }
    eprintln!("{text}");
}

fn course(seed: u64, count: u64) -> Course {
    Course {
        seed,
        count: number("COWL_STEPS", count),
        others: if seed % 6 == 5 { 60 } else { 12 },
        snapshots: 0,
        whiteouts: false,
        noise: seed % 16 == 3 || std::env::var_os("COWL_NOISE").is_some(),
    }
}

fn links(seed: u64) -> Links {
    if seed.is_multiple_of(3) {
        Links::Everywhere
    } else {
        Links::OnTop
    }
}

fn store(disk: &Disk, name: &str) -> Store {
    // A directory that the user specifies, to inspect it or to use another file system.
    match std::env::var_os("COWL_TEST_DIR") {
        Some(_) => Store::for_test(),
        None => Store::in_scratch(Scratch::new_in(&disk.path(), name)),
    }
}

/// Like [`against_plain`], with containers whose daemons can be killed.
fn under_fire(
    disk: &Disk,
    seed: u64,
    replay: Option<&[Step]>,
    steps: &mut Vec<Step>,
) -> Result<(), String> {
    let store = store(disk, "under-fire").with_keepers();
    compare_runs(disk, store, (seed, Under::Container), replay, steps)
}

fn against_plain(
    disk: &Disk,
    seed: u64,
    replay: Option<&[Step]>,
    steps: &mut Vec<Step>,
) -> Result<(), String> {
    let under = match std::env::var("COWL_UNDER_TEST").as_deref() {
        Ok("plain") => Under::Plain,
        Ok("kernel") => Under::Kernel,
        _ => match seed % 12 {
            0 => Under::Cowlfs("dev,suid,metacopy=off,passthrough=read"),
            4 => Under::Cowlfs("dev,suid,volatile,passthrough=off"),
            // The kernel caches nothing and requests everything.
            7 => Under::Cowlfs("dev,suid,timeout=0,passthrough=all"),
            // Operations that the kernel supports run through passthrough.
            8 | 9 => Under::Cowlfs("dev,suid"),
            _ => Under::Container,
        },
    };
    let store = store(disk, "differential");
    compare_runs(disk, store, (seed, under), replay, steps)
}

fn compare_runs(
    disk: &Disk,
    store: Store,
    (seed, under): (u64, Under),
    replay: Option<&[Step]>,
    steps: &mut Vec<Step>,
) -> Result<(), String> {
    let spec = LayerSpec {
        seed,
        stray: seed % 4 == 1 && under != Under::Kernel,
        links: links(seed),
        rich: true,
        by_kernel: seed.is_multiple_of(2),
    };
    let (mut lowers, plain) = layers::make_three(store.scratch(), spec).unwrap();
    // In a stack on two file systems, the lowest one or two layers are in memory.
    let elsewhere = Scratch::new_in(disk.beside(), "lowers");
    if under == Under::Cowlfs("dev,suid") {
        let from = if seed.is_multiple_of(3) { 1 } else { 2 };
        for (index, lower) in lowers.iter_mut().enumerate().skip(from) {
            let dir = elsewhere.make(&format!("lower{index}"));
            layers::copy_tree(lower, &dir);
            *lower = dir;
        }
    }
    let mut pair = Pair::new(store, under, lowers, plain, !seed.is_multiple_of(5));
    pair.mount();
    let ours = under.is_ours() && programs::overlay_is_ours();
    let course = Course {
        // The kernel shows the substitute of such a device as the file on disk.
        whiteouts: spec.stray && ours,
        ..course(seed, 400)
    };
    let last = run(course, &mut pair, replay, steps, ours)?;
    // The numbers of merged objects are retained until the mount ends.
    let retains_numbers = !pair.take_flattened();
    pair.unmount();
    pair.mount();
    let (again, _) = pair.compare("after a new mount", &pair.tested, Compare::HISTORY)?;
    if ours && retains_numbers {
        same(
            "numbers before (first) and after a new mount",
            &last,
            &again,
            Compare::IDENTICAL,
        )?;
    }
    pair.unmount();
    if under != Under::Plain && !spec.stray {
        kernel_reads(&pair)?;
    }
    pair.check_snapshots()
}

/// Verifies that kernel overlayfs over all layers shows the same tree as the plain directory.
fn kernel_reads(pair: &Pair) -> Result<(), String> {
    // With layers on two file systems, the kernel would report equal inode numbers with different devices.
    let mount_point = pair.scratch().make("kernel-reads-all");
    let kernel = Overlay::kernel_with(&pair.read_only(), &mount_point, "index=off,xino=on");
    let compare = Compare {
        // The kernel reports link counts of the layer, not of the merged tree.
        nlink: false,
        ..Compare::HISTORY
    };
    let read = pair.compare("as the kernel reads the layers", kernel.path(), compare);
    kernel.unmount();
    read.map(drop)
}

fn after_kernel(
    disk: &Disk,
    seed: u64,
    replay: Option<&[Step]>,
    steps: &mut Vec<Step>,
) -> Result<(), String> {
    let store = store(disk, "differential-kernel");
    let scratch = store.scratch();
    // With an index, the kernel keeps hard links of a lower file together through its work directory, which a mount
    // takes over. Without an index, it breaks them.
    let index = seed.is_multiple_of(2);
    let spec = LayerSpec {
        seed: seed + 5000,
        stray: false,
        links: links(seed),
        rich: true,
        by_kernel: seed % 4 == 3,
    };
    let (lowers, _) = layers::make_three(scratch, spec).unwrap();
    let (upper, work) = (scratch.make("upper"), scratch.make("work"));
    layers::copy_root(lowers.first().unwrap(), &upper).unwrap();
    let stack = Stack {
        lowers,
        upper: Some((upper, work)),
    };
    let mount_point = scratch.make("kernel");
    let options = if index {
        "index=on,xino=auto"
    } else {
        "index=off,xino=auto"
    };
    let kernel = Overlay::kernel_with(&stack, &mount_point, options);
    let mut generator = Generator::new(seed ^ 0x6b65_726e);
    let mut side = Side::new(kernel.path());
    let mut known = tree::Paths::default();
    for step in 0..250 {
        if step % 4 == 0 {
            known = tree::paths(kernel.path()).unwrap();
        }
        let caller = generator.caller(10);
        side.perform(&generator.next(&known), caller);
    }
    drop(side);
    kernel.unmount();

    // After a new mount, hard links that a copy-up breaks are broken.
    let kernel = Overlay::kernel_with(&stack, &mount_point, options);
    let theirs = tree::read(kernel.path()).unwrap();
    let plain = scratch.make("plain-of-all");
    layers::copy_tree(kernel.path(), &plain);
    kernel.unmount();
    if !index {
        let ours = Overlay::cowlfs(&stack.read_only(), &scratch.make("read"), "dev,suid");
        let read = tree::read(ours.path()).map_err(|error| format!("reading: {error}"))?;
        ours.unmount();
        same(
            "the kernel's layers as cowlfs (first) reads them",
            &read,
            &theirs,
            Compare::READER,
        )?;
    }

    let mut pair = Pair::over(store, stack, plain, "dev,suid");
    pair.mount();
    run(course(seed, 120), &mut pair, replay, steps, true)?;
    pair.unmount();
    pair.mount();
    pair.compare("after a new mount", &pair.tested, Compare::HISTORY)?;
    pair.unmount();
    kernel_reads(&pair)
}
