//! A power cut during a snapshot loses nothing of files that programs write by passthrough.

use std::path::Path;

use cowl_tests::power_cut::can_cut;
use cowl_tests::power_cut::judge::Findings;
use cowl_tests::power_cut::moving::{cut_often, run};
use cowl_tests::power_cut::store::Care;
use cowl_tests::power_cut::work::Base;
use cowl_tests::run::number;
use cowl_tests::scratch::Scratch;

/// The number of snapshots in one run.
const SNAPSHOTS: usize = 3;

/// Returns the number of cuts, and what was wrong after them.
fn cuts(kind: &str, care: Care) -> (u64, Findings) {
    let base = Base::from_env(kind);
    let (made, mut all) = (number("COWL_CUTS", 9), Findings::default());
    let each = made.div_ceil(SNAPSHOTS as u64).min(8);
    let mut seed = number("COWL_SEED", 1);
    let mut count = 0;
    while count < made {
        let scratch = Scratch::new_in(Path::new("/dev/shm"), "moving-cut");
        let before = scratch.join("before.image");
        let (past, log) = run(&scratch, &base, (seed, care, SNAPSHOTS), &before);
        let found = cut_often(&scratch, &base, &past, (&log, &before), (seed, each));
        count += each * past.snapshots.len() as u64;
        eprintln!(
            "{kind}, seed {seed}: {} requests of the disk, {} syncs, {} cuts with something wrong",
            log.len(),
            past.synced.len(),
            found.bad_cuts
        );
        assert!(past.synced.len() > 10, "{past:?}");
        all += found;
        seed += 1;
    }
    (count, all)
}

fn moved_files_are_intact(kind: &'static str) {
    if !can_cut(kind, &[]) {
        return;
    }
    let (count, all) = cuts(kind, Care::Whole);
    assert!(
        all.lines.is_empty(),
        "{} of {count} cuts left something wrong:\n{}",
        all.bad_cuts,
        all.lines.join("\n")
    );
}

#[test]
fn a_power_cut_during_a_snapshot_loses_nothing_of_moved_files_on_xfs() {
    moved_files_are_intact("xfs");
}

#[test]
fn a_power_cut_during_a_snapshot_loses_nothing_of_moved_files_on_btrfs() {
    moved_files_are_intact("btrfs");
}

/// Validates the rig: what was only claimed to be synced must be lost.
#[test]
fn power_cuts_without_the_sync_lose_content_of_moved_files() {
    if !can_cut("xfs", &[]) {
        return;
    }
    let (_, all) = cuts("xfs", Care::NoSync);
    let lost = all.lines.iter().filter(|line| line.contains("was synced"));
    assert!(lost.count() > 0, "{all:?}");
}
