//! cowl called as `lxc-snapshot`, compared with LXC's own: the same options and the same output; and cases that fail
//! there succeed here.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cowl_tests::command::{self, Output, run_command};
use cowl_tests::conditions::{Need, can};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare, Tree};

const NEEDS: [Need; 4] = [
    Need::Root,
    Need::Program("lxc-snapshot"),
    Need::Program("lxc-create"),
    Need::Program("busybox"),
];

/// Serializes the tests: LXC copies in a mount namespace of its own, which meanwhile keeps all mounts of other tests
/// alive.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// LXC containers in a directory, a store of cowl next to it, and one of the two programs.
struct World {
    scratch: Scratch,
    program: PathBuf,
}

impl World {
    /// Cowl under LXC's name.
    fn ours() -> Self {
        let scratch = Scratch::for_test();
        let program = scratch.join("lxc-snapshot");
        std::os::unix::fs::symlink(programs::cowl(), &program).unwrap();
        Self::with(scratch, program)
    }

    fn theirs() -> Self {
        let program = programs::in_path("lxc-snapshot").unwrap();
        Self::with(Scratch::for_test(), program)
    }

    fn with(scratch: Scratch, program: PathBuf) -> Self {
        std::fs::create_dir(scratch.join("l")).unwrap();
        std::fs::write(scratch.join("remark"), "of a user\n").unwrap();
        let world = Self { scratch, program };
        world.create("c1");
        world
    }

    fn lxcpath(&self) -> PathBuf {
        self.scratch.join("l")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.lxcpath().join(name)
    }

    /// A container that needs no network.
    fn create(&self, name: &str) {
        let lxcpath = self.lxcpath();
        let args: [&OsStr; 6] = [
            "-P".as_ref(),
            lxcpath.as_ref(),
            "-n".as_ref(),
            name.as_ref(),
            "-t".as_ref(),
            "busybox".as_ref(),
        ];
        command::run("lxc-create", args).ok();
        let file = self.path(name).join("config");
        let text = std::fs::read_to_string(&file).unwrap();
        let mut plain: Vec<_> = text
            .lines()
            .filter(|line| !line.starts_with("lxc.net.") && !line.starts_with("lxc.apparmor."))
            .collect();
        plain.extend([
            "lxc.net.0.type = empty",
            "lxc.apparmor.profile = unconfined",
        ]);
        std::fs::write(&file, plain.join("\n") + "\n").unwrap();
    }

    fn lxc(&self, program: &str, name: &str, more: &[&str]) -> Output {
        let mut command = Command::new(program);
        command
            .arg("-P")
            .arg(self.lxcpath())
            .args(["-n", name])
            .args(more);
        run_command(command, b"")
    }

    fn command(&self, program: &Path, words: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .arg("-P")
            .arg(self.lxcpath())
            .args(words)
            .current_dir(self.scratch.join("."))
            .env("COWL_STORE", self.scratch.join("store"));
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        run_command(self.command(&self.program, words), b"")
    }

    /// LXC's own program, whichever this world has.
    fn original(&self, words: &[&str]) -> Output {
        let program = programs::in_path("lxc-snapshot").unwrap();
        run_command(self.command(&program, words), b"")
    }

    fn cowl(&self, words: &[&str]) -> Output {
        let mut command = Command::new(programs::cowl());
        command
            .args(words)
            .env("COWL_STORE", self.scratch.join("store"));
        run_command(command, b"")
    }

    /// Returns the output without the parts that differ between runs: the directory, times, and the order of lines
    /// that depends on readdir.
    fn shape(&self, output: &Output) -> (i32, Vec<String>) {
        let dir = self.lxcpath().display().to_string();
        let out = output.out().replace(&dir, "LXCPATH");
        let mut lines: Vec<_> = out.lines().map(without_time).collect();
        lines.sort();
        (output.code, lines)
    }

    fn names(&self) -> Vec<String> {
        let list = self.run(&["-n", "c1", "-L"]).ok().out();
        let lines = list.lines().filter(|line| *line != "No snapshots");
        lines
            .map(|line| line.split(' ').next().unwrap().to_owned())
            .collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for name in ["c1", "c2", "c3"] {
            // Most of them never ran.
            drop(self.lxc("lxc-stop", name, &["-k"]));
            drop(self.cowl(&["umount", name]));
        }
        let disk = self.scratch.join("disk");
        if cowl_tests::mount::at(&disk).is_some() {
            command::run("umount", [&disk]).ok();
        }
    }
}

fn there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

#[track_caller]
fn same(one: &Tree, other: &Tree) {
    let differences = tree::differences(one, other, Compare::SAME);
    assert!(differences.is_empty(), "{differences:#?}");
}

/// `2026:11:23 13:02:05` as `TIME`.
fn without_time(line: &str) -> String {
    let like = |text: &str| {
        let shape = |c: char| if c.is_ascii_digit() { '9' } else { c };
        text.chars().map(shape).collect::<String>() == "9999:99:99 99:99:99"
    };
    match line
        .len()
        .checked_sub(19)
        .and_then(|at| line.split_at_checked(at))
    {
        Some((before, time)) if like(time) => format!("{before}TIME"),
        _ => line.to_owned(),
    }
}

/// Command lines that users and scripts run, in order; `{remark}` is an existing file.
const WORDS: &[&[&str]] = &[
    &["-n", "c1", "-L"],
    &["c1", "-L"],
    &["-n", "c1", "-d", "snap0"],
    &["-n", "c1", "-r", "snap0"],
    &["-n", "c1"],
    &["-n", "c1", "-L"],
    &["-n", "c1", "-c", "remark"],
    &["-n", "c1", "-L", "-C"],
    &["-n", "c1", "-LC"],
    &["--name=c1", "--list", "--showcomments"],
    &["--na=c1", "--li"],
    &["--name", "c1", "--comment", "remark"],
    &["c1", "-L"],
    &["-n", "c1", "-C"],
    &["-n", "c1", "-r", "snap0"],
    &["-n", "c1", "-r", "nothing"],
    &["-n", "c1", "-r", ""],
    &["-n", "c1", "-r", "snap0", "-N", "c1"],
    &["-n", "c1", "-r", "snap0", "-N", "c2"],
    &["-n", "c1", "-r", "snap0", "-N", "c2"],
    &["-n", "c1", "-r", "snap1", "c3"],
    &["-n", "c1", "-r", "snap1", "c3", "c4"],
    &["-n", "c1", "--restore=snap1", "--newname=c4"],
    &["-n", "c2", "-L"],
    &["-n", "c1", "-L"],
    &["-n", "c1", "-r", "snap0", "-d", "snap1"],
    &["-n", "c1", "-L", "-d", "snap1"],
    &["-n", "c1", "--destroy=snap0"],
    &["-n", "c1", "-L"],
    &["-n", "c1", "-d", "ALL"],
    &["-n", "c1", "-L"],
    &["-n", "nothing", "-L"],
    &["-n", "nothing"],
    &["-n", "", "-L"],
    &["-L"],
    &[],
    &["-n"],
    &["--bogus"],
    &["-n", "c1", "--rcfile", "/no/such/file", "-L"],
    &["-q", "-n", "c1", "-r", "nothing"],
    &["-l", "DEBUG", "-o", "log", "-n", "c1", "-r", "nothing"],
    &["-n", "c1", "-l", "whatever", "-L"],
];

#[test]
fn equal_command_lines_have_equal_results() {
    if !can(&NEEDS) {
        return;
    }
    let _alone = alone();
    let (ours, theirs) = (World::ours(), World::theirs());
    for words in WORDS {
        let (here, there) = (ours.run(words), theirs.run(words));
        assert_eq!(
            ours.shape(&here),
            theirs.shape(&there),
            "{words:?}\n{}\n{}",
            here.report(),
            there.report()
        );
        let quiet = words.contains(&"-q");
        assert!(
            here.code == 0 || quiet == here.stderr.is_empty(),
            "{}",
            here.report()
        );
    }
    for words in [&["--help"][..], &["-h"], &["--usage"], &["--version"]] {
        assert_eq!(ours.run(words).code, theirs.run(words).code, "{words:?}");
    }
}

/// Runs the command lines again, on snapshots that LXC took.
#[test]
fn snapshots_of_lxc_are_handled_as_by_lxc() {
    if !can(&NEEDS) {
        return;
    }
    let _alone = alone();
    let (ours, theirs) = (World::ours(), World::theirs());
    for world in [&ours, &theirs] {
        for words in [
            &["-n", "c1"][..],
            &["-n", "c1", "-c", "remark"],
            &["-n", "c1"],
        ] {
            world.original(words).ok();
        }
    }
    let words = WORDS.iter().filter(|words| {
        let takes = !words.iter().any(|word| {
            ["-L", "-LC", "--list", "--li", "-r", "-d"].contains(word)
                || word.starts_with("--restore")
                || word.starts_with("--destroy")
        });
        !takes
    });
    for words in words {
        let (here, there) = (ours.run(words), theirs.run(words));
        assert_eq!(
            ours.shape(&here),
            theirs.shape(&there),
            "{words:?}\n{}\n{}",
            here.report(),
            there.report()
        );
    }
    // Snapshots of either program are visible to the other one.
    ours.original(&["-n", "c1"]).ok();
    let list = ours.original(&["-n", "c1", "-L"]).ok();
    assert_eq!(ours.run(&["-n", "c1", "-L"]).ok().out(), list.out());
}

#[test]
fn failures_of_lxc_snapshot_are_avoided() {
    if !can(&NEEDS) {
        return;
    }
    let _alone = alone();
    let world = World::ours();
    world.original(&["-n", "c1"]).ok();
    world.run(&["-n", "c1"]).ok();
    let both = ["snap0", "snap1"];
    // A part of ALL removed all.
    for part in ["A", "", "AL", "all"] {
        world
            .run(&["-n", "c1", "-d", part])
            .fails(1, &["no snapshot named"]);
        assert_eq!(world.names(), both);
    }
    // The snapshot was retained although its comment was missing.
    world
        .run(&["-n", "c1", "-c", "missing"])
        .fails(1, &["missing"]);
    assert_eq!(world.names(), both);
    // With LXC's own, the leftovers of a killed lxc-snapshot were listed as a snapshot, and a restore from them
    // emptied the container.
    let part = world.path("c1/snaps/snap9");
    std::fs::create_dir_all(part.join("rootfs")).unwrap();
    std::fs::copy(world.path("c1/snaps/snap0/config"), part.join("config")).unwrap();
    assert_eq!(world.names(), both);
    world
        .run(&["-n", "c1", "-r", "snap9"])
        .fails(1, &["incomplete"]);
    world.run(&["-n", "c1", "-d", "snap9"]).ok();
    // With LXC's own, a restore of a missing snapshot removed the container.
    world
        .run(&["-n", "c1", "-r", "snap7"])
        .fails(1, &["no snapshot named"]);
    assert!(world.path("c1/config").is_file());
    assert_eq!(world.names(), both);
}

#[test]
fn three_concurrent_commands_adopt_the_container_once() {
    if !can(&NEEDS) {
        return;
    }
    let _alone = alone();
    let world = World::ours();
    let start = || {
        world
            .command(&world.program, &["-n", "c1"])
            .spawn()
            .unwrap()
    };
    let three = [start(), start(), start()];
    for mut child in three {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(world.names(), ["snap0", "snap1", "snap2"]);
    let output = world.cowl(&["list", "--json"]).ok();
    assert_eq!(
        output.out().matches("\"c1\"").count(),
        1,
        "{}",
        output.report()
    );
}

#[test]
fn a_container_runs_before_and_after_a_restore() {
    if !can(&NEEDS) || !can(&[Need::Fuse]) {
        return;
    }
    let _alone = alone();
    let world = World::ours();
    let inside = |container: &str, line: &str| {
        world
            .lxc("lxc-attach", container, &["--", "sh", "-c", line])
            .ok()
            .out()
    };
    // Snapshots that LXC took remain valid when cowl adopts the container.
    std::fs::write(world.path("c1/rootfs/etc/story"), "zero\n").unwrap();
    world.original(&["-n", "c1"]).ok();
    std::fs::write(world.path("c1/rootfs/etc/story"), "one\n").unwrap();
    let adopted = world.run(&["-n", "c1", "-c", "remark"]).ok();
    assert!(
        adopted.err().contains("cowl release c1"),
        "{}",
        adopted.report()
    );
    world.lxc("lxc-start", "c1", &[]).ok();
    inside("c1", "echo two > /etc/story");
    // While the container runs, the operations that the original refuses.
    world.run(&["-n", "c1"]).ok();
    world
        .run(&["-n", "c1", "-r", "snap1"])
        .fails(1, &["lxc-stop"]);
    assert_eq!(inside("c1", "cat /etc/story"), "two");
    world.lxc("lxc-stop", "c1", &["-k"]).ok();
    assert_eq!(world.names(), ["snap0", "snap1", "snap2"]);
    for (snapshot, story) in [("snap1", "one"), ("snap2", "two"), ("snap0", "zero")] {
        world.run(&["-n", "c1", "-r", snapshot]).ok();
        world.lxc("lxc-start", "c1", &[]).ok();
        assert_eq!(inside("c1", "cat /etc/story"), story, "{snapshot}");
        world.lxc("lxc-stop", "c1", &["-k"]).ok();
    }
    world.run(&["-n", "c1", "-r", "snap2", "c2"]).ok();
    world.lxc("lxc-start", "c2", &[]).ok();
    assert_eq!(inside("c2", "cat /etc/story; hostname"), "two\nc2");
    world.lxc("lxc-stop", "c2", &["-k"]).ok();
}

/// LXC's restore removed the old state before it knew whether the new one fits on the disk.
#[test]
fn a_full_disk_loses_no_data() {
    if !can(&NEEDS) || !can(&[Need::Program("mkfs.ext4")]) {
        return;
    }
    let _alone = alone();
    let world = World::ours();
    std::fs::write(world.path("c1/rootfs/etc/big"), vec![b'x'; 4 << 20]).unwrap();
    world.original(&["-n", "c1"]).ok();
    std::fs::write(world.path("c1/rootfs/etc/big"), "now").unwrap();
    // On a disk of its own with enough space for two trees and not for a third.
    let image = world.scratch.join("image");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(32 << 20)
        .unwrap();
    command::run("mkfs.ext4", [Path::new("-q"), Path::new("-m0"), &image]).ok();
    let mount_point = world.scratch.make("disk");
    command::run("mount", [Path::new("-oloop"), &image, &mount_point]).ok();
    let moved = mount_point.join("l");
    command::run("cp", [Path::new("-a"), &world.lxcpath(), &moved]).ok();
    for file in ["c1/config", "c1/snaps/snap0/config"] {
        let file = moved.join(file);
        let text = std::fs::read_to_string(&file).unwrap();
        let (old, new) = (world.lxcpath(), moved.display().to_string());
        std::fs::write(&file, text.replace(&old.display().to_string(), &new)).unwrap();
    }
    // An ACL: LXC's copies lose it.
    let mut acl = vec![2, 0, 0, 0];
    for (tag, perm, id) in [
        (1, 6, !0),
        (2, 4, 1000),
        (4, 4, !0),
        (16, 4, !0),
        (32, 4, !0_u32),
    ] {
        acl.extend([tag, 0, perm, 0]);
        acl.extend(id.to_le_bytes());
    }
    let big = moved.join("c1/snaps/snap0/rootfs/etc/big");
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(&big, "system.posix_acl_access", &acl, flags).unwrap();
    let fill = mount_point.join("fill");
    let tree = |name: &str| tree::read(&moved.join(name)).unwrap();
    let (now, then) = (tree("c1/rootfs"), tree("c1/snaps/snap0/rootfs"));
    drop(command::run(
        "dd",
        [
            "if=/dev/zero".to_owned(),
            format!("of={}", fill.display()),
            "bs=64k".to_owned(),
        ],
    ));
    let run = |words: &[&str]| {
        let mut command = Command::new(&world.program);
        command
            .arg("-P")
            .arg(&moved)
            .args(words)
            .env("COWL_STORE", mount_point.join("store"));
        run_command(command, b"")
    };
    for words in [
        &["-n", "c1", "-r", "snap0"][..],
        &["-n", "c1", "-r", "snap0", "c2"],
    ] {
        let done = run(words).fails(1, &[]);
        assert!(!done.stderr.is_empty());
        let after = tree("c1/rootfs");
        same(&after, &now);
        same(&tree("c1/snaps/snap0/rootfs"), &then);
        assert!(!there(&moved.join("c2")));
    }
    // Space can be freed there as well.
    std::fs::remove_file(&fill).unwrap();
    run(&["-n", "c1", "-r", "snap0"]).ok();
    same(&tree("c1/rootfs"), &then);
    run(&["-n", "c1", "-d", "ALL"]).ok();
}

/// Snapshots of containers that LXC made over others' files.
#[test]
fn overlay_snapshots_of_lxc_are_restored() {
    if !can(&NEEDS) || !can(&[Need::KernelOverlay]) {
        return;
    }
    let _alone = alone();
    let world = World::ours();
    world.original(&["-n", "c1"]).ok();
    world
        .lxc("lxc-copy", "c1", &["-N", "c2", "-s", "-B", "overlay"])
        .ok();
    let delta = world.path("c2/overlay/delta");
    std::fs::create_dir_all(delta.join("etc")).unwrap();
    std::fs::write(delta.join("etc/new"), "then").unwrap();
    command::run(
        "mknod",
        [
            delta.join("etc/passwd").as_os_str(),
            "c".as_ref(),
            "0".as_ref(),
            "0".as_ref(),
        ],
    )
    .ok();
    world.original(&["-n", "c2"]).ok();
    std::fs::write(delta.join("etc/new"), "now").unwrap();
    // Restored under the same name: the changes since are gone, and the markers are correct.
    world.run(&["-n", "c2", "-r", "snap0"]).ok();
    assert_eq!(
        std::fs::read_to_string(delta.join("etc/new")).unwrap(),
        "then"
    );
    let snap = world.path("c2/snaps/snap0/overlay/delta");
    same(&tree::read(&delta).unwrap(), &tree::read(&snap).unwrap());
    // Restored under a new name: the complete tree, in a directory of its own.
    world.run(&["-n", "c2", "-r", "snap0", "c3"]).ok();
    let made = world.path("c3/rootfs/etc");
    assert_eq!(std::fs::read_to_string(made.join("new")).unwrap(), "then");
    assert!(!there(&made.join("passwd")) && there(&made.join("inittab")));
    // The snapshot that c2 is based on is neither replaced nor removed.
    world
        .run(&["-n", "c1", "-r", "snap0"])
        .fails(1, &["lxc-copy -s"]);
    world.run(&["-n", "c1"]).fails(1, &["depend on its files"]);
    world.run(&["-n", "c2", "-d", "snap0"]).ok();
    let above = std::fs::read_to_string(world.path("c1/lxc_snapshots")).unwrap();
    assert_eq!(above.lines().count(), 2, "{above}");
}
