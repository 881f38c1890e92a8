//! On a full disk nothing is lost, and commands that free space still work.

use std::io::Write;
use std::path::{Path, PathBuf};

use cowl_tests::command::{self, Output};
use cowl_tests::conditions::{Need, can};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;

/// A small disk of its own, with a store on it.
struct Disk {
    scratch: Scratch,
    mount_point: PathBuf,
}

impl Disk {
    fn new() -> Self {
        Self::with(&[])
    }

    /// With further options of mkfs.
    fn with(options: &[&str]) -> Self {
        let options: Vec<_> = ["-q", "-m0"].iter().chain(options).copied().collect();
        Self::of(32, "mkfs.ext4", &options)
    }

    fn of(megabytes: u64, mkfs: &str, options: &[&str]) -> Self {
        let scratch = Scratch::new("full-disk");
        let image = scratch.join("image");
        std::fs::File::create(&image)
            .unwrap()
            .set_len(megabytes << 20)
            .unwrap();
        let mut args: Vec<&Path> = options.iter().map(Path::new).collect();
        args.push(&image);
        command::run(mkfs, args).ok();
        let mount_point = scratch.make("disk");
        command::run("mount", [Path::new("-oloop"), &image, &mount_point]).ok();
        Self {
            scratch,
            mount_point,
        }
    }

    fn cowl(&self, args: &[&str]) -> Output {
        let store = self.mount_point.join("store");
        let mut all = vec!["--store", store.to_str().unwrap()];
        all.extend(args);
        command::run(programs::cowl(), all)
    }

    fn list(&self) -> String {
        self.cowl(&["list", "web"]).ok().out()
    }

    /// Takes the last byte.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.mount_point.join("fill")).unwrap();
        for size in [1 << 20, 4096, 1] {
            while file
                .write_all(&vec![b'x'; size])
                .and_then(|()| file.sync_data())
                .is_ok()
            {}
        }
    }

    /// Uses up the last inode, and the space that small files can still use.
    fn fill_inodes(&self) {
        let dir = self.mount_point.join("many");
        if std::fs::create_dir(&dir).is_err() {
            return;
        }
        let mut number = 0;
        while std::fs::File::create_new(dir.join(number.to_string())).is_ok() {
            number += 1;
        }
    }
}

/// Returns all paths below a directory, except the reserve and lock files.
fn names(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.symlink_metadata().unwrap().is_dir() {
                todo.push(path.clone());
            }
            let passed_over = ["reserve", "lock"];
            let whole = path.to_str().unwrap();
            if !passed_over.iter().any(|word| whole.contains(word)) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Free bytes.
fn free(mount_point: &Path) -> u64 {
    let space = rustix::fs::statvfs(mount_point).unwrap();
    space.f_bfree * space.f_frsize
}

impl Disk {
    /// Containers web, with three snapshots of half a megabyte each, and other.
    fn fill_store(&self) {
        let source = self.scratch.make("source");
        std::fs::write(source.join("file"), "one\n").unwrap();
        for name in ["web", "other"] {
            self.cowl(&["create", name, "--from", source.to_str().unwrap()])
                .ok();
        }
        let output = self.cowl(&["mount", "web"]).ok();
        let mount = PathBuf::from(output.out().trim_end());
        for round in 0..3 {
            // Each write replaces the previous content, so that only one snapshot contains it.
            std::fs::write(mount.join("big"), vec![round; 500_000]).unwrap();
            self.cowl(&["snapshot", "web"]).ok();
        }
        std::fs::remove_file(mount.join("big")).unwrap();
        self.cowl(&["umount", "web"]).ok();
    }

    /// Verifies that commands that fail for lack of space change nothing and leave nothing behind.
    fn refuses(&self) {
        let before = names(&self.mount_point);
        let list = self.list();
        let beside = self.scratch.join("source");
        let path = |name: &str| self.mount_point.join(name).to_str().unwrap().to_owned();
        for args in [
            &["snapshot", "web"][..],
            &["clone", "web", "new"],
            &["import", beside.to_str().unwrap(), "new"],
            &["export", "web@snap1", &path("web.tar")],
            &["export", "web@snap1", "--with-snapshots", &path("web.tar")],
            &["export", "web@snap1", "--dir", &path("web")],
            &["flatten", "web"],
        ] {
            let output = self.cowl(args);
            // A container's name alone goes with --with-snapshots; the rest is for want of space.
            if output.code != 2 {
                output.fails(1, &["No space", "free some space"]);
            }
            assert_eq!(names(&self.mount_point), before, "{args:?} left something");
            assert_eq!(self.list(), list, "{args:?}");
        }
    }

    /// Verifies that commands that free space succeed and free it.
    fn frees(&self) {
        self.cowl(&["rm", "web", "snap0"]).ok();
        assert!(!self.list().contains("snap0"));
        let before = free(&self.mount_point);
        self.cowl(&["rm", "web", "snap1", "snap2"]).ok();
        self.cowl(&["destroy", "other", "--yes"]).ok();
        self.cowl(&["gc", "--empty-trash"]).ok();
        assert!(free(&self.mount_point) > before, "nothing was freed");
        self.cowl(&["snapshot", "web"]).ok();
        self.cowl(&["destroy", "web", "--yes"]).ok();
        self.cowl(&["gc", "--empty-trash"]).ok();
        let layers = self.mount_point.join("store/layers");
        assert_eq!(std::fs::read_dir(layers).unwrap().count(), 0);
    }
}

#[test]
fn only_commands_that_free_space_succeed_without_free_bytes() {
    let needs = [Need::Root, Need::Fuse, Need::Program("mkfs.ext4")];
    if !can(&needs) {
        return;
    }
    let disk = Disk::new();
    disk.fill_store();
    disk.fill();
    disk.refuses();
    disk.frees();
}

#[test]
fn only_commands_that_free_space_succeed_without_free_inodes() {
    let needs = [Need::Root, Need::Fuse, Need::Program("mkfs.ext4")];
    if !can(&needs) {
        return;
    }
    let disk = Disk::with(&["-N", "512"]);
    disk.fill_store();
    disk.fill_inodes();
    disk.refuses();
    disk.frees();
}

/// A short count that is too low would make a program write the rest again, and a log would contain it twice.
fn assert_too_large_writes_fail(mount: &Path) {
    let mut log = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(mount.join("log"))
        .unwrap();
    let (block, mut reported) = (vec![b'l'; 300_000], 0);
    while let Ok(done) = log.write(&block) {
        reported += done as u64;
    }
    assert_eq!(log.metadata().unwrap().len(), reported);
    std::fs::remove_file(mount.join("log")).unwrap();
}

#[test]
fn a_full_disk_loses_no_data_and_space_can_be_freed() {
    let needs = [Need::Root, Need::Fuse, Need::Program("mkfs.ext4")];
    if !can(&needs) {
        return;
    }
    let disk = Disk::new();
    let source = disk.scratch.make("source");
    std::fs::write(source.join("file"), "one\n").unwrap();
    for name in ["web", "other"] {
        disk.cowl(&["create", name, "--from", source.to_str().unwrap()])
            .ok();
    }
    let output = disk.cowl(&["mount", "web"]).ok();
    let mount = PathBuf::from(output.out().trim_end());
    disk.cowl(&["snapshot", "web"]).ok();
    std::fs::write(mount.join("file"), "two\n").unwrap();
    let room = disk.mount_point.join("room");
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
    assert_too_large_writes_fail(&mount);
    disk.cowl(&["destroy", "other", "--yes"]).ok();

    std::fs::remove_file(disk.mount_point.join("fill")).unwrap();
    disk.cowl(&["restore", "web", "snap0"]).ok();
    assert_eq!(std::fs::read(mount.join("file")).unwrap(), b"one\n");
    disk.cowl(&["umount", "web"]).ok();
}

/// A few kilobytes that expand to gigabytes are limited by the disk: nothing of them is left.
#[test]
fn an_archive_that_does_not_fit_leaves_nothing_behind() {
    let programs = ["mkfs.ext4", "tar", "gzip"].map(Need::Program);
    if !can(&[&[Need::Root][..], &programs].concat()) {
        return;
    }
    let disk = Disk::new();
    let make = "mkdir in; echo first > in/first; head -c 200M /dev/zero > in/second; tar -C in -czf bomb.tar.gz .";
    command::sh_in(&disk.scratch.make("bomb"), make).ok();
    let bomb = disk.scratch.join("bomb/bomb.tar.gz");
    let bomb = bomb.to_str().unwrap();
    disk.cowl(&["gc"]);
    let source = disk.scratch.make("source");
    disk.cowl(&["create", "web", "--from", source.to_str().unwrap()])
        .ok();
    let (before, list) = (free(&disk.mount_point), disk.list());
    for args in [
        &["create", "bomb", "--from", bomb][..],
        &["import", bomb, "bomb"],
    ] {
        let refused = disk.cowl(args);
        refused.fails(1, &["second", "No space left", "free some space"]);
        disk.cowl(&["list", "bomb"]).fails(3, &["bomb"]);
        assert_eq!(disk.list(), list);
        disk.cowl(&["gc"]).ok();
        let after = free(&disk.mount_point);
        assert!(
            after + (1 << 20) > before,
            "{before} bytes free before, {after} after"
        );
    }
    disk.cowl(&["check"]).ok();
}

/// Removing files in a container needs a mount, and whiteouts that hide the lower files.
fn a_container_is_mounted_and_emptied(disk: &Disk, bytes: bool, reserve: bool) {
    let source = disk.scratch.make("source");
    std::fs::create_dir(source.join("dir")).unwrap();
    for name in ["a", "b", "c", "dir/a", "dir/b", "dir/c", "dir/stays"] {
        std::fs::write(source.join(name), format!("{name}\n")).unwrap();
    }
    disk.cowl(&["create", "web", "--from", source.to_str().unwrap()])
        .ok();
    // Copy up the directory: without the reserve, nothing could be removed from it on a full disk.
    let output = disk.cowl(&["mount", "web"]).ok();
    let mount = PathBuf::from(output.out().trim_end());
    std::fs::write(mount.join("dir/a"), "changed\n").unwrap();
    disk.cowl(&["umount", "web"]).ok();
    if bytes {
        disk.fill();
    }
    disk.fill_inodes();
    if !reserve {
        std::fs::remove_dir_all(disk.mount_point.join("store/reserve")).unwrap();
        if bytes {
            disk.fill_again();
        }
        disk.fill_inodes_again();
    }
    let before = names(&disk.mount_point.join("store"));
    let output = disk.cowl(&["mount", "web"]).ok();
    assert_eq!(PathBuf::from(output.out().trim_end()), mount);
    disk.cowl(&["status", "web"]).ok();
    assert_eq!(std::fs::read(mount.join("b")).unwrap(), b"b\n");
    for name in ["a", "b", "c", "dir/a", "dir/b"] {
        std::fs::remove_file(mount.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    let mut left: Vec<_> = names(&mount).into_iter().collect();
    left.retain(|path| !path.is_dir());
    assert_eq!(left, [mount.join("dir/c"), mount.join("dir/stays")]);
    disk.cowl(&["umount", "web"]).ok();
    let after = names(&disk.mount_point.join("store"));
    let gone = |path: &&PathBuf| !after.contains(path);
    assert_eq!(
        before.iter().filter(gone).count(),
        0,
        "{before:?} {after:?}"
    );
    let temporary = |path: &&PathBuf| path.to_str().unwrap().ends_with(".tmp");
    assert_eq!(after.iter().find(temporary), None);
    let output = disk.cowl(&["mount", "web"]).ok();
    assert!(mount.join("dir/c").try_exists().unwrap() && !mount.join("b").try_exists().unwrap());
    assert_eq!(PathBuf::from(output.out().trim_end()), mount);
    disk.cowl(&["umount", "web"]).ok();
}

impl Disk {
    /// Uses up the space that was released since.
    fn fill_again(&self) {
        let mut fill = std::fs::File::options();
        let mut fill = fill
            .append(true)
            .open(self.mount_point.join("fill"))
            .unwrap();
        for size in [1 << 20, 4096, 1] {
            while fill
                .write_all(&vec![b'x'; size])
                .and_then(|()| fill.sync_data())
                .is_ok()
            {}
        }
    }

    fn fill_inodes_again(&self) {
        let Ok(entries) = std::fs::read_dir(self.mount_point.join("many")) else {
            return self.fill_inodes();
        };
        let mut number = entries.count();
        while std::fs::File::create_new(self.mount_point.join(format!("many/{number}"))).is_ok() {
            number += 1;
        }
    }
}

#[test]
fn a_container_on_a_full_ext4_is_mounted_and_emptied() {
    let needs = [Need::Root, Need::Fuse, Need::Program("mkfs.ext4")];
    if !can(&needs) {
        return;
    }
    for bytes in [true, false] {
        for reserve in [true, false] {
            let disk = Disk::with(if bytes { &[] } else { &["-N", "512"] });
            a_container_is_mounted_and_emptied(&disk, bytes, reserve);
        }
    }
}

#[test]
fn a_container_on_a_full_xfs_is_mounted_and_emptied() {
    let needs = [Need::Root, Need::Fuse, Need::Program("mkfs.xfs")];
    if !can(&needs) {
        return;
    }
    for reserve in [true, false] {
        let disk = Disk::of(300, "mkfs.xfs", &["-q", "-f"]);
        a_container_is_mounted_and_emptied(&disk, true, reserve);
    }
}
