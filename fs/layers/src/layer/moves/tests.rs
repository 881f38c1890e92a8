use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::*;
use crate::format::XattrSpace;
use crate::sys::fault;

mod undone;

struct Lab {
    top: tempfile::TempDir,
    list: MoveList,
}

impl Lab {
    /// A frozen layer with two files, one of which has two names, and an upper layer with their directories.
    fn new() -> Self {
        let top = tempfile::tempdir().unwrap();
        for dir in ["old/d", "new/d", "work"] {
            fs::create_dir_all(top.path().join(dir)).unwrap();
        }
        let lab = Self {
            top,
            list: MoveList::default(),
        };
        fs::write(lab.path("old/a"), "a live").unwrap();
        fs::write(lab.path("old/d/b"), "b live").unwrap();
        fs::hard_link(lab.path("old/d/b"), lab.path("old/c")).unwrap();
        let dir = |path: &str| ChangedDir {
            path: path.into(),
            atime: Time { secs: 5, nanos: 6 },
            mtime: Time { secs: 7, nanos: 8 },
        };
        let file = |copy: &str, names: &[&str]| MovedFile {
            copy: copy.into(),
            ino: lab.ino(&format!("old/{}", names[0])),
            names: names.iter().map(|name| (*name).into()).collect(),
        };
        let list = MoveList {
            dirs: vec![dir(""), dir("d")],
            files: vec![file("0", &["a"]), file("1", &["d/b", "c"])],
        };
        Self { list, ..lab }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.top.path().join(path)
    }

    fn ino(&self, path: &str) -> u64 {
        fs::metadata(self.path(path)).unwrap().ino()
    }

    fn layers(&self) -> (Arc<Layer>, Arc<Upper>) {
        let space = XattrSpace::detect();
        let old = Layer::open(&self.path("old"), space).unwrap();
        let upper = Upper::open(&self.path("new"), &self.path("work"), space).unwrap();
        (old, upper)
    }

    fn begin(&self) -> (Arc<Layer>, Arc<Upper>, Moves) {
        let (old, upper) = self.layers();
        let moves = Moves::begin(&old, &upper, Order::Volatile).unwrap();
        for (name, content) in [("0", "a copy"), ("1", "b copy")] {
            let copy = moves.create_copy(name.as_bytes()).unwrap();
            sys::copy::write_all(&copy, content.as_bytes(), 0).unwrap();
        }
        (old, upper, moves)
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    fn assert_without_placeholders(&self, context: &str) {
        for dir in ["old", "old/d", "new"] {
            let all = names(&self.path(dir));
            assert!(
                all.iter().all(|name| !name.starts_with(TEMPORARY)),
                "{context}: {all:?}"
            );
        }
    }

    fn assert_moved(&self, context: &str) {
        self.assert_without_placeholders(context);
        for (path, copy, live) in [
            ("a", "a copy", "a live"),
            ("d/b", "b copy", "b live"),
            ("c", "b copy", "b live"),
        ] {
            assert_eq!(self.read(&format!("old/{path}")), copy, "{context}");
            assert_eq!(self.read(&format!("new/{path}")), live, "{context}");
        }
        assert_eq!(self.ino("new/a"), self.list.files[0].ino);
        for layer in ["old", "new"] {
            let b = fs::metadata(self.path(&format!("{layer}/d/b"))).unwrap();
            assert_eq!(b.nlink(), 2, "{context}");
            assert_eq!(b.ino(), self.ino(&format!("{layer}/c")), "{context}");
            let dir = fs::metadata(self.path(&format!("{layer}/d"))).unwrap();
            assert_eq!((dir.mtime(), dir.mtime_nsec()), (7, 8), "{context}");
        }
        assert_eq!(fs::metadata(self.path("old/a")).unwrap().nlink(), 1);
        assert_eq!(names(&self.path("old")), ["a", "c", "d"], "{context}");
        assert_eq!(names(&self.path("old/d")), ["b"], "{context}");
        assert!(!exists(&self.path("work/moves")), "{context}");
    }

    fn assert_unmoved(&self, context: &str) {
        self.assert_without_placeholders(context);
        assert_eq!(self.read("old/a"), "a live", "{context}");
        assert_eq!(self.read("old/d/b"), "b live", "{context}");
        assert_eq!(self.ino("old/d/b"), self.ino("old/c"), "{context}");
        assert!(!exists(&self.path("new/a")) && !exists(&self.path("new/c")));
        assert_eq!(fs::metadata(self.path("old/a")).unwrap().nlink(), 1);
        assert!(!exists(&self.path("work/moves")), "{context}");
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

fn later() -> Instant {
    Instant::now() + std::time::Duration::from_secs(3600)
}

/// Writes the list with placeholders.
fn list_and_reserve(moves: &Moves, list: &MoveList) -> Result<()> {
    assert!(moves.prepare(list, later())?);
    moves.commit_list(list)?;
    assert!(moves.reserve(list, later())?);
    Ok(())
}

fn run(moves: Moves, list: &MoveList) -> Result<()> {
    list_and_reserve(&moves, list)?;
    moves.link(list)?;
    moves.commit_links()?;
    moves.fill(list)?;
    moves.exchange(list)?;
    moves.finish()
}

/// Interrupts the moves before each change, and continues.
#[test]
fn interrupted_moves_are_completed_once_the_list_exists() {
    let mut outcomes = (0, 0);
    for good in 0.. {
        let lab = Lab::new();
        let (old, upper, moves) = lab.begin();
        fault::arm(good);
        let done = run(moves, &lab.list);
        fault::disarm();
        let has_list = exists(&lab.path("work/moves/list"));
        complete(&upper, Some(&old)).unwrap();
        let context = format!("after {good} changes");
        if has_list || exists(&lab.path("new/a")) {
            lab.assert_moved(&context);
            outcomes.0 += 1;
        } else {
            lab.assert_unmoved(&context);
            outcomes.1 += 1;
        }
        complete(&upper, Some(&old)).unwrap();
        if done.is_ok() {
            break;
        }
    }
    assert!(outcomes.0 > 5 && outcomes.1 > 1, "{outcomes:?}");
}

/// A request may remove or rename files before they are replaced in the frozen layer.
#[test]
fn files_that_were_removed_meanwhile_are_replaced_in_the_frozen_layer() {
    let lab = Lab::new();
    let (old, upper, moves) = lab.begin();
    moves.commit_list(&lab.list).unwrap();
    moves.link(&lab.list).unwrap();
    moves.commit_links().unwrap();
    drop(moves);
    fs::remove_file(lab.path("new/a")).unwrap();
    fs::rename(lab.path("new/c"), lab.path("new/e")).unwrap();
    fs::write(lab.path("new/c"), "other").unwrap();
    complete(&upper, Some(&old)).unwrap();
    assert!(!exists(&lab.path("new/a")));
    for (path, content) in [("new/c", "other"), ("new/e", "b live"), ("old/c", "b copy")] {
        assert_eq!(lab.read(path), content);
    }
    assert_eq!(lab.read("old/a"), "a copy");
    assert_eq!(fs::metadata(lab.path("new/e")).unwrap().nlink(), 2);
}

/// On btrfs, the directories of the new layer may not be durable when the list is.
#[test]
fn files_whose_directory_a_power_cut_has_removed_stay_in_the_frozen_layer() {
    let lab = Lab::new();
    let (old, upper, moves) = lab.begin();
    moves.commit_list(&lab.list).unwrap();
    sys::node::link(moves.from.as_fd(), b"a", moves.to.as_fd(), b"a").unwrap();
    drop(moves);
    fs::remove_dir(lab.path("new/d")).unwrap();
    complete(&upper, Some(&old)).unwrap();
    lab.assert_unmoved("without a directory");
    assert!(!exists(&lab.path("new/d")));
}

/// On btrfs, the names of the frozen layer may not be durable when the list is.
#[test]
fn names_that_a_power_cut_has_removed_from_the_frozen_layer_are_those_of_the_copies() {
    let lab = Lab::new();
    let (old, upper, moves) = lab.begin();
    moves.commit_list(&lab.list).unwrap();
    moves.link(&lab.list).unwrap();
    moves.commit_links().unwrap();
    drop(moves);
    for name in ["old/a", "old/c"] {
        fs::remove_file(lab.path(name)).unwrap();
    }
    complete(&upper, Some(&old)).unwrap();
    lab.assert_moved("without two names");
}

/// The same, before the files are in the new layer.
#[test]
fn a_file_retains_the_names_that_a_power_cut_has_removed_if_one_is_left() {
    let lab = Lab::new();
    let (old, upper, moves) = lab.begin();
    moves.commit_list(&lab.list).unwrap();
    drop(moves);
    fs::remove_file(lab.path("old/c")).unwrap();
    complete(&upper, Some(&old)).unwrap();
    lab.assert_moved("without a name");

    // A file that has only a name of earlier does not appear twice.
    let lab = Lab::new();
    let (old, upper, moves) = lab.begin();
    moves.commit_list(&lab.list).unwrap();
    drop(moves);
    fs::rename(lab.path("old/a"), lab.path("old/earlier")).unwrap();
    complete(&upper, Some(&old)).unwrap();
    assert_eq!(names(&lab.path("old")), ["c", "d", "earlier"]);
    assert_eq!(names(&lab.path("new")), ["c", "d"]);
    assert_eq!(lab.read("old/earlier"), "a live");
}

/// A user could make a list that lets root link its files into the user's directory.
#[test]
fn a_list_of_another_user_is_not_obeyed() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let lab = Lab::new();
    let (old, upper, moves) = lab.begin();
    moves.commit_list(&lab.list).unwrap();
    drop(moves);
    assert!(matches!(refuse_pending(&upper), Err(Error::Damaged(_))));
    let chown = |path: &str, uid| {
        std::os::unix::fs::chown(lab.path(path), Some(uid), None).unwrap();
    };
    let chmod = |path: &str, mode| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs::set_permissions(lab.path(path), mode).unwrap();
    };
    let refused = |context: &str| {
        let done = complete(&upper, Some(&old));
        assert!(
            matches!(done, Err(Error::Damaged(_))),
            "{context}: {done:?}"
        );
        assert!(!exists(&lab.path("new/a")), "{context}");
        assert_eq!(lab.read("old/a"), "a live", "{context}");
    };
    chown("work/moves", 1000);
    refused("directory of another user");
    refuse_pending(&upper).unwrap();
    chown("work/moves", 0);
    chmod("work/moves", 0o770);
    refused("directory that others may write");
    chmod("work/moves", 0o700);
    chown("work/moves/list", 1000);
    refused("list of another user");
    chown("work/moves/list", 0);
    // Another mount reads the frozen layer.
    let other = fs::File::open(lab.path("old")).unwrap();
    other.lock_shared().unwrap();
    assert!(complete(&upper, Some(&old)).is_err());
    assert_eq!(lab.read("old/a"), "a live");
    drop(other);
    complete(&upper, Some(&old)).unwrap();
    lab.assert_moved("with the own list");
}

/// A power cut may leave an empty list on a volatile mount.
#[test]
fn a_truncated_list_counts_as_none() {
    let lab = Lab::new();
    let (old, upper, moves) = lab.begin();
    moves.commit_list(&lab.list).unwrap();
    drop(moves);
    fs::File::options()
        .write(true)
        .open(lab.path("work/moves/list"))
        .unwrap()
        .set_len(9)
        .unwrap();
    complete(&upper, Some(&old)).unwrap();
    lab.assert_unmoved("with a truncated list");
}

/// A user may choose the work directory that root mounts.
#[test]
fn files_are_only_replaced_in_the_layer_below_and_only_by_copies() {
    let lab = Lab::new();
    let (old, upper, moves) = lab.begin();
    moves.commit_list(&lab.list).unwrap();
    drop(moves);
    for below in [None, Some(&upper.layer)] {
        assert!(matches!(complete(&upper, below), Err(Error::Damaged(_))));
    }
    let text = fs::read_to_string(lab.path("work/moves/list")).unwrap();
    let outside = text.replacen("\"copy\":[48]", "\"copy\":[46,46,47,120]", 1);
    assert_ne!(outside, text);
    fs::write(lab.path("work/moves/list"), outside).unwrap();
    assert!(matches!(
        complete(&upper, Some(&old)),
        Err(Error::Damaged(_))
    ));
    let upwards = text.replacen("\"names\":[[97]]", "\"names\":[[46,46,47,97]]", 1);
    assert_ne!(upwards, text);
    fs::write(lab.path("work/moves/list"), upwards).unwrap();
    assert!(complete(&upper, Some(&old)).is_err());
    let start = "\"temporary\":[";
    for name in [&b"a"[..], b".cowl-/../a", b""] {
        let (before, rest) = text.split_once(start).unwrap();
        let (_, after) = rest.split_once(']').unwrap();
        let name: Vec<_> = name.iter().map(u8::to_string).collect();
        let other = format!("{before}{start}{}]{after}", name.join(","));
        fs::write(lab.path("work/moves/list"), other).unwrap();
        assert!(complete(&upper, Some(&old)).is_err());
    }
    fs::write(lab.path("work/moves/list"), text).unwrap();
    complete(&upper, Some(&old)).unwrap();
    lab.assert_moved("with the original list");
}

/// A full disk must not prevent the last step.
#[test]
fn no_name_is_added_to_a_frozen_directory_once_the_files_are_linked() {
    let lab = Lab::new();
    let (_old, _upper, moves) = lab.begin();
    list_and_reserve(&moves, &lab.list).unwrap();
    let hidden = |dir: &str| {
        let all = names(&lab.path(dir)).into_iter();
        let placeholders = all.filter(|name| name.starts_with(TEMPORARY));
        placeholders
            .map(|name| fs::symlink_metadata(lab.path(dir).join(name)).unwrap())
            .inspect(|meta| assert_eq!((meta.mode() & 0o170_000, meta.rdev()), (0o020_000, 0)))
            .count()
    };
    assert_eq!((hidden("old"), hidden("old/d")), (2, 1));
    for dir in ["old", "old/d"] {
        let dir = fs::metadata(lab.path(dir)).unwrap();
        assert_eq!((dir.mtime(), dir.mtime_nsec()), (7, 8));
    }
    moves.link(&lab.list).unwrap();
    moves.commit_links().unwrap();
    let dirs = ["old", "old/d", "work/moves"];
    let count = || dirs.map(|dir| names(&lab.path(dir)).len());
    let before = count();
    // A rename between directories must not wait for a program, so all are complete before a program can see a copy.
    moves.fill(&lab.list).unwrap();
    assert_eq!(count(), [before[0], before[1], before[2] - 3]);
    moves.exchange(&lab.list).unwrap();
    assert_eq!(count(), [before[0] - 2, before[1] - 1, before[2] - 3]);
    moves.finish().unwrap();
    lab.assert_moved("with placeholders");
}

/// A full disk must not prevent a change of the list's name, which would end the daemon.
#[test]
fn no_name_is_added_beside_the_list() {
    let lab = Lab::new();
    let (_old, _upper, moves) = lab.begin();
    list_and_reserve(&moves, &lab.list).unwrap();
    let mut before = names(&lab.path("work/moves"));
    let mut assert_no_new = |context: &str| {
        let now = names(&lab.path("work/moves"));
        assert!(
            now.iter().all(|name| before.contains(name)),
            "{context}: {now:?}, {before:?}"
        );
        before = now;
    };
    moves.link(&lab.list).unwrap();
    moves.commit_links().unwrap();
    assert_no_new("linked");
    moves.cancel().unwrap();
    assert_no_new("undone");
    moves.unlink(&lab.list).unwrap();
    lab.assert_unmoved("undone");

    // All later names exist before the list does.
    for good in 0.. {
        let lab = Lab::new();
        let (_old, _upper, moves) = lab.begin();
        assert!(moves.prepare(&lab.list, later()).unwrap());
        fault::arm(good);
        let done = moves.commit_list(&lab.list);
        fault::disarm();
        let has = |name: &str| exists(&lab.path("work/moves").join(name));
        assert!(!has("list") || (has("linked") && has("undone")));
        // `linked` alone would need space for another name.
        assert!(has("undone") || !has("linked"));
        if done.is_ok() {
            break;
        }
    }
}

/// A step under the lock of all requests has a limit.
#[test]
fn late_placeholders_are_removed() {
    let lab = Lab::new();
    let (_old, _upper, moves) = lab.begin();
    assert!(!moves.prepare(&lab.list, Instant::now()).unwrap());
    let lab = Lab::new();
    let (_old, _upper, moves) = lab.begin();
    assert!(moves.prepare(&lab.list, later()).unwrap());
    moves.commit_list(&lab.list).unwrap();
    assert!(!moves.reserve(&lab.list, Instant::now()).unwrap());
    moves.release(&lab.list).unwrap();
    moves.cancel().unwrap();
    moves.unlink(&lab.list).unwrap();
    lab.assert_unmoved("late");
}

/// Layers also support whiteouts that are files.
#[test]
fn files_move_without_placeholders_where_no_device_can_be_created() {
    let lab = Lab::new();
    let (_old, _upper, moves) = lab.begin();
    fault::refuse_devices(true);
    let reserved = list_and_reserve(&moves, &lab.list);
    fault::refuse_devices(false);
    reserved.unwrap();
    lab.assert_without_placeholders("without devices");
    moves.link(&lab.list).unwrap();
    moves.commit_links().unwrap();
    moves.fill(&lab.list).unwrap();
    moves.exchange(&lab.list).unwrap();
    moves.finish().unwrap();
    lab.assert_moved("without devices");
}

/// The package may have been upgraded or downgraded.
#[test]
fn a_list_of_another_version_is_left_to_that_version() {
    let lab = Lab::new();
    let (old, upper, moves) = lab.begin();
    moves.commit_list(&lab.list).unwrap();
    drop(moves);
    let path = lab.path("work/moves/list");
    let text = fs::read_to_string(&path).unwrap();
    for other in [
        r#"{"version":1,"layer":7,"temporary":[],"moves":{}}"#.to_owned(),
        text.replacen("\"version\":2", "\"version\":3", 1),
    ] {
        assert_ne!(other, text);
        fs::write(&path, &other).unwrap();
        let Err(Error::Damaged(problem)) = complete(&upper, Some(&old)) else {
            panic!("{other} was used");
        };
        assert!(problem.contains("another version of cowl"), "{problem}");
        assert_eq!(fs::read_to_string(&path).unwrap(), other);
    }
    fs::write(&path, text).unwrap();
    complete(&upper, Some(&old)).unwrap();
    lab.assert_moved("with the version of the list");
}

/// A daemon that is killed before it uses the new layer leaves placeholders, and its successor serves the old layer.
#[test]
fn placeholders_of_a_discarded_layer_are_removed() {
    let lab = Lab::new();
    let (old, _upper, moves) = lab.begin();
    list_and_reserve(&moves, &lab.list).unwrap();
    drop(moves);
    let strange = lab.path("strange");
    fs::create_dir(&strange).unwrap();
    let other = Layer::open(&strange, XattrSpace::detect()).unwrap();
    assert!(matches!(
        abandon(&lab.path("work"), &other),
        Err(Error::Damaged(_))
    ));
    // Programs may change a directory before that.
    fs::write(lab.path("old/new"), "").unwrap();
    let mtime = |path: &str| fs::metadata(lab.path(path)).unwrap().modified().unwrap();
    let changed = mtime("old");
    abandon(&lab.path("work"), &old).unwrap();
    lab.assert_without_placeholders("abandoned");
    assert_eq!(mtime("old"), changed);
    assert_ne!(fs::metadata(lab.path("old")).unwrap().mtime(), 7);
    abandon(&lab.path("work"), &old).unwrap();
    assert_eq!(mtime("old"), changed);
    assert_eq!(fs::metadata(lab.path("old/d")).unwrap().mtime(), 7);
}

/// Only the list is synced before later steps.
#[test]
fn placeholders_that_a_power_cut_has_removed_are_not_needed() {
    for lost in ["old", "work/moves"] {
        let lab = Lab::new();
        let (old, upper, moves) = lab.begin();
        list_and_reserve(&moves, &lab.list).unwrap();
        moves.link(&lab.list).unwrap();
        moves.commit_links().unwrap();
        drop(moves);
        for name in names(&lab.path(lost)) {
            if name.starts_with(TEMPORARY) || name.starts_with('n') {
                fs::remove_file(lab.path(lost).join(name)).unwrap();
            }
        }
        complete(&upper, Some(&old)).unwrap();
        lab.assert_moved(&format!("without names in {lost}"));
    }
}
