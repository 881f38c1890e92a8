//! Cuts, and what is found after each.

use std::fs::File;
use std::path::Path;

use super::disk::{self, Log};
use super::kinds::Subject;
use super::work::{Base, Past, Step, stack};
use crate::mount::Overlay;
use crate::random::rng::Rng;
use crate::scratch::Scratch;

/// What was found after all cuts.
#[derive(Debug, Default)]
pub struct Findings {
    /// How many cuts left something wrong.
    pub bad_cuts: usize,
    /// What, one line each.
    pub lines: Vec<String>,
}

/// Cuts the power `cuts` times. Without `durable`, what was synced may be lost.
#[must_use]
pub fn cut_often(
    scratch: &Scratch,
    base: &Base,
    (past, log): (&Past, &Log),
    before: &Path,
    (cuts, seed, durable): (u64, u64, bool),
) -> Findings {
    let mut findings = Findings::default();
    for cut in 0..cuts {
        let mut coin = Rng::new(seed ^ cut << 20);
        let (from, to) = past.span;
        let moment = from + coin.below(to - from);
        // All of what was not flushed, nothing of it, or some.
        let percent = coin.pick(&[0, 30, 50, 70, 100]);
        let image = scratch.join("cut.image");
        disk::copy(before, &image);
        let file = File::options().write(true).open(&image).unwrap();
        log.replay(&file, moment, percent, &mut coin);
        drop(file);
        let wrong = look(scratch, base, &image, past, moment, durable);
        findings.bad_cuts += usize::from(!wrong.is_empty());
        let said = format!("cut {cut} at {moment}, {percent} % of the unflushed kept");
        findings
            .lines
            .extend(wrong.into_iter().map(|line| format!("{said}: {line}")));
    }
    findings
}

/// Mounts what a cut left and looks at every subject.
fn look(
    scratch: &Scratch,
    base: &Base,
    image: &Path,
    past: &Past,
    moment: u64,
    durable: bool,
) -> Vec<String> {
    let place = scratch.make("after");
    let with_loop = Base {
        options: format!("loop,{}", base.options),
        ..base.clone()
    };
    let image = image.to_str().expect("a plain path");
    super::work::mount(&with_loop, image, &place);
    let overlay = Overlay::cowlfs(&stack(&place), &scratch.make("mount"), &base.overlay);
    let mut wrong: Vec<String> = past
        .subjects
        .iter()
        .filter_map(|(subject, steps)| judge(subject, steps, overlay.path(), moment, durable).err())
        .collect();
    let work = place.join("work/work");
    let left = std::fs::read_dir(&work).unwrap().count();
    if left > 0 {
        wrong.push(format!("{left} things are left in the work folder"));
    }
    overlay.unmount();
    crate::mount::unmount_free(&place);
    wrong
}

/// Whether what is seen of a subject is what it was before its steps or after one that had begun, and
/// after the last one that was on the disk.
fn judge(
    subject: &Subject,
    steps: &[Step],
    root: &Path,
    moment: u64,
    durable: bool,
) -> Result<(), String> {
    let on_disk = |step: &Step| durable && step.durable.is_some_and(|at| at <= moment);
    let least = steps.iter().rposition(on_disk).map_or(0, |at| at + 1);
    let most = steps.iter().filter(|step| step.began <= moment).count();
    let mut said = Vec::new();
    for state in least..=most.max(least) {
        match subject.shows(root, state, state == least) {
            Ok(()) => return Ok(()),
            Err(why) => said.push(format!("not {state} ({why})")),
        }
    }
    Err(format!(
        "{:?} {} (synced: {}) shows none of its states {least} to {most}: {}",
        subject.kind,
        subject.id,
        subject.synced,
        said.join("; ")
    ))
}
