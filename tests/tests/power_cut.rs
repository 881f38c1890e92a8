//! A power cut leaves no empty, half or mixed file over a good lower one, no rename half done, and all
//! that was synced. `cargo xtask power-cut N` makes more cuts than the tests of every change.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::path::Path;

use cowl_tests::conditions::{Need, can};
use cowl_tests::power_cut::judge::{Findings, cut_often};
use cowl_tests::power_cut::work::{self, Base};
use cowl_tests::scratch::Scratch;

/// A cut can be made at any of some thousand moments of a run. There are two runs at least.
fn cuts_a_run(cuts: u64) -> u64 {
    (cuts / 2).clamp(1, 50)
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// Makes `cuts` cuts, some in a run.
fn cuts(base: &Base, cuts: u64, durable: bool) -> Findings {
    let subjects = usize::try_from(number("COWL_SUBJECTS", 200)).unwrap();
    let first = number("COWL_SEED", 1);
    let mut all = Findings::default();
    let most = cuts_a_run(cuts);
    let mut start = 0;
    while start < cuts {
        let scratch = Scratch::new_in(Path::new("/dev/shm"), "power-cut");
        let before = scratch.join("before.image");
        let seed = first + start / most;
        let (past, log) = work::run(&scratch, base, seed, subjects, &before);
        let now = most.min(cuts - start);
        start += now;
        let found = cut_often(&scratch, base, (&past, &log), &before, (now, seed, durable));
        eprintln!(
            "seed {seed}: {} requests of the disk, {now} cuts, {} with losses",
            log.len(),
            found.bad_cuts
        );
        all.bad_cuts += found.bad_cuts;
        all.lines.extend(found.lines);
    }
    all
}

fn possible(test: &str, kind: &'static str, make: &'static str) -> bool {
    let needs = [
        Need::Root,
        Need::Fuse,
        Need::Filesystem(kind),
        Need::Program(make),
        Need::Program("losetup"),
    ];
    can(test, &needs)
}

fn base(kind: &str) -> Base {
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

fn nothing_is_lost(kind: &str) {
    let made = number("COWL_CUTS", 10);
    let found = cuts(&base(kind), made, true);
    assert!(
        found.lines.is_empty(),
        "{} of {made} cuts lost something:\n{}",
        found.bad_cuts,
        found.lines.join("\n")
    );
}

#[test]
fn a_cut_loses_nothing_on_ext4() {
    if possible("a_cut_loses_nothing_on_ext4", "ext4", "mkfs.ext4") {
        nothing_is_lost("ext4");
    }
}

#[test]
fn a_cut_loses_nothing_on_xfs() {
    if possible("a_cut_loses_nothing_on_xfs", "xfs", "mkfs.xfs") {
        nothing_is_lost("xfs");
    }
}

#[test]
fn a_cut_loses_nothing_on_btrfs() {
    if possible("a_cut_loses_nothing_on_btrfs", "btrfs", "mkfs.btrfs") {
        nothing_is_lost("btrfs");
    }
}

/// The other tests see losses where there are some.
#[test]
fn without_syncs_cuts_are_seen_to_lose() {
    if !possible("without_syncs_cuts_are_seen_to_lose", "ext4", "mkfs.ext4") {
        return;
    }
    let mut careless = base("ext4");
    careless.overlay = "volatile".to_owned();
    let made = number("COWL_CUTS", 10);
    let found = cuts(&careless, made, false);
    eprintln!("volatile: {} of {made} cuts lost something", found.bad_cuts);
    assert!(found.bad_cuts > 0);
}
