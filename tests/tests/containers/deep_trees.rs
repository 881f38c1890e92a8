//! Trees of any depth: every verb uses a bounded number of descriptors, a bounded stack, and a linear number of
//! system calls.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;

use cowl_tests::command::{Output, run_command};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, mkdirat, openat, statat, unlinkat};

const NEEDS: [Need; 4] = [
    Need::Root,
    Need::Fuse,
    Need::Program("prlimit"),
    Need::Program("strace"),
];

/// The descriptor limit of the commands, far below the number of levels.
const DESCRIPTORS: u32 = 64;
/// The stack limit of the commands, insufficient for a frame per level.
const STACK: u32 = 512 << 10;

/// The flags that open a directory.
///
/// CLOEXEC matters everywhere in these files: programs that other tests start at the same time would inherit the
/// descriptor and keep the mount in use.
const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC);

fn dir(at: impl std::os::fd::AsFd, name: impl rustix::path::Arg) -> OwnedFd {
    openat(at, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty()).unwrap()
}

fn write(at: &OwnedFd, name: &str, content: &str) {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
    let file = openat(at, name, flags, Mode::from_raw_mode(0o644)).unwrap();
    let mut file = std::fs::File::from(file);
    file.write_all(content.as_bytes()).unwrap();
}

/// Creates a chain of directories; each has a file, another one to be removed, and a second name of the file ten
/// levels above.
fn plant(top: &Path, levels: usize) {
    let mut at = dir(CWD, top);
    let mut above: Vec<OwnedFd> = Vec::new();
    for level in 0..levels {
        write(&at, "file", &format!("{level}\n"));
        write(&at, "gone", "");
        if above.len() == 10 {
            linkat(&above[0], "file", &at, "second", AtFlags::empty()).unwrap();
            above.remove(0);
        }
        mkdirat(&at, "d", Mode::from_raw_mode(0o755)).unwrap();
        let next = dir(&at, "d");
        above.push(at);
        at = next;
    }
}

/// Changes something in every directory of such a chain.
fn change(top: &Path, levels: usize) {
    let mut at = dir(CWD, top);
    for level in 0..levels {
        write(&at, "new", &format!("new {level}\n"));
        unlinkat(&at, "gone", AtFlags::empty()).unwrap();
        at = dir(&at, "d");
    }
    // Remove from the bottom up.
    let mut way = vec![dir(CWD, top)];
    for _ in 0..40 {
        way.push(dir(way.last().unwrap(), "d"));
    }
    mkdirat(way.last().unwrap(), "passing", Mode::from_raw_mode(0o755)).unwrap();
    unlinkat(way.last().unwrap(), "passing", AtFlags::REMOVEDIR).unwrap();
}

/// Returns the content of such a chain by level: names with contents, and the link count of each file.
fn seen(top: &Path) -> Vec<BTreeMap<String, (String, u64)>> {
    let mut levels = Vec::new();
    let mut at = dir(CWD, top);
    loop {
        let mut level = BTreeMap::new();
        for name in ["file", "gone", "new", "second"] {
            let Ok(file) = openat(&at, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            else {
                continue;
            };
            let mut content = String::new();
            std::fs::File::from(file)
                .read_to_string(&mut content)
                .unwrap();
            let stat = statat(&at, name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
            level.insert(name.to_owned(), (content, stat.st_nlink));
        }
        levels.push(level);
        match openat(&at, "d", DIRECTORY, Mode::empty()) {
            Ok(next) => at = next,
            Err(_) => return levels,
        }
    }
}

/// Runs a command under the limits.
#[track_caller]
fn limited<S: AsRef<OsStr>>(store: &Store, args: impl IntoIterator<Item = S>) -> Output {
    run_command(under_limits(Command::new("prlimit"), store, args), b"")
}

fn under_limits<S: AsRef<OsStr>>(
    mut command: Command,
    store: &Store,
    args: impl IntoIterator<Item = S>,
) -> Command {
    if command.get_program() != "prlimit" {
        command.arg("prlimit");
    }
    command
        .arg(format!("--nofile={DESCRIPTORS}:{DESCRIPTORS}"))
        .arg(format!("--stack={STACK}:{STACK}"));
    let own = store.command(args);
    command.arg(own.get_program()).args(own.get_args());
    command
}

/// The verbs on trees of one depth, and the number of system calls of each.
struct Verbs {
    store: Store,
    calls: BTreeMap<String, u64>,
}

impl Verbs {
    #[track_caller]
    fn run(&mut self, args: &[&str]) -> Output {
        let counts = self.store.scratch().join("counts");
        let mut strace = Command::new("strace");
        strace.args(["-f", "-c", "-qq", "-o"]).arg(&counts);
        let output = run_command(under_limits(strace, &self.store, args), b"").ok();
        let text = std::fs::read_to_string(&counts).unwrap();
        let total = text.lines().last().unwrap();
        // "100.00 0.1 4 1234 56 total": the number of errors may be missing.
        let calls = total.split_whitespace().nth(3).unwrap();
        let prefix = self.store.scratch().join("");
        let prefix = prefix.to_str().unwrap().to_owned();
        let verb = args.iter().map(|word| word.replace(&prefix, ""));
        let verb = verb.map(|word| match word.split_once("/d/") {
            Some((first, _)) => first.to_owned(),
            None => word,
        });
        let verb: Vec<_> = verb.collect();
        self.calls.insert(verb.join(" "), calls.parse().unwrap());
        output
    }

    /// Exports a state to a directory and returns the content of that.
    #[track_caller]
    fn shown(&mut self, state: &str) -> Vec<BTreeMap<String, (String, u64)>> {
        let dir = self.store.scratch().join("shown");
        self.run(&["export", "--dir", state, dir.to_str().unwrap()]);
        let shown = seen(&dir);
        std::fs::remove_dir_all(&dir).unwrap();
        shown
    }
}

/// Runs every verb that walks trees on a tree of this depth, and verifies the results.
fn every_verb(levels: usize) -> BTreeMap<String, u64> {
    let store = Store::for_test();
    let source = store.scratch().make("source");
    plant(&source, levels);
    let path = |name: &str| store.scratch().join(name).to_str().unwrap().to_owned();
    let (tar, whole, delta, image) = (
        path("x.tar"),
        path("whole.tar"),
        path("delta.tar"),
        path("image.tar"),
    );
    let from = path("source");
    let mut verbs = Verbs {
        store,
        calls: BTreeMap::new(),
    };
    let before = seen(&source);
    assert_eq!(before.len(), levels + 1);
    verbs.run(&["create", "c", "--from", &from]);
    verbs.run(&["snapshot", "c"]);
    assert_eq!(verbs.shown("c@snap0"), before);

    let mount_point = limited(&verbs.store, ["mount", "c"]).ok().out();
    change(Path::new(&mount_point), levels);
    let after = seen(Path::new(&mount_point));
    assert_ne!(after, before);
    limited(&verbs.store, ["umount", "c"]).ok();
    verbs.run(&["snapshot", "c"]);
    assert_eq!(verbs.shown("c"), after);

    verbs.run(&["list"]);
    verbs.run(&["list", "c"]);
    verbs.run(&["show", "c@snap1"]);
    verbs.run(&["du", "c"]);
    let deepest = format!("c@snap0:{}file", "d/".repeat(levels - 1));
    let output = verbs.run(&["cat", &deepest]).out();
    assert_eq!(output, format!("{}", levels - 1));
    let listed = verbs.run(&["ls", "-R", "c@snap1"]).out();
    assert_eq!(listed.lines().count(), 4 * levels - 10);
    let changes = verbs.run(&["diff", "c@snap0", "c"]).out();
    assert_eq!(changes.lines().count(), 2 * levels);
    let patch = verbs.run(&["diff", "--patch", "c@snap0", "c"]).out();
    assert_eq!(patch.matches("\n+new ").count(), levels);
    verbs.run(&["check"]);
    verbs.run(&["check", "--deep"]);

    verbs.run(&["clone", "c", "flat"]);
    verbs.run(&["flatten", "--base", "flat"]);
    assert_eq!(verbs.shown("flat"), after);
    verbs.run(&["export", "c@snap0", &tar]);
    verbs.run(&["create", "tar", "--from", &tar]);
    assert_eq!(verbs.shown("tar"), before);
    verbs.run(&["export", "--delta", "c@snap1", &delta]);
    verbs.run(&["export", "--oci", "c@snap1", &image]);
    verbs.run(&["export", "--with-snapshots", "c", &whole]);
    verbs.run(&["import", &whole, "whole"]);
    assert_eq!(verbs.shown("whole"), after);
    assert_eq!(verbs.shown("whole@snap0"), before);

    verbs.run(&[
        "restore", "c", "snap0", "--delete", "--", "d/d", "new", "gone",
    ]);
    let shown = verbs.shown("c");
    assert_eq!(shown[0]["file"], before[0]["file"]);
    assert_eq!(shown[1].get("new"), after[1].get("new"));
    assert_eq!(shown[2..], before[2..]);
    verbs.run(&["undo", "c", "snap1"]);
    assert_eq!(verbs.shown("c"), after);
    verbs.run(&["restore", "c", "snap0"]);
    assert_eq!(verbs.shown("c"), before);

    for name in ["c", "flat", "tar", "whole"] {
        verbs.run(&["destroy", "--now", "--yes", name]);
    }
    verbs.run(&["gc"]);
    for left in ["layers", "trash", "containers"] {
        let dir = verbs.store.path().join(left);
        assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0, "{left}");
    }
    verbs.calls
}

#[test]
fn commands_use_linear_system_calls_and_bounded_descriptors() {
    if !can(&NEEDS) {
        return;
    }
    let (small, large) = (100, 200);
    let (few, many) = (every_verb(small), every_verb(large));
    assert!(few.keys().eq(many.keys()));
    for (verb, calls) in &many {
        // Twice the tree may take twice the calls, plus a constant.
        let most = few[verb] * 21 / 10 + 100;
        assert!(*calls <= most, "{verb}: {} calls, then {calls}", few[verb]);
    }
}

#[test]
fn a_tree_deeper_than_the_descriptor_limit_is_collected() {
    if !can(&NEEDS) {
        return;
    }
    let store = Store::for_test();
    let source = store.scratch().make("source");
    plant(&source, 3);
    for name in ["deep", "other"] {
        store.create(name, &source);
    }
    let mount_point = store.mount("deep");
    std::fs::create_dir(mount_point.join("below")).unwrap();
    plant(&mount_point.join("below"), 1500);
    store.cowl(["umount", "deep"]).ok();
    for name in ["deep", "other"] {
        limited(&store, ["destroy", "--now", "--yes", name]).ok();
    }
    limited(&store, ["gc"]).ok();
    for left in ["layers", "trash"] {
        let entries = std::fs::read_dir(store.path().join(left)).unwrap();
        assert_eq!(entries.count(), 0, "{left}");
    }
}
