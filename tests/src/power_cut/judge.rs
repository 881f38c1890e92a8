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

impl std::ops::AddAssign for Findings {
    fn add_assign(&mut self, other: Self) {
        self.bad_cuts += other.bad_cuts;
        self.lines.extend(other.lines);
    }
}

/// The cuts to make of one run.
#[derive(Debug, Clone, Copy)]
pub struct Cuts<'r> {
    /// The requests of the disk.
    pub log: &'r Log,
    /// The image of the disk when the log began.
    pub before: &'r Path,
    /// The first and the last moment of the run.
    pub span: (u64, u64),
    /// How many cuts to make.
    pub count: u64,
    /// The seed of the moments and of the blocks that survive.
    pub seed: u64,
}

impl Cuts<'_> {
    /// Makes the cuts, each as an image of its own in `scratch`, and has `inspect` list what is wrong with an
    /// image and a moment. Images are removed.
    pub fn make(
        &self,
        scratch: &Scratch,
        mut inspect: impl FnMut(&Path, u64) -> Vec<String>,
    ) -> Findings {
        let mut findings = Findings::default();
        for cut in 0..self.count {
            let mut coin = Rng::new(self.seed ^ cut << 20);
            let (from, to) = self.span;
            let moment = from + coin.below(to - from);
            // All of what was not flushed, nothing of it, or some.
            let percent = coin.pick(&[0, 30, 50, 70, 100]);
            // Not one name for all: another mount namespace may hold the last image for a moment.
            let image = scratch.join(format!("cut{cut}.image"));
            disk::copy(self.before, &image);
            let file = File::options().write(true).open(&image).unwrap();
            self.log.replay(&file, moment, percent, &mut coin);
            drop(file);
            let wrong = inspect(&image, moment);
            std::fs::remove_file(&image).unwrap();
            findings.bad_cuts += usize::from(!wrong.is_empty());
            let when = format!("cut {cut} at {moment}, {percent} % of the unflushed kept");
            let lines = wrong.into_iter().map(|line| format!("{when}: {line}"));
            findings.lines.extend(lines);
        }
        findings
    }
}

/// Makes the cuts and judges every subject after each. Without `durable`, synced changes may be lost.
#[must_use]
pub fn cut_often(
    scratch: &Scratch,
    base: &Base,
    past: &Past,
    cuts: Cuts<'_>,
    durable: bool,
) -> Findings {
    cuts.make(scratch, |image, moment| {
        look(scratch, base, image, past, moment, durable)
    })
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
    base.mount_image(image, &place);
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
