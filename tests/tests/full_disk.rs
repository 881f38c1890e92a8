//! On a full disk nothing is lost, and what frees space still works.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::io::Write;
use std::path::{Path, PathBuf};

use cowl_tests::command::{self, Output};
use cowl_tests::conditions::{Need, can};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;

/// A small disk of its own, with a store on it.
struct Disk {
    scratch: Scratch,
    place: PathBuf,
}

impl Disk {
    fn new() -> Self {
        let scratch = Scratch::new("full-disk");
        let image = scratch.join("image");
        std::fs::File::create(&image)
            .unwrap()
            .set_len(32 << 20)
            .unwrap();
        command::run("mkfs.ext4", [Path::new("-q"), Path::new("-m0"), &image]).ok();
        let place = scratch.make("disk");
        command::run("mount", [Path::new("-oloop"), &image, &place]).ok();
        Self { scratch, place }
    }

    fn cowl(&self, args: &[&str]) -> Output {
        let store = self.place.join("store");
        let mut all = vec!["--store", store.to_str().unwrap()];
        all.extend(args);
        command::run(programs::cowl(), all)
    }

    fn list(&self) -> String {
        self.cowl(&["list", "web"]).ok().out()
    }

    /// Takes the last byte.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.place.join("fill")).unwrap();
        for size in [1 << 20, 4096, 1] {
            while file
                .write_all(&vec![b'x'; size])
                .and_then(|()| file.sync_data())
                .is_ok()
            {}
        }
    }
}

/// A program that is told less than what was written writes the rest again, and a log has it twice.
fn what_does_not_fit_is_told(mount: &Path) {
    let mut log = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(mount.join("log"))
        .unwrap();
    let (block, mut told) = (vec![b'l'; 300_000], 0);
    while let Ok(done) = log.write(&block) {
        told += done as u64;
    }
    assert_eq!(log.metadata().unwrap().len(), told);
    std::fs::remove_file(mount.join("log")).unwrap();
}

#[test]
fn a_full_disk_costs_nothing_and_space_can_be_freed() {
    let needs = [Need::Root, Need::Fuse, Need::Program("mkfs.ext4")];
    if !can("a_full_disk_costs_nothing_and_space_can_be_freed", &needs) {
        return;
    }
    let disk = Disk::new();
    let source = disk.scratch.make("source");
    std::fs::write(source.join("file"), "one\n").unwrap();
    for name in ["web", "other"] {
        disk.cowl(&["create", name, "--from", source.to_str().unwrap()])
            .ok();
    }
    let told = disk.cowl(&["mount", "web"]).ok();
    let mount = PathBuf::from(told.out().trim_end());
    disk.cowl(&["snapshot", "web"]).ok();
    std::fs::write(mount.join("file"), "two\n").unwrap();
    let room = disk.place.join("room");
    std::fs::write(&room, vec![b'r'; 777_777]).unwrap();
    let before = disk.list();
    disk.fill();

    assert_eq!(disk.list(), before, "the list still comes");
    // Either it is done or it is refused; the state is one of the two, and the mount goes on.
    let snapshot = disk.cowl(&["snapshot", "web"]);
    let after = disk.list();
    if snapshot.code == 0 {
        assert!(after.starts_with(&before) && after.len() > before.len());
    } else {
        assert_eq!(snapshot.code, 1, "{}", snapshot.report());
        assert_eq!(after, before);
    }
    assert_eq!(std::fs::read(mount.join("file")).unwrap(), b"two\n");
    std::fs::remove_file(room).unwrap();
    what_does_not_fit_is_told(&mount);
    disk.cowl(&["destroy", "other", "--yes"]).ok();

    std::fs::remove_file(disk.place.join("fill")).unwrap();
    disk.cowl(&["restore", "web", "snap0"]).ok();
    assert_eq!(std::fs::read(mount.join("file")).unwrap(), b"one\n");
    disk.cowl(&["umount", "web"]).ok();
}
