//! Makes power cuts, and checks the state after each.

use std::fs::File;
use std::path::Path;

use super::disk::{self, Log};
use super::kinds::Subject;
use super::work::{Base, Past, Step, stack};
use crate::mount::Overlay;
use crate::random::rng::Rng;
use crate::scratch::Scratch;

/// Findings after all cuts.
#[derive(Debug, Default)]
pub struct Findings {
    /// Number of cuts after which something was wrong.
    pub bad_cuts: usize,
    /// The problems, one per line.
    pub lines: Vec<String>,
}

impl std::ops::AddAssign for Findings {
    fn add_assign(&mut self, other: Self) {
        self.bad_cuts += other.bad_cuts;
        self.lines.extend(other.lines);
    }
}

/// Power cuts of one run.
#[derive(Debug, Clone, Copy)]
pub struct Cuts<'r> {
    /// The log of the disk.
    pub log: &'r Log,
    /// The image of the disk when logging began.
    pub before: &'r Path,
    /// First and last time of the run.
    pub span: (u64, u64),
    /// Number of cuts.
    pub count: u64,
    /// Seed of the times of the cuts and of the blocks that survive.
    pub seed: u64,
}

impl Cuts<'_> {
    /// Makes the cuts. Each cut is an image in `scratch`, which is removed afterwards. `inspect` gets the image and the
    /// time of the cut, and returns the problems.
    pub fn make(
        &self,
        scratch: &Scratch,
        inspect: impl FnMut(&Path, u64) -> Vec<String>,
    ) -> Findings {
        self.make_in(scratch, |_| self.span, inspect)
    }

    /// Makes the cuts like [`Cuts::make`], each at a time in the span that `span_of` returns for its number.
    pub fn make_in(
        &self,
        scratch: &Scratch,
        span_of: impl Fn(u64) -> (u64, u64),
        mut inspect: impl FnMut(&Path, u64) -> Vec<String>,
    ) -> Findings {
        let mut findings = Findings::default();
        for cut in 0..self.count {
            let mut rng = Rng::new(self.seed ^ cut << 20);
            let (from, to) = span_of(cut);
            let moment = from + rng.below(to - from);
            // Percentage of the unflushed blocks that survive.
            let percent = rng.pick(&[0, 30, 50, 70, 100]);
            // A new name for each image, because another mount namespace may hold the previous one for a moment.
            let image = scratch.join(format!("cut{cut}.image"));
            disk::copy(self.before, &image);
            let file = File::options().write(true).open(&image).unwrap();
            self.log.replay(&file, moment, percent, &mut rng);
            drop(file);
            let wrong = inspect(&image, moment);
            std::fs::remove_file(&image).unwrap();
            findings.bad_cuts += usize::from(!wrong.is_empty());
            let when =
                format!("cut {cut} at {moment}, {percent} % of the unflushed blocks survive");
            let lines = wrong.into_iter().map(|line| format!("{when}: {line}"));
            findings.lines.extend(lines);
        }
        findings
    }
}

/// Makes the cuts, and judges every subject after each. Without `durable`, synced changes may be lost.
#[must_use]
pub fn cut_often(
    scratch: &Scratch,
    base: &Base,
    past: &Past,
    cuts: Cuts<'_>,
    durable: bool,
) -> Findings {
    cuts.make(scratch, |image, moment| {
        judge_image(scratch, base, image, past, moment, durable)
    })
}

/// Mounts the layers as they are after a cut, and judges every subject.
fn judge_image(
    scratch: &Scratch,
    base: &Base,
    image: &Path,
    past: &Past,
    moment: u64,
    durable: bool,
) -> Vec<String> {
    let mount_point = scratch.make("after");
    base.mount_image(image, &mount_point);
    let overlay = Overlay::cowlfs(&stack(&mount_point), &scratch.make("mount"), &base.overlay);
    let mut wrong: Vec<String> = past
        .subjects
        .iter()
        .filter_map(|(subject, steps)| {
            let reason = judge(subject, steps, overlay.path(), moment, durable).err()?;
            Some(format!("{reason}; {}", stored(subject, &mount_point)))
        })
        .collect();
    let work = mount_point.join("work/work");
    let left = std::fs::read_dir(&work).unwrap().count();
    if left > 0 {
        wrong.push(format!("{left} entries are left in the work directory"));
    }
    overlay.unmount();
    crate::mount::unmount_free(&mount_point);
    wrong
}

/// Describes what the layers contain for `subject`, to tell a loss in the base from one in the overlay.
fn stored(subject: &Subject, base: &Path) -> String {
    let script = "for layer in upper lower; do
        echo \"$layer:\"
        find $layer/$1 -name \"*$2*\" -exec stat -c '%n %F %i %t,%T %s' {} + -exec getfattr -hdm - {} +
        find $layer/$1 -path \"*$2/*\" -exec stat -c '%n %F %i %t,%T %s' {} +
    done 2>&1";
    let (dir, id) = subject.place();
    let output = std::process::Command::new("sh")
        .args(["-c", script, "sh", &dir, &id])
        .current_dir(base)
        .output();
    output.map_or_else(
        |error| error.to_string(),
        |output| crate::command::show(&output.stdout).to_string(),
    )
}

/// Verifies that a subject has one of the permitted states: not older than the last step that was durable at the time
/// of the cut, and not newer than the last step that had begun.
fn judge(
    subject: &Subject,
    steps: &[Step],
    root: &Path,
    moment: u64,
    durable: bool,
) -> Result<(), String> {
    let is_durable = |step: &Step| durable && step.durable.is_some_and(|at| at <= moment);
    let least = steps
        .iter()
        .rposition(is_durable)
        .map_or(0, |index| index + 1);
    let most = steps.iter().filter(|step| step.began <= moment).count();
    let mut mismatches = Vec::new();
    for state in least..=most.max(least) {
        match subject.shows(root, state, state == least) {
            Ok(()) => return Ok(()),
            Err(reason) => mismatches.push(format!("not {state} ({reason})")),
        }
    }
    Err(format!(
        "{:?} {} (synced: {}) has none of the states {least} to {most}: {}",
        subject.kind,
        subject.id,
        subject.synced,
        mismatches.join("; ")
    ))
}
