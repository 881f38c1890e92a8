//! A power cut during a transfer leaves complete layers, which the next transfer uses, and nothing else.

use std::path::Path;

use cowl_tests::power_cut::judge::{Cuts, Findings};
use cowl_tests::power_cut::receiving::{Counts, cut_often, run};
use cowl_tests::power_cut::store::Care;
use cowl_tests::power_cut::work::Base;
use cowl_tests::power_cut::{can_cut, in_runs};
use cowl_tests::run::number;
use cowl_tests::scratch::Scratch;

/// The number of cuts by default.
const CUTS: u64 = 12;
/// The number of cuts in one run.
const MOST: u64 = 20;

fn cuts(kind: &str, care: Care) -> (Findings, Counts) {
    let base = Base::from_env(kind);
    let (mut all, mut sum) = (Findings::default(), Counts::default());
    in_runs(number("COWL_CUTS", CUTS), MOST, |seed, count| {
        let scratch = Scratch::new_in(Path::new("/dev/shm"), "receive-cut");
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
        sum.continued += counts.continued;
        sum.committed += counts.committed;
    });
    (all, sum)
}

fn a_transfer_continues(kind: &'static str) {
    if !can_cut(kind, &["strace"]) {
        return;
    }
    let (found, counts) = cuts(kind, Care::Whole);
    assert!(
        found.lines.is_empty(),
        "{} cuts left something wrong:\n{}",
        found.bad_cuts,
        found.lines.join("\n")
    );
    // Fewer cuts may all be before the first complete layer.
    if number("COWL_CUTS", CUTS) >= CUTS {
        assert!(counts.continued > 0 && counts.committed > 0, "{counts:?}");
    }
}

#[test]
fn a_transfer_continues_after_a_power_cut_on_ext4() {
    a_transfer_continues("ext4");
}

#[test]
fn a_transfer_continues_after_a_power_cut_on_xfs() {
    a_transfer_continues("xfs");
}

#[test]
fn a_transfer_continues_after_a_power_cut_on_btrfs() {
    a_transfer_continues("btrfs");
}

/// Validates the rig: with syncs disabled, layers that have a name must be incomplete after some cuts.
#[test]
fn power_cuts_without_the_sync_leave_incomplete_layers() {
    if !can_cut("ext4", &["strace"]) {
        return;
    }
    let (found, counts) = cuts("ext4", Care::NoSync);
    eprintln!("without syncs: {counts:?}, {} bad cuts", found.bad_cuts);
    if number("COWL_CUTS", CUTS) >= CUTS {
        assert!(found.bad_cuts > 0);
    }
}
