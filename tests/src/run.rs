//! Runs random steps on a pair, and searches for the shortest sequence of steps that still fails.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::identity::Numbers;
use crate::noise::Noise;
use crate::pair::Pair;
use crate::random::{Caller, Generator, Op, Side};
use crate::tree::{self, Compare, Paths, Tree};

/// A step of a run.
#[derive(Debug, Clone)]
pub enum Step {
    /// Performs an operation on both trees.
    Do(Op, Caller),
    /// Unmounts the mounted tree and mounts it again.
    MountAnew,
    /// Freezes the upper layer into a lower layer.
    Snapshot {
        /// Whether the tree stays mounted.
        live: bool,
    },
    /// Merges adjacent layers.
    Flatten {
        /// Number that selects the layers.
        which: u64,
        /// Whether the tree stays mounted.
        live: bool,
    },
    /// Reads and compares both trees, including the inode numbers of all objects.
    Compare,
}

/// A failed run.
#[derive(Debug)]
pub struct Failure {
    /// Description of the problem.
    pub message: String,
    /// All steps up to and including the failing one.
    pub steps: Vec<Step>,
}

/// Reads a number from the environment.
#[must_use]
pub fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

/// Runs `body`, which records its steps, and converts a panic (for example because a daemon exited) into a failure,
/// which can be shrunk.
pub fn caught(body: impl FnOnce(&mut Vec<Step>) -> Result<(), String>) -> Result<(), Failure> {
    let mut steps = Vec::new();
    let message = match catch_unwind(AssertUnwindSafe(|| body(&mut steps))) {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(message)) => message,
        Err(_) => "panic, see above".to_owned(),
    };
    Err(Failure { message, steps })
}

/// Parameters of random steps.
#[derive(Debug, Clone, Copy)]
pub struct Course {
    /// Seed.
    pub seed: u64,
    /// Number of steps.
    pub count: u64,
    /// Percentage of operations by users other than root.
    pub others: u64,
    /// Percentage of steps that take a snapshot of the mounted tree, in addition to the fixed ones.
    pub snapshots: u64,
    /// Whether to create devices 0:0, as an overlay on top would.
    pub whiteouts: bool,
    /// Whether another thread reads the tree concurrently.
    pub noise: bool,
}

impl Course {
    /// Returns the fixed event at a step of a run, if any. Over a run there are two new mounts, live and unmounted
    /// snapshots, and a flatten; random steps add more.
    fn event(self, index: u64) -> Option<Step> {
        let part = (self.count / 7).max(1);
        if index == 0 || !index.is_multiple_of(part) {
            return None;
        }
        match index / part {
            1 | 4 => Some(Step::MountAnew),
            2 | 6 => Some(Step::Snapshot { live: true }),
            3 => Some(Step::Snapshot { live: false }),
            5 => Some(Step::Flatten {
                which: self.seed / 2,
                live: self.seed.is_multiple_of(2),
            }),
            _ => None,
        }
    }

    fn step(self, index: u64, generator: &mut Generator, known: &Paths) -> Step {
        if let Some(event) = self.event(index) {
            return event;
        }
        if self.snapshots > 0 && generator.rng().chance(self.snapshots) {
            return Step::Snapshot { live: true };
        }
        match generator.rng().below(300) {
            0 => return Step::MountAnew,
            1 => return Step::Snapshot { live: true },
            2 => return Step::Compare,
            3 => {
                let which = generator.rng().below(60);
                return Step::Flatten { which, live: true };
            }
            _ => {}
        }
        let op = generator.next(known);
        Step::Do(op, generator.caller(self.others))
    }
}

/// Runs steps on a mounted pair: those in `replay`, or random ones. Records every step in `steps` before it is
/// performed. Returns the final tree of the mount.
pub fn run(
    course: Course,
    pair: &mut Pair,
    replay: Option<&[Step]>,
    steps: &mut Vec<Step>,
    numbers: bool,
) -> Result<Tree, String> {
    let count = replay.map_or(course.count, |steps| steps.len() as u64);
    let mut generator = Generator::new(course.seed);
    if course.whiteouts {
        generator = generator.with_whiteouts();
    }
    let mut sides = [Side::new(&pair.tested), Side::new(&pair.plain)];
    let mut known = Paths::default();
    let mut seen = numbers.then(Numbers::default);
    check(pair, &sides, &mut seen, "before any operation")?;
    let begin = |pair: &Pair, index| course.noise.then(|| Noise::begin(&pair.tested, index));
    let mut noise = begin(pair, course.seed);
    for index in 0..count {
        let step = match replay.and_then(|steps| steps.get(usize::try_from(index).ok()?)) {
            Some(step) => step.clone(),
            None => {
                if index.is_multiple_of(4) {
                    known = tree::paths(&pair.plain).expect("the plain directory");
                }
                course.step(index, &mut generator, &known)
            }
        };
        steps.push(step.clone());
        if std::env::var_os("COWL_TRACE").is_some() {
            eprintln!("{index}: {}", show(&step));
        }
        let when = format!("step {index}, {}", show(&step));
        if let Step::Do(op, caller) = &step {
            let [tested, plain] = &mut sides;
            let expected = plain.perform(op, *caller);
            let got = tested.perform(op, *caller);
            if got != expected {
                return Err(format!(
                    "{when}\n  plain directory: {}\n  mounted:         {}",
                    short(&format!("{expected:?}")),
                    short(&format!("{got:?}"))
                ));
            }
            if std::env::var_os("COWL_COMPARE").is_some() {
                check(pair, &sides, &mut seen, &format!("after {when}"))?;
            }
            continue;
        }
        if let Some(noise) = noise.take() {
            noise
                .end()
                .map_err(|error| format!("before {when}: {error}"))?;
        }
        if !matches!(step, Step::Compare) {
            check(pair, &sides, &mut seen, &format!("before {when}"))?;
        }
        // An object that is not known to the kernel may get another number when its layer is merged, and other tests
        // drop the kernel's caches.
        let known = matches!(step, Step::Flatten { live: true, .. })
            .then(|| tree::open_all(&pair.tested).expect("the mounted tree"));
        sides = perform_event(&step, pair, sides, &mut seen);
        check(pair, &sides, &mut seen, &when)?;
        drop(known);
        noise = begin(pair, index);
    }
    if let Some(noise) = noise.take() {
        noise.end()?;
    }
    check(pair, &sides, &mut seen, "after the operations")
}

/// Performs a step that is not an operation. If it requires an unmount, closes the descriptors and mappings on both
/// sides.
fn perform_event(
    step: &Step,
    pair: &mut Pair,
    sides: [Side; 2],
    numbers: &mut Option<Numbers>,
) -> [Side; 2] {
    if let Step::Compare | Step::Do(..) = step {
        return sides;
    }
    if let Step::Snapshot { live: true } = step
        && pair.can_push()
    {
        // Descriptors and mappings stay open.
        for side in &sides {
            side.sync_mappings();
        }
        pair.snapshot(true);
        return sides;
    }
    if let Step::Flatten { which, live: true } = step
        && pair.can_push()
    {
        pair.flatten(*which, true);
        return sides;
    }
    drop(sides);
    match step {
        Step::MountAnew => {
            pair.unmount();
            pair.mount();
        }
        Step::Snapshot { .. } => pair.snapshot(false),
        Step::Flatten { which, .. } => pair.flatten(*which, false),
        Step::Compare | Step::Do(..) => {}
    }
    if let Some(numbers) = numbers {
        // The layers that determined the numbers no longer exist. A mount retains the numbers until it ends.
        if pair.take_flattened() {
            numbers.forget();
        }
        numbers.mounted_anew();
    }
    [Side::new(&pair.tested), Side::new(&pair.plain)]
}

fn check(
    pair: &Pair,
    sides: &[Side; 2],
    numbers: &mut Option<Numbers>,
    when: &str,
) -> Result<Tree, String> {
    sides.iter().for_each(Side::sync_mappings);
    let (mounted, plain) = pair.compare(when, &pair.tested, Compare::HISTORY)?;
    if let Some(numbers) = numbers {
        let wrong = tree::wrong_listed_numbers(&mounted);
        if !wrong.is_empty() {
            return Err(format!("{when}: readdir and stat disagree: {wrong:?}"));
        }
        let [tested, plainly] = sides;
        numbers
            .check((&mounted, &plain), (&tested.held(), &plainly.held()))
            .map_err(|error| format!("{when}: {error}"))?;
    }
    Ok(mounted)
}

/// Removes ever smaller parts of the steps as long as the run still fails.
pub fn shrink(
    mut steps: Vec<Step>,
    run: impl Fn(&[Step]) -> Result<(), Failure>,
) -> (Vec<Step>, String) {
    let mut message = "the original failure".to_owned();
    let mut part = steps.len().div_ceil(2).max(1);
    loop {
        let mut start = 0;
        while start < steps.len() {
            let mut fewer = steps.clone();
            fewer.drain(start..(start + part).min(steps.len()));
            match run(&fewer) {
                Err(failure) => {
                    message = failure.message;
                    steps = failure.steps;
                }
                Ok(()) => start += part,
            }
        }
        if part == 1 {
            return (steps, message);
        }
        part = part.div_ceil(2);
    }
}

/// Formats a step, with its paths as text.
#[must_use]
pub fn show(step: &Step) -> String {
    let text = match step {
        Step::Do(op, caller) => format!("{op:?} by {caller:?}"),
        other => format!("{other:?}"),
    };
    // Paths are lists of bytes: print "[97, 47, 98]" as "a/b".
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
    match text.char_indices().nth(900) {
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
