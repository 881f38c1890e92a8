//! Random operations on a mounted stack and on a plain folder with the same content must give the
//! same results, error number by error number, and leave the same tree: at the end, after a new
//! mount, and as the kernel's overlayfs reads the layers.
//!
//! `COWL_SEEDS=N` runs N seeds, `COWL_SEED=S` only the one, `COWL_STEPS=N` operations in each.
//! `COWL_SHRINK=1` looks for the fewest operations that still fail. `COWL_UNDER_TEST=plain` (or
//! `kernel`) puts a plain folder (the kernel's overlayfs) in cowlfs's place, to try the test itself.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use cowl_tests::conditions::{Need, can};
use cowl_tests::mount::{Overlay, Stack};
use cowl_tests::random::{Generator, Op, Side};
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare, Tree};
use cowl_tests::{command, layers, programs};

/// What the first tree of the pair is.
#[derive(Clone, Copy, PartialEq)]
enum Under {
    Overlay,
    Kernel,
    Plain,
}

/// One step of a run.
#[derive(Clone)]
enum Step {
    Do(Op, u32),
    MountAnew,
}

/// Why a run failed, and what was done until then.
struct Failure {
    what: String,
    steps: Vec<Step>,
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn a_mounted_stack_cannot_be_told_from_a_plain_folder() {
    let test = "a_mounted_stack_cannot_be_told_from_a_plain_folder";
    if !can(test, &[Need::Root, Need::Fuse, Need::KernelOverlay]) {
        return;
    }
    let under = match std::env::var("COWL_UNDER_TEST").as_deref() {
        Ok("plain") => Under::Plain,
        Ok("kernel") => Under::Kernel,
        _ => Under::Overlay,
    };
    let seeds: Vec<u64> = match std::env::var("COWL_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (1..=number("COWL_SEEDS", 30)).collect(),
    };
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let mut failed = Vec::new();
    for seed in &seeds {
        if let Err(failure) = one_seed(*seed, under, None) {
            eprintln!("\nseed {seed}: {}", failure.what);
            report(*seed, under, failure.steps);
            failed.push(*seed);
        }
    }
    assert!(
        failed.is_empty(),
        "{} of {} seeds failed: {failed:?}; COWL_SEED={} COWL_SHRINK=1 looks for the shortest way there",
        failed.len(),
        seeds.len(),
        failed.first().unwrap_or(&0)
    );
}

/// Prints the last steps, or the fewest that fail.
fn report(seed: u64, under: Under, steps: Vec<Step>) {
    let steps = if std::env::var_os("COWL_SHRINK").is_some() {
        let (steps, what) = shrink(seed, under, steps);
        eprintln!("{} steps are enough: {what}", steps.len());
        steps
    } else {
        steps.iter().rev().take(15).rev().cloned().collect()
    };
    for step in steps {
        eprintln!("  {}", show(&step));
    }
}

/// Leaves out ever smaller parts for as long as it still fails.
fn shrink(seed: u64, under: Under, mut steps: Vec<Step>) -> (Vec<Step>, String) {
    let mut what = "the same".to_owned();
    let mut part = steps.len().div_ceil(2);
    loop {
        let mut start = 0;
        while start < steps.len() {
            let mut fewer = steps.clone();
            fewer.drain(start..(start + part).min(steps.len()));
            match one_seed(seed, under, Some(&fewer)) {
                Err(failure) => {
                    what = failure.what;
                    steps = failure.steps;
                }
                Ok(()) => start += part,
            }
        }
        if part == 1 {
            return (steps, what);
        }
        part = part.div_ceil(2);
    }
}

/// A stack, mounted, and a plain folder that must stay the same.
struct Pair {
    mounted: Option<Overlay>,
    tested: PathBuf,
    plain: PathBuf,
    stack: Stack,
    under: Under,
}

impl Pair {
    fn mount(&mut self) {
        self.mounted = match self.under {
            // Devices work on the plain folder, so they must on the mount.
            Under::Overlay => Some(Overlay::cowlfs(&self.stack, &self.tested, "dev,suid")),
            Under::Kernel => Some(Overlay::kernel(&self.stack, &self.tested)),
            Under::Plain => None,
        };
    }

    fn unmount(&mut self) {
        if let Some(mounted) = self.mounted.take() {
            mounted.unmount();
        }
    }

    fn compare(&self, when: &str, place: &Path, compare: Compare) -> Result<Tree, String> {
        let found = tree::read(place).map_err(|error| format!("{when}: reading: {error}"))?;
        same(when, &found, &tree::read(&self.plain).unwrap(), compare)?;
        Ok(found)
    }
}

/// The first tree is the mounted one.
fn same(when: &str, mounted: &Tree, plain: &Tree, compare: Compare) -> Result<(), String> {
    let lines = tree::differences(mounted, plain, compare);
    if lines.is_empty() {
        return Ok(());
    }
    let first: String = lines
        .iter()
        .take(12)
        .map(|line| format!("\n    {line}"))
        .collect();
    Err(format!(
        "{when}, {} differences (mounted, then plain):{first}",
        lines.len()
    ))
}

/// One run: with the steps that are given, or with random ones.
fn one_seed(seed: u64, under: Under, replay: Option<&[Step]>) -> Result<(), Failure> {
    let mut steps = Vec::new();
    // What panics (a daemon that ends, say) is a failure to be shrunk like any other.
    let result = catch_unwind(AssertUnwindSafe(|| {
        all_of_it(seed, under, replay, &mut steps)
    }));
    let what = match result {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(what)) => what,
        Err(_) => "panic, see above".to_owned(),
    };
    Err(Failure { what, steps })
}

fn all_of_it(
    seed: u64,
    under: Under,
    replay: Option<&[Step]>,
    steps: &mut Vec<Step>,
) -> Result<(), String> {
    let scratch = Scratch::new("differential");
    // Whiteouts that hide nothing, which only the kernel shows.
    let stray = seed.is_multiple_of(4) && under != Under::Kernel;
    let (lowers, plain) = layers::make_three(&scratch, seed, stray).unwrap();
    let (upper, work) = (scratch.make("upper"), scratch.make("work"));
    // The topmost layer gives the root its attributes.
    layers::copy_root(lowers.first().unwrap(), &upper).unwrap();
    let stack = Stack {
        lowers,
        upper: Some((upper, work)),
    };
    let tested = scratch.make("tested");
    if under == Under::Plain {
        command::run("cp", [Path::new("-aT"), &plain, &tested]).ok();
    }
    let mut pair = Pair {
        mounted: None,
        tested,
        plain,
        stack,
        under,
    };
    pair.mount();
    pair.compare("before any operation", &pair.tested, Compare::HISTORY)?;

    run(seed, &mut pair, replay, steps)?;

    let ours = under == Under::Overlay && programs::overlay_is_ours();
    let last = pair.compare("after the operations", &pair.tested, Compare::HISTORY)?;
    let wrong = tree::wrong_listed_numbers(&last);
    if ours && !wrong.is_empty() {
        return Err(format!("readdir and stat disagree on numbers: {wrong:?}"));
    }
    pair.unmount();
    pair.mount();
    let again = pair.compare("after a new mount", &pair.tested, Compare::HISTORY)?;
    if ours {
        same(
            "numbers before (first) and after a new mount",
            &last,
            &again,
            Compare::IDENTICAL,
        )?;
    }
    pair.unmount();
    if under != Under::Plain && !stray {
        let kernel = Overlay::kernel(&pair.stack.read_only(), &scratch.make("kernel"));
        let compare = Compare {
            nlink: false,
            ..Compare::HISTORY
        };
        pair.compare("as the kernel reads the layers", kernel.path(), compare)?;
    }
    Ok(())
}

fn run(
    seed: u64,
    pair: &mut Pair,
    replay: Option<&[Step]>,
    steps: &mut Vec<Step>,
) -> Result<(), String> {
    let count = replay.map_or(number("COWL_STEPS", 400), |steps| steps.len() as u64);
    let mut generator = Generator::new(seed);
    let (mut tested, mut plain) = (Side::new(&pair.tested), Side::new(&pair.plain));
    let mut known = Vec::new();
    for index in 0..count {
        let step = match replay.and_then(|steps| steps.get(usize::try_from(index).ok()?)) {
            Some(step) => step.clone(),
            None => {
                if index.is_multiple_of(8) {
                    known = tree::paths(&pair.plain).unwrap();
                }
                random_step(&mut generator, &known)
            }
        };
        steps.push(step.clone());
        if std::env::var_os("COWL_TRACE").is_some() {
            eprintln!("{index}: {}", show(&step));
        }
        let Step::Do(op, user) = step else {
            drop((tested, plain));
            pair.unmount();
            pair.mount();
            (tested, plain) = (Side::new(&pair.tested), Side::new(&pair.plain));
            continue;
        };
        let expected = plain.perform(&op, user);
        let got = tested.perform(&op, user);
        if got != expected {
            return Err(format!(
                "step {index}\n  plain folder: {}\n  mounted:      {}",
                short(&format!("{expected:?}")),
                short(&format!("{got:?}"))
            ));
        }
    }
    Ok(())
}

fn random_step(generator: &mut Generator, known: &[Vec<u8>]) -> Step {
    if generator.rng().below(150) == 0 {
        return Step::MountAnew;
    }
    let op = generator.next(known);
    Step::Do(op, if generator.rng().chance(15) { 1000 } else { 0 })
}

/// A step with its paths as text.
fn show(step: &Step) -> String {
    let Step::Do(op, user) = step else {
        return "mount anew".to_owned();
    };
    let text = format!("as {user}: {op:?}");
    // Paths are lists of bytes: show "[97, 47, 98]" as "a/b".
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once('[') {
        out.push_str(before);
        let Some((inside, tail)) = after.split_once(']') else {
            break;
        };
        let bytes: Option<Vec<u8>> = inside
            .split(", ")
            .map(|digits| digits.parse().ok())
            .collect();
        match bytes {
            Some(bytes) => out.push_str(&format!("\"{}\"", bytes.escape_ascii())),
            None => out.push_str(&format!("[{inside}]")),
        }
        rest = tail;
    }
    out.push_str(rest);
    short(&out)
}

fn short(text: &str) -> String {
    match text.char_indices().nth(400) {
        Some((end, _)) => {
            format!(
                "{}... ({} characters)",
                text.get(..end).unwrap_or(text),
                text.len()
            )
        }
        None => text.to_owned(),
    }
}
