//! A power cut takes nothing of a state that is marked durable, and one that is not is reported as that.
//! `cargo xtask power-cut N --store` makes more cuts than the tests of every change.

use std::path::Path;

use cowl_tests::conditions::{Need, can};
use cowl_tests::power_cut::judge::Findings;
use cowl_tests::power_cut::store::{Care, run};
use cowl_tests::power_cut::store_judge::{Counts, cut_often};
use cowl_tests::power_cut::work::Base;
use cowl_tests::scratch::Scratch;

/// The cuts of one run of all verbs.
const MOST: u64 = 20;

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

fn cuts(kind: &str, cuts: u64, care: Care) -> (Findings, Counts) {
    let text = |variable: &str| std::env::var(variable).unwrap_or_default();
    let options = text("COWL_BASE_OPTIONS");
    let base = Base {
        kind: kind.to_owned(),
        options: if options.is_empty() {
            "relatime".to_owned()
        } else {
            options
        },
        mkfs: text("COWL_MKFS"),
        overlay: String::new(),
    };
    let first = number("COWL_SEED", 1);
    let (mut all, mut sum) = (Findings::default(), Counts::default());
    let mut start = 0;
    while start < cuts {
        let scratch = Scratch::new_in(Path::new("/dev/shm"), "store-cut");
        let before = scratch.join("before.image");
        let seed = first + start / MOST;
        let (past, log) = run(&scratch, &base, (seed, care), &before);
        let now = MOST.min(cuts - start);
        start += now;
        let (found, counts) = cut_often(&scratch, &base, (&past, &log), &before, (now, seed));
        eprintln!(
            "{kind}, seed {seed}: {} requests of the disk, {now} cuts, {} with something wrong; {counts:?}",
            log.len(),
            found.bad_cuts
        );
        all.bad_cuts += found.bad_cuts;
        all.lines.extend(found.lines);
        sum += counts;
    }
    (all, sum)
}

fn possible(kind: &'static str, make: &'static str) -> bool {
    let needs = [
        Need::Root,
        Need::Fuse,
        Need::Filesystem(kind),
        Need::Program(make),
        Need::Program("losetup"),
        Need::Program("strace"),
    ];
    can(&needs)
}

fn nothing_durable_is_lost(kind: &str) {
    let made = number("COWL_CUTS", 10);
    let (found, counts) = cuts(kind, made, Care::Whole);
    eprintln!("{kind}: {made} cuts, {counts:?}");
    assert!(
        found.lines.is_empty(),
        "{} of {made} cuts left something wrong:\n{}",
        found.bad_cuts,
        found.lines.join("\n")
    );
    assert!(counts.durable > 0, "no cut had a durable state to judge");
}

#[test]
fn a_cut_takes_nothing_durable_on_ext4() {
    if possible("ext4", "mkfs.ext4") {
        nothing_durable_is_lost("ext4");
    }
}

#[test]
fn a_cut_takes_nothing_durable_on_xfs() {
    if possible("xfs", "mkfs.xfs") {
        nothing_durable_is_lost("xfs");
    }
}

#[test]
fn a_cut_takes_nothing_durable_on_btrfs() {
    if possible("btrfs", "mkfs.btrfs") {
        nothing_durable_is_lost("btrfs");
    }
}

/// The other tests see losses where there are some.
#[test]
fn without_the_sync_cuts_are_seen_to_take_what_is_marked_durable() {
    if !possible("ext4", "mkfs.ext4") {
        return;
    }
    let (_, counts) = cuts("ext4", number("COWL_CUTS", 10), Care::NoSync);
    eprintln!("without syncs: {counts:?}");
    assert!(counts.broken > 0);
}
