//! A power cut leaves no empty, half or mixed file over a good lower one, no rename half done, and all
//! that was synced. `cargo xtask power-cut N` makes more cuts than the tests of every change.

use std::os::unix::fs::FileExt;
use std::path::Path;

use cowl_tests::command;
use cowl_tests::mount::Overlay;
use cowl_tests::power_cut::judge::{Cuts, Findings, cut_often};
use cowl_tests::power_cut::work::{self, Base};
use cowl_tests::power_cut::{can_cut, in_runs};
use cowl_tests::run::number;
use cowl_tests::scratch::Scratch;

/// A cut can be made at any of some thousand moments of a run. There are two runs at least.
fn cuts_a_run(cuts: u64) -> u64 {
    (cuts / 2).clamp(1, 50)
}

/// Makes `cuts` cuts, some in a run.
fn cuts(base: &Base, cuts: u64, durable: bool) -> Findings {
    let subjects = usize::try_from(number("COWL_SUBJECTS", 200)).unwrap();
    let mut all = Findings::default();
    in_runs(cuts, cuts_a_run(cuts), |seed, count| {
        let scratch = Scratch::new_in(Path::new("/dev/shm"), "power-cut");
        let before = scratch.join("before.image");
        let (past, log) = work::run(&scratch, base, seed, subjects, &before);
        let cuts = Cuts {
            log: &log,
            before: &before,
            span: past.span,
            count,
            seed,
        };
        let found = cut_often(&scratch, base, &past, cuts, durable);
        eprintln!(
            "seed {seed}: {} requests of the disk, {count} cuts, {} with losses",
            log.len(),
            found.bad_cuts
        );
        all += found;
    });
    all
}

fn possible(kind: &'static str) -> bool {
    can_cut(kind, &[])
}

fn nothing_is_lost(kind: &str) {
    let made = number("COWL_CUTS", 10);
    let found = cuts(&Base::from_env(kind), made, true);
    assert!(
        found.lines.is_empty(),
        "{} of {made} cuts lost something:\n{}",
        found.bad_cuts,
        found.lines.join("\n")
    );
}

#[test]
fn a_power_cut_loses_no_synced_data_on_ext4() {
    if possible("ext4") {
        nothing_is_lost("ext4");
    }
}

#[test]
fn a_power_cut_loses_no_synced_data_on_xfs() {
    if possible("xfs") {
        nothing_is_lost("xfs");
    }
}

#[test]
fn a_power_cut_loses_no_synced_data_on_btrfs() {
    if possible("btrfs") {
        nothing_is_lost("btrfs");
    }
}

/// fdatasync(2) of a file that overwrites a part of a lower one: from then on the name refers to it. ext4 does not
/// commit the rename of the copy-up for an fdatasync.
#[test]
fn fdatasync_makes_the_name_of_a_file_durable() {
    if !possible("ext4") {
        return;
    }
    let scratch = Scratch::new_in(Path::new("/dev/shm"), "fdatasync");
    let image = scratch.join("image");
    let (mount_point, after) = (scratch.make("base"), scratch.make("after"));
    std::fs::File::create(&image)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    let name = image.to_str().unwrap();
    command::run("mkfs.ext4", ["-qF", name]).ok();
    // The journal commits only on request.
    let rare = Base {
        options: "loop,commit=600".to_owned(),
        ..Base::from_env("ext4")
    };
    work::mount(&rare, name, &mount_point);
    for dir in ["lower", "upper", "work"] {
        std::fs::create_dir(mount_point.join(dir)).unwrap();
    }
    std::fs::write(mount_point.join("lower/file"), [b'a'; 10_000]).unwrap();
    command::run("sync", [Path::new("-f"), &mount_point]).ok();
    let overlay = Overlay::cowlfs(&work::stack(&mount_point), &scratch.make("mount"), "");
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(overlay.path().join("file"))
        .unwrap();
    file.write_all_at(b"!", 5000).unwrap();
    file.sync_data().unwrap();
    // The power cut: the loop device has no cache of its own.
    let cut = scratch.join("cut");
    std::fs::copy(&image, &cut).unwrap();
    drop(file);
    overlay.unmount();
    cowl_tests::mount::unmount_free(&mount_point);
    work::mount(&rare, cut.to_str().unwrap(), &after);
    let found = std::fs::read(after.join("upper/file")).unwrap();
    assert_eq!(
        (found.len(), found[4999], found[5000]),
        (10_000, b'a', b'!')
    );
    cowl_tests::mount::unmount_free(&after);
}

/// The other tests see losses where there are some.
#[test]
fn power_cuts_without_syncs_lose_data() {
    if !possible("ext4") {
        return;
    }
    let mut careless = Base::from_env("ext4");
    careless.overlay = "volatile".to_owned();
    let made = number("COWL_CUTS", 10);
    let found = cuts(&careless, made, false);
    eprintln!("volatile: {} of {made} cuts lost something", found.bad_cuts);
    assert!(found.bad_cuts > 0);
}
