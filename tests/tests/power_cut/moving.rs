//! A power cut during a snapshot loses nothing of files that programs write by passthrough, nor names.

use std::path::Path;

use cowl_tests::conditions::{Need, can};
use cowl_tests::power_cut::can_cut;
use cowl_tests::power_cut::judge::Findings;
use cowl_tests::power_cut::moving::{Course, Plan, run};
use cowl_tests::power_cut::moving_judge::{Hits, cut_often};
use cowl_tests::power_cut::phases::PHASES;
use cowl_tests::power_cut::store::Care;
use cowl_tests::power_cut::work::Base;
use cowl_tests::run::number;
use cowl_tests::scratch::Scratch;

/// The courses of the runs, in turn, each with the number of snapshots.
type Courses = &'static [(Course, usize)];

/// Makes cuts in runs of these courses, and returns their number, what was wrong after them, and the phases that they hit.
/// Each course has cuts at random moments, except one that succeeds with syncs in each phase of the moves.
fn cuts(kind: &str, care: Care, courses: Courses) -> (u64, Findings, Hits) {
    let base = Base::from_env(kind);
    let (made, mut all, mut hits) = (number("COWL_CUTS", 18), Findings::default(), Hits::new());
    let snapshots: usize = courses.iter().map(|(_, snapshots)| snapshots).sum();
    let each = made.div_ceil(2 * snapshots as u64).min(8);
    let first = number("COWL_SEED", 1);
    let (mut seed, mut count) = (first, 0);
    while count < made || seed < first + courses.len() as u64 {
        let turn = usize::try_from(seed - first).unwrap() % courses.len();
        let (course, snapshots) = courses[turn];
        let scratch = Scratch::new_in(Path::new("/dev/shm"), "moving-cut");
        let before = scratch.join("before.image");
        let plan = Plan {
            seed,
            care,
            snapshots,
            course,
        };
        let (past, log) = run(&scratch, &base, plan, &before);
        let each = if course == Course::Synced { 0 } else { each };
        let (found, hit) = cut_often(&scratch, &base, &past, (&log, &before), (seed, each));
        count += hit.values().sum::<u64>();
        eprintln!(
            "{kind}, seed {seed}, {course:?}: {} requests of the disk, {} syncs, {} files with changes of names, {} cuts with \
             something wrong, phases {hit:?}",
            log.len(),
            past.synced.len(),
            past.names.len(),
            found.bad_cuts
        );
        assert!(past.synced.len() > 10 && past.names.len() > 2, "{past:?}");
        all += found;
        for (phase, count) in hit {
            *hits.entry(phase).or_default() += count;
        }
        seed += 1;
    }
    (count, all, hits)
}

fn can_run(kind: &'static str) -> bool {
    let more = [Need::Freezer, Need::Program("lxc-info")];
    can_cut(kind, &["python3"]) && (kind != "ext4" || can(&more))
}

fn moved_files_are_intact(kind: &'static str) {
    if !can_run(kind) {
        return;
    }
    let courses = &[
        (Course::Synced, 2),
        (Course::Plain, 3),
        (Course::Refused, 1),
    ];
    let (count, all, hits) = cuts(kind, Care::Whole, courses);
    eprintln!("{kind}: {count} cuts, by the phase that they left: {hits:?}");
    assert!(
        all.lines.is_empty(),
        "{} of {count} cuts left something wrong:\n{}",
        all.bad_cuts,
        all.lines.join("\n")
    );
    for phase in PHASES {
        assert!(hits.contains_key(&Some(phase)), "no cut hit {phase:?}");
    }
}

#[test]
fn a_power_cut_during_a_snapshot_loses_nothing_of_moved_files_on_xfs() {
    moved_files_are_intact("xfs");
}

#[test]
fn a_power_cut_during_a_snapshot_loses_nothing_of_moved_files_on_btrfs() {
    moved_files_are_intact("btrfs");
}

/// The program is stopped for each snapshot, and the copies are written.
#[test]
fn a_power_cut_during_a_snapshot_of_a_stopped_program_loses_nothing_on_ext4() {
    moved_files_are_intact("ext4");
}

/// Validates the rig: what was only claimed to be synced must be lost.
fn unsynced_content_is_lost(kind: &'static str) {
    if !can_run(kind) {
        return;
    }
    let (_, all, _) = cuts(kind, Care::NoSync, &[(Course::Plain, 3)]);
    let lost = all.lines.iter().filter(|line| line.contains("was synced"));
    assert!(lost.count() > 0, "{all:?}");
}

#[test]
fn power_cuts_without_the_sync_lose_content_of_moved_files() {
    unsynced_content_is_lost("xfs");
}

#[test]
fn power_cuts_without_the_sync_lose_content_of_moved_files_on_btrfs() {
    unsynced_content_is_lost("btrfs");
}

#[test]
fn power_cuts_without_the_sync_lose_content_of_moved_files_on_ext4() {
    unsynced_content_is_lost("ext4");
}
