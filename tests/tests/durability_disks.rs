//! What was acknowledged on a disk that is pulled, shut down or unmounted.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::path::Path;
use std::process::Command;

use cowl_tests::command::{run, run_command};
use cowl_tests::conditions::{Need, can};
use cowl_tests::mount::{unmount_free, wait_until};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;

/// A disk that was pulled and put in again has lost what was in memory, in one and the same boot.
#[test]
fn on_a_disk_that_was_attached_anew_it_is_incomplete() {
    let needs = [Need::Root, Need::Fuse, Need::Program("losetup")];
    let test = "on_a_disk_that_was_attached_anew_it_is_incomplete";
    if can(test, &needs) {
        attached_anew(test, &["mkfs.ext4", "-qF"]);
    }
}

/// Whose device number is no disk's.
#[test]
fn on_a_btrfs_that_was_attached_anew_it_is_incomplete() {
    let needs = [
        Need::Root,
        Need::Fuse,
        Need::Program("losetup"),
        Need::Program("mkfs.btrfs"),
        Need::Filesystem("btrfs"),
    ];
    let test = "on_a_btrfs_that_was_attached_anew_it_is_incomplete";
    if can(test, &needs) {
        attached_anew(test, &["mkfs.btrfs", "-qf"]);
    }
}

fn attached_anew(test: &str, make: &[&str; 2]) {
    let scratch = Scratch::new(test);
    let (image, place) = (scratch.join("image"), scratch.make("disk"));
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(256 << 20).unwrap();
    run(make[0], [make[1].as_ref(), image.as_os_str()]).ok();
    let attach = || {
        let args = [
            "-o".as_ref(),
            "loop".as_ref(),
            image.as_os_str(),
            place.as_os_str(),
        ];
        run("mount", args).ok();
    };
    attach();
    let root = scratch.make("root");
    std::fs::write(root.join("file"), "old").unwrap();
    let cowl = |args: &[&str]| {
        let mut command = Command::new(programs::cowl());
        command.arg("--store").arg(place.join("store")).args(args);
        run_command(command, b"").ok()
    };
    cowl(&["create", "web", "--from", root.to_str().unwrap()]);
    let mounted = cowl(&["mount", "web"]).out();
    std::fs::write(Path::new(&mounted).join("file"), "new").unwrap();
    cowl(&["umount", "web"]);
    cowl(&["snapshot", "web", "--no-sync"]);
    let state = || cowl(&["list", "web", "--format", "{state}"]).out();
    assert_eq!(state(), "settling");
    unmount_free(&place);
    // While another test's mount namespace holds the file system, nothing is lost.
    wait_until("the loop device is free", || {
        let used = run("losetup", ["-j".as_ref(), image.as_os_str()]);
        used.ok().stdout.is_empty()
    });
    attach();
    assert_eq!(state(), "incomplete");
    cowl(&["check"]);
    assert_eq!(state(), "incomplete");
    unmount_free(&place);
}

/// A file system that an I/O error shut down has lost what was in memory when it is mounted again, in one and the
/// same boot, on one and the same disk.
#[test]
fn on_a_file_system_that_was_shut_down_it_is_incomplete() {
    let test = "on_a_file_system_that_was_shut_down_it_is_incomplete";
    let make = [("ext4", "-qF"), ("xfs", "-qf")];
    let needs = [
        Need::Root,
        Need::Fuse,
        Need::Program("losetup"),
        Need::Program("python3"),
        Need::Program("mkfs.xfs"),
        Need::Filesystem("xfs"),
    ];
    if !can(test, &needs) {
        return;
    }
    for (kind, quiet) in make {
        let scratch = Scratch::new(test);
        let (image, place) = (scratch.join("image"), scratch.make("disk"));
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(400 << 20).unwrap();
        let make = format!("mkfs.{kind}");
        run(make.as_str(), [quiet.as_ref(), image.as_os_str()]).ok();
        let attached = run(
            "losetup",
            ["-f".as_ref(), "--show".as_ref(), image.as_os_str()],
        );
        let device = attached.ok().out().trim().to_owned();
        let mount = || run("mount", [device.as_ref(), place.as_os_str()]).ok();
        mount();
        let root = scratch.make("root");
        let cowl = |args: &[&str]| {
            let mut command = Command::new(programs::cowl());
            command.arg("--store").arg(place.join("store")).args(args);
            run_command(command, b"").ok()
        };
        cowl(&["create", "web", "--from", root.to_str().unwrap()]);
        let mounted = cowl(&["mount", "web"]).out();
        std::fs::write(Path::new(mounted.trim_end()).join("file"), "new").unwrap();
        cowl(&["umount", "web"]);
        cowl(&["snapshot", "web", "--no-sync"]);
        let state = || cowl(&["list", "web", "--format", "{state}"]).out();
        assert_eq!(state(), "settling", "{kind}");
        // FS_IOC_SHUTDOWN, without a flush of the log.
        let shut_down = "import fcntl, os, struct, sys\n\
            fd = os.open(sys.argv[1], os.O_RDONLY)\n\
            fcntl.ioctl(fd, 0x8004587d, struct.pack('I', 2))\n";
        run(
            "python3",
            ["-c".as_ref(), shut_down.as_ref(), place.as_os_str()],
        )
        .ok();
        unmount_free(&place);
        // While another test's mount namespace holds the file system, it is not mounted anew.
        let name = Path::new(&device).file_name().unwrap();
        let sysfs = Path::new("/sys/fs").join(kind).join(name);
        wait_until("the file system has ended", || !sysfs.try_exists().unwrap());
        mount();
        assert_eq!(state(), "incomplete", "{kind}");
        cowl(&["check"]);
        assert_eq!(state(), "incomplete", "{kind}");
        unmount_free(&place);
        run("losetup", ["-d", device.as_str()]).ok();
    }
}

/// Also right after a snapshot, which its daemon still syncs.
#[test]
fn the_disk_of_a_store_is_free_when_umount_has_ended() {
    let test = "the_disk_of_a_store_is_free_when_umount_has_ended";
    if !can(test, &[Need::Root, Need::Fuse, Need::Program("mkfs.ext4")]) {
        return;
    }
    let scratch = Scratch::new(test);
    let (image, place) = (scratch.join("image"), scratch.make("disk"));
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(64 << 20).unwrap();
    drop(file);
    run("mkfs.ext4", ["-qF".as_ref(), image.as_os_str()]).ok();
    let options: [&std::ffi::OsStr; 2] = ["-o".as_ref(), "loop".as_ref()];
    let places = [image.as_os_str(), place.as_os_str()];
    run("mount", options.into_iter().chain(places)).ok();
    let root = scratch.make("root");
    std::fs::write(root.join("file"), "old").unwrap();
    let cowl = |args: &[&str]| {
        let mut command = Command::new(programs::cowl());
        command.arg("--store").arg(place.join("store")).args(args);
        run_command(command, b"").ok()
    };
    cowl(&["create", "web", "--from", root.to_str().unwrap()]);
    let mounted = cowl(&["mount", "web"]).out();
    std::fs::write(Path::new(mounted.trim_end()).join("file"), "new").unwrap();
    cowl(&["snapshot", "web"]);
    cowl(&["umount", "web"]);
    cowl_tests::mount::plain_unmount(&place).unwrap();
}
