//! Tests of cowl called as `lxc-snapshot`, on directories in LXC's layout. They do not need LXC.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cowl::container::Swap;
use cowl::recover;
use cowl::store::Store;
use cowl::store::bytes::Blob;
use cowl::store::name::ContainerName;
use cowl::store::outside::Lxc;
use cowl_tests::command::{Output, run_command, show};
use cowl_tests::programs;

use crate::library;

const TIME: &str = "2026:11:23 13:02:05";

/// A directory of LXC containers with c1, whose file contains "now", and its snapshot snap0 with "then".
struct World {
    cli: cowl_tests::cowl::Store,
}

impl World {
    fn new() -> Self {
        let world = Self {
            cli: cowl_tests::cowl::Store::for_test(),
        };
        world.container(&world.path("l/c1"), "now");
        world.snapshot("snap0", "then");
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cli.beside(name)
    }

    fn container(&self, dir: &Path, content: &str) {
        let rootfs = dir.join("rootfs");
        std::fs::create_dir_all(rootfs.join("etc")).unwrap();
        std::fs::write(rootfs.join("etc/file"), content).unwrap();
        std::fs::write(rootfs.join("etc/hostname"), "c1\n").unwrap();
        std::fs::hard_link(rootfs.join("etc/file"), rootfs.join("etc/same")).unwrap();
        let config = format!(
            "# a comment\n\nlxc.rootfs.path = dir:{}\nlxc.uts.name = c1\n\
             lxc.net.0.hwaddr = 00:16:3e:11:22:33\n",
            rootfs.display()
        );
        std::fs::write(dir.join("config"), config).unwrap();
    }

    fn snapshot(&self, name: &str, content: &str) {
        let dir = self.path("l/c1/snaps").join(name);
        self.container(&dir, content);
        std::fs::write(dir.join("ts"), TIME).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(programs::cowl());
        command
            .arg0("/usr/local/bin/lxc-snapshot")
            .arg("-P")
            .arg(self.path("l"))
            .args(args)
            .env("COWL_STORE", self.cli.path())
            .env("TZ", "UTC")
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        run_command(self.command(args), b"")
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        show(&self.run(args).ok().stdout)
    }

    /// Asserts that the command ends with 1 and a message that contains `word`, and changes nothing.
    #[track_caller]
    fn refused(&self, args: &[&str], word: &str) {
        let before = self.content();
        let output = self.run(args).fails(1, &[word]);
        assert!(output.stdout.is_empty(), "{}", output.report());
        assert_eq!(self.content(), before, "{args:?}");
    }

    fn list(&self) -> String {
        self.ok(&["-n", "c1", "-L"])
    }

    fn line(&self, name: &str) -> String {
        format!("{name} ({}) {TIME}\n", self.path("l/c1/snaps").display())
    }

    fn is_there(&self, name: &str) -> bool {
        self.path(name).symlink_metadata().is_ok()
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    /// Returns the content of all files in the directory of containers.
    fn content(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut content = BTreeMap::new();
        let mut dirs = vec![self.path("l")];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    dirs.push(path.clone());
                    content.insert(path, Vec::new());
                } else {
                    let bytes = std::fs::read(&path).unwrap();
                    content.insert(path, bytes);
                }
            }
        }
        content
    }

    fn cowl(&self, args: &[&str]) -> Output {
        self.cli.cowl(args)
    }

    fn store(&self) -> Store {
        library::open(self.cli.path()).unwrap()
    }

    /// Makes c1 a container of cowl, as far as the front end can detect.
    fn adopt(&self) {
        let from = self.path("l/c1/rootfs");
        self.cli.create("c1", &from);
        let store = self.store();
        let mut container = recover::open(&store, &ContainerName::parse("c1").unwrap()).unwrap();
        let mut next = container.manifest().clone();
        next.lxc = Some(Lxc {
            lxcpath: self.path("l"),
            name: "c1".to_owned(),
            original: None,
            written: Blob(std::fs::read(self.path("l/c1/config")).unwrap()),
            files: Vec::new(),
            extra: serde_json::Map::new(),
        });
        container.commit(next, None, |_| Ok(Swap::Done)).unwrap();
    }

    /// Returns the content of the file in a state of the adopted container.
    fn adopted_file(&self, state: &str) -> String {
        let tar = self.path("x.tar");
        self.cowl(&["export", state, "--force", tar.to_str().unwrap()])
            .ok();
        let read = Command::new("tar")
            .args(["-xOf", tar.to_str().unwrap(), "./etc/file"])
            .output()
            .unwrap();
        std::fs::remove_file(tar).unwrap();
        String::from_utf8(read.stdout).unwrap()
    }
}

#[test]
fn list_is_sorted_by_number() {
    let world = World::new();
    for name in ["snap10", "snap9"] {
        world.snapshot(name, "x");
    }
    std::fs::write(world.path("l/c1/snaps/snap9/comment"), "two\nlines").unwrap();
    let [zero, nine, ten] = ["snap0", "snap9", "snap10"].map(|name| world.line(name));
    assert_eq!(world.list(), format!("{zero}{nine}{ten}"));
    let shown = world.ok(&["-n", "c1", "-LC"]);
    assert_eq!(shown, format!("{zero}{nine}two\nlines\n{ten}"));
    world.ok(&["-n", "c1", "-d", "ALL"]);
    assert_eq!(world.list(), "No snapshots\n");
}

#[test]
fn old_location_is_read() {
    let world = World::new();
    std::fs::create_dir(world.path("lsnaps")).unwrap();
    std::fs::rename(world.path("l/c1/snaps"), world.path("lsnaps/c1")).unwrap();
    let dir = world.path("lsnaps/c1");
    assert_eq!(world.list(), format!("snap0 ({}) {TIME}\n", dir.display()));
    world.ok(&["-n", "c1", "-r", "snap0"]);
    assert_eq!(world.read("l/c1/rootfs/etc/file"), "then");
}

#[test]
fn restore_to_the_same_name_replaces_the_container() {
    let world = World::new();
    let config = world.read("l/c1/config");
    world.ok(&["-n", "c1", "-r", "snap0"]);
    assert_eq!(world.read("l/c1/rootfs/etc/file"), "then");
    assert_eq!(world.read("l/c1/config"), config);
    let meta = |name: &str| world.path(name).metadata().unwrap();
    assert_eq!(
        meta("l/c1/rootfs/etc/file").ino(),
        meta("l/c1/rootfs/etc/same").ino()
    );
    // A change of the container does not affect the snapshot.
    std::fs::write(world.path("l/c1/rootfs/etc/file"), "later").unwrap();
    assert_eq!(world.read("l/c1/snaps/snap0/rootfs/etc/file"), "then");
    world.ok(&["-n", "c1", "-r", "snap0", "-N", "c1"]);
    assert_eq!(world.read("l/c1/rootfs/etc/file"), "then");
    let left: Vec<_> = world
        .content()
        .into_keys()
        .filter(|path| path.display().to_string().contains(".cowl"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// LXC's own restore on a full disk leaves no files, and a config without the root filesystem.
#[test]
fn a_container_without_files_is_restored() {
    let world = World::new();
    std::fs::remove_dir_all(world.path("l/c1/rootfs")).unwrap();
    world.ok(&["-n", "c1", "-r", "snap0"]);
    assert_eq!(world.read("l/c1/rootfs/etc/file"), "then");
}

#[test]
fn restore_to_a_new_name_creates_a_container() {
    let world = World::new();
    std::fs::write(world.path("l/c1/snaps/snap0/fstab"), "").unwrap();
    world.ok(&["-n", "c1", "-r", "snap0", "c2"]);
    assert_eq!(world.read("l/c2/rootfs/etc/file"), "then");
    assert_eq!(world.read("l/c2/rootfs/etc/hostname"), "c2\n");
    assert_eq!(world.read("l/c1/rootfs/etc/file"), "now");
    let config = world.read("l/c2/config");
    let rootfs = format!(
        "lxc.rootfs.path = dir:{}\n",
        world.path("l/c2/rootfs").display()
    );
    assert!(config.contains(&rootfs), "{config}");
    assert!(config.contains("lxc.uts.name = c2\n"), "{config}");
    assert!(!config.contains("00:16:3e:11:22:33"), "{config}");
    assert!(config.starts_with("# a comment\n\n"), "{config}");
    assert!(world.path("l/c2/fstab").is_file());
    assert!(!world.is_there("l/c2/ts"));
    world.refused(&["-n", "c1", "-r", "snap0", "-N", "c2"], "already exists");
    world.refused(&["-n", "c1", "-r", "snap0", "c3", "c4"], "c4");
    for bad in ["", "..", ".x", "a/b", "a\nb"] {
        world.refused(&["-n", "c1", "-r", "snap0", "-N", bad], "name");
    }
}

/// Regression test: "-d A" and "-d ''" removed all snapshots.
#[test]
fn only_the_exact_word_all_removes_all() {
    let world = World::new();
    world.snapshot("snap1", "x");
    for near in [
        "A", "", "AL", "all", "ALL ", "ALLX", "snap", "snap10", "snap0/", ".",
    ] {
        world.refused(&["-n", "c1", "-d", near], "no snapshot named");
    }
    world.ok(&["-n", "c1", "-d", "snap1"]);
    assert_eq!(world.list(), world.line("snap0"));
    world.refused(&["-n", "c1", "-d", "snap1"], "did you mean snap0?");
}

/// Regression test: a restore from a missing snapshot removed the container.
#[test]
fn restore_of_a_missing_snapshot_changes_nothing() {
    let world = World::new();
    for name in ["snap1", "", ".", "snap", "../../c1"] {
        world.refused(&["-n", "c1", "-r", name], "no snapshot named");
    }
    world.refused(&["-n", "c9", "-r", "snap0"], "c9 does not exist");
    for name in ["", "../l/c1", ".."] {
        world.refused(&["-n", name, "-r", "snap0"], "name");
    }
    world.refused(&["-L"], "no container specified");
}

/// Regression test: the leftovers of a killed lxc-snapshot were listed, and a restore from them emptied the container.
#[test]
fn incomplete_snapshot_is_not_used() {
    let world = World::new();
    world.snapshot("snap1", "half");
    std::fs::remove_file(world.path("l/c1/snaps/snap1/ts")).unwrap();
    let output = world.run(&["-n", "c1", "-L"]);
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        world.line("snap0")
    );
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("snap1 is incomplete"), "{message}");
    world.refused(&["-n", "c1", "-r", "snap1"], "incomplete");
    world.refused(&["-n", "c1", "-r", "snap1", "c2"], "incomplete");
    world.ok(&["-n", "c1", "-d", "snap1"]);
    assert!(!world.is_there("l/c1/snaps/snap1"));
}

/// Regression test: the snapshot was retained although its comment could not be read.
#[test]
fn missing_comment_file_is_reported_before_anything_is_created() {
    let world = World::new();
    world.refused(&["-n", "c1", "-c", "/no/such/file"], "/no/such/file");
    world.adopt();
    world.refused(&["-n", "c1", "-c", "/no/such/file"], "/no/such/file");
    assert_eq!(world.list(), world.line("snap0"));
}

#[test]
fn files_with_dependents_are_retained() {
    let world = World::new();
    let lxcpath = world.path("l");
    world.container(&world.path("l/ov"), "clone");
    let list = format!("{}\nov\n", lxcpath.display());
    std::fs::write(world.path("l/c1/lxc_snapshots"), &list).unwrap();
    world.refused(&["-n", "c1", "-r", "snap0"], "lxc-copy -s");
    world.ok(&["-n", "c1", "-r", "snap0", "c2"]);
    std::fs::write(world.path("l/c1/snaps/snap0/lxc_snapshots"), &list).unwrap();
    world.refused(&["-n", "c1", "-d", "snap0"], "lxc-copy -s");
    world.refused(&["-n", "c1", "-d", "ALL"], "lxc-copy -s");
    // No snapshot depends on it any more.
    std::fs::remove_dir_all(world.path("l/ov")).unwrap();
    world.ok(&["-n", "c1", "-r", "snap0"]);
    world.ok(&["-n", "c1", "-d", "snap0"]);
}

#[test]
fn container_in_use_is_not_replaced() {
    let world = World::new();
    let mut child = Command::new("sleep")
        .arg("60")
        .current_dir(world.path("l/c1/rootfs/etc"))
        .spawn()
        .unwrap();
    world.refused(&["-n", "c1", "-r", "snap0"], &child.id().to_string());
    child.kill().unwrap();
    child.wait().unwrap();
    world.ok(&["-n", "c1", "-r", "snap0"]);
}

#[test]
fn differing_settings_are_reported() {
    let world = World::new();
    let file = world.path("l/c1/config");
    let text = std::fs::read_to_string(&file).unwrap() + "lxc.start.auto = 1\n";
    std::fs::write(&file, &text).unwrap();
    let log = world.path("log");
    let log = log.to_str().unwrap();
    let output = world.run(&["-o", log, "-l", "warn", "-n", "c1", "-r", "snap0"]);
    let message = String::from_utf8(output.stderr).unwrap();
    for message in [message, world.read("log")] {
        assert!(
            message.contains("its settings are not restored"),
            "{message}"
        );
    }
    assert_eq!(world.read("l/c1/config"), text);
}

#[test]
fn common_options_work() {
    let world = World::new();
    let log = world.path("log");
    let log = log.to_str().unwrap();
    let output = world.run(&["-q", "-o", log, "-n", "c1", "-r", "snap7"]);
    assert_eq!(output.code, 1);
    assert!(
        output.stderr.is_empty() && output.stdout.is_empty(),
        "{output:?}"
    );
    assert!(
        world
            .read("log")
            .contains("ERROR c1 has no snapshot named \"snap7\"")
    );
    world.refused(
        &["-o", "/no/such/dir/x", "-n", "c1", "-d", "ALL"],
        "/no/such/dir/x",
    );
    world.refused(
        &["--rcfile", "/no/such/file", "-n", "c1", "-d", "ALL"],
        "/no/such/file",
    );
    world.ok(&["-q", "-n", "c1", "-l", "whatever", "-L"]);
    for asked in ["-?", "-h", "--help", "--usage"] {
        assert!(
            world.ok(&[asked]).contains("lxc-snapshot -n NAME -L [-C]"),
            "{asked}"
        );
    }
    assert_eq!(world.ok(&["--version"]).trim(), env!("CARGO_PKG_VERSION"));
    world.refused(&["--bogus"], "--bogus");
    world.refused(&["-n"], "--name");
}

/// The import of the snapshot was killed before LXC's directory was removed.
#[test]
fn imported_snapshot_is_listed_once() {
    let world = World::new();
    world.adopt();
    let id = world.path("l/c1/snaps/snap0").metadata().unwrap().ino();
    let store = world.store();
    let mut container = recover::open(&store, &ContainerName::parse("c1").unwrap()).unwrap();
    cowl::snapshot::take::take(&mut container, &Default::default()).unwrap();
    let mut next = container.manifest().clone();
    let mark = serde_json::json!({ "name": "snap0", "inode": id, "taken": TIME });
    next.snapshots[0].extra.insert("lxc_tree".to_owned(), mark);
    container.commit(next, None, |_| Ok(Swap::Done)).unwrap();
    drop(container);
    assert_eq!(world.list().lines().count(), 1);
    world.ok(&["-n", "c1", "-d", "snap1"]);
    assert_eq!(world.list(), "No snapshots\n");
}

#[test]
fn snapshots_of_cowl_and_lxc_are_in_one_list() {
    let world = World::new();
    world.adopt();
    let comment = world.path("comment");
    std::fs::write(&comment, "said\n").unwrap();
    assert_eq!(world.ok(&["-n", "c1", "-c", comment.to_str().unwrap()]), "");
    let list = world.ok(&["-n", "c1", "-L", "-C"]);
    let lines: Vec<_> = list.lines().collect();
    assert_eq!(lines[0], world.line("snap0").trim());
    // No name occurs twice, although it is cowl's first snapshot.
    assert!(lines[1].starts_with("snap1 ("), "{list}");
    assert_eq!(lines[2..], ["said"]);

    // A snapshot of LXC becomes one of cowl when it is restored.
    world.ok(&["-n", "c1", "-r", "snap0"]);
    assert_eq!(world.adopted_file("c1"), "then");
    assert!(!world.is_there("l/c1/snaps"));
    let json = world.cowl(&["list", "c1", "--json"]);
    let text = String::from_utf8(json.stdout).unwrap();
    assert!(text.contains("2026-11-23T13:02:05Z"), "{text}");
    world.ok(&["-n", "c1", "-r", "snap1"]);
    assert_eq!(world.adopted_file("c1"), "now");
    world.ok(&["-n", "c1", "-d", "snap0"]);
    world.refused(&["-n", "c1", "-d", "snap0"], "no snapshot named");
    // "ALL" does not include a protected snapshot.
    world.ok(&["-n", "c1"]);
    world.cowl(&["protect", "c1@snap1"]).ok();
    let output = world.run(&["-n", "c1", "-d", "ALL"]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.code, 1, "{message}");
    assert!(
        message.contains("cannot remove snap1: it is protected"),
        "{message}"
    );
    assert_eq!(world.list().lines().count(), 1);
    world.cowl(&["protect", "--off", "c1@snap1"]).ok();
    world.ok(&["-n", "c1", "-d", "ALL"]);
    assert_eq!(world.list(), "No snapshots\n");
}

#[test]
fn ambiguous_name_is_refused() {
    let world = World::new();
    std::fs::remove_dir_all(world.path("l/c1/snaps")).unwrap();
    world.adopt();
    world.ok(&["-n", "c1"]);
    // LXC assigns the lowest number that it does not find.
    world.snapshot("snap0", "then");
    for task in ["-r", "-d"] {
        world.refused(
            &["-n", "c1", task, "snap0"],
            "two snapshots are named snap0",
        );
    }
    let output = world.cowl(&["import-lxc-snapshots", "c1"]);
    assert_eq!(output.stdout, b"snap1\n", "{output:?}");
    assert_eq!(world.adopted_file("c1@snap0"), "now");
    assert_eq!(world.adopted_file("c1@snap1"), "then");
    assert_eq!(world.list().lines().count(), 2);
}

#[test]
fn snapshots_of_lxc_are_imported() {
    let world = World::new();
    world.snapshot("snap3", "three");
    std::fs::write(world.path("l/c1/snaps/snap3/comment"), "of then\n").unwrap();
    world.snapshot("snap4", "half");
    std::fs::remove_file(world.path("l/c1/snaps/snap4/ts")).unwrap();
    let file = world.path("l/c1/snaps/snap3/rootfs/etc/file");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o4751)).unwrap();
    world.adopt();
    let before = world.content();
    let dry = world.cowl(&["import-lxc-snapshots", "c1", "--dry-run"]);
    assert!(dry.code == 0 && dry.stdout.is_empty(), "{dry:?}");
    assert_eq!(world.content(), before);
    let done = world.cowl(&["import-lxc-snapshots", "c1"]);
    assert_eq!(done.stdout, b"snap0\nsnap3\n", "{done:?}");
    assert!(world.path("l/c1/snaps/snap4").is_dir());
    assert!(!world.is_there("l/c1/snaps/snap3"));
    assert_eq!(world.adopted_file("c1@snap3"), "three");
    let shown = world.ok(&["-n", "c1", "-L", "-C"]);
    assert_eq!(
        shown,
        format!("{}{}of then\n", world.line("snap0"), world.line("snap3"))
    );
    // The next number is higher than all of theirs.
    world.ok(&["-n", "c1"]);
    assert!(world.list().contains("snap5 ("), "{}", world.list());
    let other = world.cowl(&["import-lxc-snapshots", "c1", "snap9"]);
    assert_eq!(other.code, 3, "{other:?}");
}

#[test]
fn three_concurrent_commands_succeed() {
    let world = World::new();
    world.adopt();
    let start = |args: &[&str]| world.command(args).spawn().unwrap();
    let three: Vec<_> = (0..3).map(|_| start(&["-n", "c1"])).collect();
    for mut child in three {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(world.list().lines().count(), 4);
    // Of three restores to the same new name, exactly one creates a complete container.
    let three: Vec<_> = (0..3)
        .map(|_| start(&["-n", "c1", "-r", "snap0", "c2"]))
        .collect();
    let codes: Vec<_> = three
        .into_iter()
        .map(|mut c| c.wait().unwrap().code())
        .collect();
    assert_eq!(
        codes.iter().filter(|code| **code == Some(0)).count(),
        1,
        "{codes:?}"
    );
    assert_eq!(world.read("l/c2/rootfs/etc/file"), "then");
}
