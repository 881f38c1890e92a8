//! A power cut leaves no empty, half or mixed file over a good lower one, no rename half done, and all
//! that was synced. `cargo xtask power-cut N` makes more cuts than the tests of every change.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

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

/// Creates a file system whose journal is committed only on request, and mounts it. Returns how, its image and its
/// mount point.
fn disk_that_commits_on_request(
    scratch: &Scratch,
    kind: &str,
    megabytes: u64,
) -> (Base, PathBuf, PathBuf) {
    let image = scratch.join("image");
    let mount_point = scratch.make("base");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(megabytes << 20)
        .unwrap();
    let name = image.to_str().unwrap();
    command::run(format!("mkfs.{kind}"), ["-q", name]).ok();
    let rare = Base {
        options: "loop,commit=600".to_owned(),
        ..Base::from_env(kind)
    };
    work::mount(&rare, name, &mount_point);
    (rare, image, mount_point)
}

/// btrfs removes a replaced name from its log without adding the one that replaces it, unless that was logged. The
/// fsync of another file then makes the removal durable.
#[test]
fn a_deletion_or_a_change_that_is_durable_remains_when_its_name_is_replaced_on_btrfs() {
    if !possible("btrfs") {
        return;
    }
    let scratch = Scratch::new_in(Path::new("/dev/shm"), "replaced");
    let after = scratch.make("after");
    let (rare, image, base) = disk_that_commits_on_request(&scratch, "btrfs", 256);
    let script = "mkdir lower upper work; cd lower
        for d in mkdir create mknod symlink link rename changed dir; do
            mkdir $d; echo lower > $d/name; echo lower > $d/other
        done
        rm dir/name; mkdir dir/name; echo lower > dir/name/in; sync -f .";
    command::sh_in(&base, script).ok();
    let overlay = Overlay::cowlfs(&work::stack(&base), &scratch.make("mount"), "");
    // The deletions are durable, and one change.
    let script = "for d in mkdir create mknod symlink link rename; do
            rm $d/name; echo new > $d/new; sync $d/new; sync $d
        done
        echo changed > changed/name; sync changed/name; sync changed
        echo new > dir/name/new; rm dir/name/in; sync dir/name/new; sync dir/name; sync dir
        for d in . mkdir create mknod symlink link rename changed dir; do
            echo more > $d/more; sync $d/more; sync $d
        done";
    command::sh_in(overlay.path(), script).ok();
    // What follows is not synced, only another file.
    let script = "mkdir mkdir/name; : > create/name; mknod mknod/name p; ln -s to symlink/name
        ln link/new link/name; mv rename/new rename/name; rm changed/name; rm -r dir/name
        sync .; echo other > beside; sync beside; sync .";
    command::sh_in(overlay.path(), script).ok();
    let cut = scratch.join("cut");
    std::fs::copy(&image, &cut).unwrap();
    overlay.unmount();
    cowl_tests::mount::unmount_free(&base);
    work::mount(&rare, cut.to_str().unwrap(), &after);
    let overlay = Overlay::cowlfs(&work::stack(&after), &scratch.make("mount"), "");
    let script = "for d in mkdir create mknod symlink link rename; do
            [ ! -f $d/name ] || ! grep -q lower $d/name || echo $d/name is back
        done
        [ ! -e changed/name ] || grep -q changed changed/name || echo changed/name is the lower file
        [ ! -e dir/name/in ] || echo dir/name/in is back
        [ -e beside ] || echo beside is missing";
    assert_eq!(command::sh_in(overlay.path(), script).ok().out(), "");
    overlay.unmount();
    cowl_tests::mount::unmount_free(&after);
}

/// fdatasync(2) of a file that overwrites a part of a lower one: from then on the name refers to it. ext4 does not
/// commit the rename of the copy-up for an fdatasync.
#[test]
fn fdatasync_makes_the_name_of_a_file_durable() {
    if !possible("ext4") {
        return;
    }
    let scratch = Scratch::new_in(Path::new("/dev/shm"), "fdatasync");
    let after = scratch.make("after");
    let (rare, image, mount_point) = disk_that_commits_on_request(&scratch, "ext4", 64);
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
