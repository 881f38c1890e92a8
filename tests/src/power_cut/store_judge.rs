//! Judges a store after power cuts.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::judge::{Cuts, Findings};
use super::store::{Care, LIVE, Past, content, cowl, store_on};
use super::work::Base;
use crate::command::{Output, run_command};
use crate::scratch::Scratch;

/// Number of states by result.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counts {
    /// Marked durable and intact.
    pub durable: usize,
    /// Marked durable but not intact: a violation.
    pub broken: usize,
    /// Reported incomplete and not intact.
    pub lost: usize,
    /// Reported incomplete although intact.
    pub spared: usize,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.durable += other.durable;
        self.broken += other.broken;
        self.lost += other.lost;
        self.spared += other.spared;
    }
}

/// Makes the cuts and judges every state of the store after each.
#[must_use]
pub fn cut_often(
    scratch: &Scratch,
    base: &Base,
    past: &Past,
    cuts: Cuts<'_>,
) -> (Findings, Counts) {
    let mut counts = Counts::default();
    let findings = cuts.make(scratch, |image, moment| {
        let after = After::of(scratch, base, image, moment);
        let (wrong, counted) = after.judge(past);
        after.end(image);
        counts += counted;
        wrong
    });
    (findings, counts)
}

/// The disk after a cut, used with another boot id.
pub(super) struct After {
    mount_point: PathBuf,
    boot: PathBuf,
    moment: u64,
}

/// The state that `list` reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shown {
    Durable,
    Incomplete,
}

impl After {
    pub(super) fn of(scratch: &Scratch, base: &Base, image: &Path, moment: u64) -> After {
        let mount_point = scratch.make("after");
        base.mount_image(image, &mount_point);
        let boot = scratch.join("boot");
        std::fs::write(&boot, format!("{}\n", uuid::Uuid::new_v4())).unwrap();
        After {
            mount_point,
            boot,
            moment,
        }
    }

    /// Returns the path of the store.
    pub(super) fn store(&self) -> PathBuf {
        store_on(&self.mount_point)
    }

    /// Unmounts the disk, and waits until no mount namespace holds it.
    pub(super) fn end(self, image: &Path) {
        crate::mount::unmount_free(&self.mount_point);
        crate::images::wait_detached(image);
    }

    /// Runs a script in a mount namespace with another boot id. `"$@"` is cowl's command line.
    pub(super) fn script<S: AsRef<OsStr>>(
        &self,
        script: &str,
        args: impl IntoIterator<Item = S>,
    ) -> Output {
        let line = cowl(&store_on(&self.mount_point), Care::Whole);
        let mut command = Command::new("unshare");
        command.args(["-m", "--propagation", "private", "sh", "-euc"]);
        command.arg(format!(
            "mount --bind \"$0\" /proc/sys/kernel/random/boot_id; {script}"
        ));
        command.arg(&self.boot).arg(line.get_program());
        command.args(line.get_args()).args(args);
        command.env("COWL_CONFIG", "/dev/null");
        run_command(command, b"")
    }

    fn cowl<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        self.script("exec \"$@\"", args)
    }

    /// Runs a command that must succeed; otherwise its output is added to `wrong`.
    pub(super) fn must(&self, args: &[&str], wrong: &mut Vec<String>) -> Option<Output> {
        let output = self.cowl(args);
        if output.code == 0 {
            return Some(output);
        }
        wrong.push(output.report());
        None
    }

    fn judge(&self, past: &Past) -> (Vec<String>, Counts) {
        let (mut wrong, mut counts) = (Vec::new(), Counts::default());
        let mut incomplete = Vec::new();
        let Some(shown) = self.shown(&mut wrong) else {
            return (wrong, counts);
        };
        for fact in &past.facts {
            let gone = fact.until.is_some_and(|until| until <= self.moment);
            let Some(state) = shown.get(&fact.address) else {
                if fact.from <= self.moment && !gone {
                    wrong.push(format!(
                        "{} was acknowledged, but does not exist",
                        fact.address
                    ));
                }
                continue;
            };
            if fact.durable.is_some_and(|at| at <= self.moment) && *state == Shown::Incomplete {
                wrong.push(format!("{} was durable, but is incomplete", fact.address));
            }
            let Some(known) = fact.content else { continue };
            if *state == Shown::Incomplete {
                self.refuses(&fact.address, &mut wrong);
                incomplete.push((fact.address.as_str(), known));
                continue;
            }
            let export = self.must(&["export", &fact.address, "-"], &mut wrong);
            match export.is_some_and(|export| content(&export.stdout) == known) {
                true => counts.durable += 1,
                false => {
                    counts.broken += 1;
                    wrong.push(format!(
                        "{} is marked durable, but its content differs",
                        fact.address
                    ));
                }
            }
        }
        self.check(&shown, &mut wrong);
        // The repair has accepted these states, so export does not mark them any more.
        for (address, known) in incomplete {
            let export = self.must(&["export", address, "-"], &mut wrong);
            match export.is_some_and(|export| content(&export.stdout) == known) {
                true => counts.spared += 1,
                false => counts.lost += 1,
            }
        }
        (wrong, counts)
    }

    /// Verifies that an incomplete state is refused without `--force`.
    fn refuses(&self, address: &str, wrong: &mut Vec<String>) {
        for args in [
            &["export", address, "-"][..],
            &["clone", address, "refused"],
        ] {
            let refused = self.cowl(args);
            if refused.code != 1 || !refused.err().contains("is incomplete") {
                wrong.push(refused.report());
            }
        }
        self.must(&["export", address, "-", "--force"], wrong);
    }

    /// Returns all states of the store with their reported state.
    pub(super) fn shown(&self, wrong: &mut Vec<String>) -> Option<HashMap<String, Shown>> {
        let mut shown = HashMap::new();
        let listed = self.must(&["list", "--format", "{name}"], wrong)?;
        // The next command on a container completes an interrupted change, such as a rename.
        for name in listed.out().lines() {
            let settled = self.cowl(["show", name]);
            if settled.code != 0 && settled.code != 3 {
                wrong.push(settled.report());
            }
        }
        let listed = self.must(&["list", "--format", "{name}"], wrong)?;
        for name in listed.out().lines() {
            let json = self.must(&["show", name, "--json"], wrong)?.json();
            let state = match json["state"].as_str() {
                None => Shown::Durable,
                Some("incomplete") => Shown::Incomplete,
                Some(other) => {
                    wrong.push(format!("{name} is {other} in another boot"));
                    continue;
                }
            };
            shown.insert(name.to_owned(), state);
            let inner = self.must(&["list", name, "--format", "{name} {state}"], wrong)?;
            for line in inner.out().lines() {
                let (snapshot, state) = line.split_once(' ').unwrap_or_default();
                let state = match state {
                    "durable" => Shown::Durable,
                    "incomplete" => Shown::Incomplete,
                    other => {
                        wrong.push(format!("{name}@{snapshot} is {other} in another boot"));
                        continue;
                    }
                };
                shown.insert(format!("{name}@{snapshot}"), state);
            }
        }
        Some(shown)
    }

    /// Verifies that `check` reports each incomplete state once, and no damage; that it reports nothing after a
    /// repair; and that the live container is usable.
    fn check(&self, shown: &HashMap<String, Shown>, wrong: &mut Vec<String>) {
        let losses = shown
            .values()
            .filter(|state| **state == Shown::Incomplete)
            .count();
        for (args, expected) in [
            (&["check"][..], losses),
            (&["check", "--repair"], losses),
            (&["check"], 0),
            (&["check", "--deep"], 0),
        ] {
            let Some(output) = self.must(args, wrong) else {
                continue;
            };
            let reported = output.out().matches("is incomplete").count();
            if reported != expected || output.out().contains("damaged:") {
                wrong.push(format!(
                    "expected {expected} incomplete states: {}",
                    output.report()
                ));
            }
        }
        let used = self.script(
            "trap '\"$@\" umount live || :' EXIT; at=$(\"$@\" mount live); cat \"$at\"/n* \"$at\"/etc/* >/dev/null; echo x >\"$at\"/x; \
             \"$@\" snapshot live --sync",
            [""; 0],
        );
        if used.code != 0 || !shown.contains_key(LIVE) {
            wrong.push(used.report());
        }
    }
}
