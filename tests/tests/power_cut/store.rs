//! A power cut loses nothing of a state that is marked durable, and every other state is reported as incomplete.
//! `cargo xtask power-cut N --store` makes more cuts than the tests of every change.

use std::path::Path;

use cowl_tests::power_cut::judge::{Cuts, Findings};
use cowl_tests::power_cut::store::{Care, run};
use cowl_tests::power_cut::store_judge::{Counts, cut_often};
use cowl_tests::power_cut::work::Base;
use cowl_tests::power_cut::{can_cut, in_runs};
use cowl_tests::run::number;
use cowl_tests::scratch::Scratch;

/// The number of cuts in one run of all commands.
const MOST: u64 = 20;

fn cuts(kind: &str, cuts: u64, care: Care) -> (Findings, Counts) {
    let base = Base::from_env(kind);
    let (mut all, mut sum) = (Findings::default(), Counts::default());
    in_runs(cuts, MOST, |seed, count| {
        let scratch = Scratch::new_in(Path::new("/dev/shm"), "store-cut");
        let before = scratch.join("before.image");
        let (past, log) = run(&scratch, &base, (seed, care), &before);
        let cuts = Cuts {
            log: &log,
            before: &before,
            span: past.span,
            count,
            seed,
        };
        let (found, counts) = cut_often(&scratch, &base, &past, cuts);
        eprintln!(
            "{kind}, seed {seed}: {} requests of the disk, {count} cuts, {} with something wrong; {counts:?}",
            log.len(),
            found.bad_cuts
        );
        all += found;
        sum += counts;
    });
    (all, sum)
}

fn possible(kind: &'static str) -> bool {
    can_cut(kind, &["strace"])
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
fn a_power_cut_loses_no_durable_snapshot_on_ext4() {
    if possible("ext4") {
        nothing_durable_is_lost("ext4");
    }
}

#[test]
fn a_power_cut_loses_no_durable_snapshot_on_xfs() {
    if possible("xfs") {
        nothing_durable_is_lost("xfs");
    }
}

#[test]
fn a_power_cut_loses_no_durable_snapshot_on_btrfs() {
    if possible("btrfs") {
        nothing_durable_is_lost("btrfs");
    }
}

/// Validates the rig: with syncs disabled, cuts must break states that are marked durable.
#[test]
fn power_cuts_without_the_sync_lose_durable_snapshots() {
    if !possible("ext4") {
        return;
    }
    let (_, counts) = cuts("ext4", number("COWL_CUTS", 10), Care::NoSync);
    eprintln!("without syncs: {counts:?}");
    assert!(counts.broken > 0);
}
