//! A full disk during a snapshot that moves files (docs/decisions/0043): it refuses the snapshot, or has no effect.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use cowl_tests::conditions::can;
use cowl_tests::images::Kind;
use cowl_tests::mount::wait_until;
use cowl_tests::power_cut::phases::Phase;
use rustix::fs::FallocateFlags;

use crate::moving_files::{Lab, NEEDS, assert_files_are_in_one_layer, assert_no_placeholders};

/// The number of directories with a file that moves.
const DIRS: usize = 9;

/// Creates files in directories of various sizes, and returns them open for writing. XFS stores a small directory in its
/// inode, so that one more name makes some of them need a block.
fn open_files(top: &Path, count: usize) -> Vec<File> {
    let open = |number: usize| {
        let dir = top.join(format!("d{number}"));
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("x".repeat(40 + 24 * (number % DIRS))), "").unwrap();
        let mut options = File::options();
        let options = options.read(true).write(true).create_new(true);
        let file = options.open(dir.join("moved")).unwrap();
        file.write_all_at(&[b'0'; 4096], 0).unwrap();
        file
    };
    (0..count).map(open).collect()
}

/// The root directory of the file system of the store.
fn disk(lab: &Lab) -> PathBuf {
    lab.store.path().parent().unwrap().to_owned()
}

/// Takes all space of the disk except `free` bytes.
fn fill(lab: &Lab, free: u64) {
    let disk = disk(lab);
    // XFS reserves more blocks for content that is not written back.
    rustix::fs::syncfs(File::open(&disk).unwrap()).unwrap();
    let rest = File::create(disk.join("rest")).unwrap();
    rustix::fs::fallocate(&rest, FallocateFlags::empty(), 0, free + 1).unwrap();
    let filler = File::create(disk.join("filler")).unwrap();
    let (mut offset, mut size) = (0, 1 << 28);
    while size >= 4096 {
        match rustix::fs::fallocate(&filler, FallocateFlags::empty(), offset, size) {
            Ok(()) => offset += size,
            Err(rustix::io::Errno::NOSPC) => size /= 2,
            Err(error) => panic!("cannot fill the disk: {error}"),
        }
    }
    std::fs::remove_file(disk.join("rest")).unwrap();
}

fn empty(lab: &Lab) {
    std::fs::remove_file(disk(lab).join("filler")).unwrap();
}

fn write(files: &[File], digit: u8) {
    for file in files {
        file.write_all_at(&[digit; 4096], 0).unwrap();
    }
}

fn assert_content(top: &Path, count: usize, digit: u8, context: &str) {
    for number in 0..count {
        let content = std::fs::read(top.join(format!("d{number}/moved"))).unwrap();
        assert_eq!(content, [digit; 4096], "{number}, {context}");
    }
}

fn end(lab: &Lab) {
    assert_files_are_in_one_layer(lab);
    assert_no_placeholders(lab, "at the end");
    lab.store.cowl(["umount", "web"]).ok();
    lab.store.cowl(["check", "web"]).ok();
}

/// Returns a container whose daemon waits during a snapshot, once the files are in the new layer, as long as the file
/// exists.
fn waiting_lab(dir: &Path, settings: &[(&str, &str)]) -> (Lab, PathBuf) {
    let file = dir.join("waits");
    std::fs::write(&file, "").unwrap();
    let delay = format!("in a push/{}", file.display());
    let settings = settings.iter().copied();
    let lab = Lab::new(Kind::Xfs, false, settings.chain([("COWL_DELAY", &*delay)]));
    (lab, file)
}

/// Takes a snapshot, and fills the disk once the files are in the new layer, when the daemon must replace them in the
/// frozen one. Returns whether the command succeeded.
fn snapshot_on_a_disk_that_becomes_full(lab: &Lab, waits: &Path) -> bool {
    let mut snapshot = lab.snapshot_command();
    let mut snapshot = snapshot.stdout(Stdio::null()).spawn().unwrap();
    wait_until("the files to be linked", || {
        Phase::of(lab.store.path()) == Some(Phase::Linked)
    });
    fill(lab, 0);
    assert_eq!(Phase::of(lab.store.path()), Some(Phase::Linked));
    std::fs::remove_file(waits).unwrap();
    let done = snapshot.wait().unwrap();
    empty(lab);
    done.success()
}

#[test]
fn a_disk_that_is_full_once_the_files_have_moved_does_not_end_the_daemon() {
    if !can(&[NEEDS, &Kind::Xfs.needs()].concat()) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (lab, waits) = waiting_lab(dir.path(), &[]);
    let files = open_files(&lab.top, DIRS);
    let daemon = lab.store.pid("web");
    assert!(snapshot_on_a_disk_that_becomes_full(&lab, &waits));
    assert_eq!(lab.store.pid("web"), daemon);
    write(&files, b'1');
    assert_content(&lab.top, DIRS, b'1', "in the container");
    drop(files);
    lab.with_snapshot("snap0", |top| {
        assert_content(top, DIRS, b'0', "in the snapshot")
    });
    end(&lab);
}

/// Validates the test: without the placeholders, the daemon ends. The next mount completes the snapshot.
#[test]
fn a_full_disk_ends_a_daemon_that_has_not_reserved_space() {
    if !can(&[NEEDS, &Kind::Xfs.needs()].concat()) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (lab, waits) = waiting_lab(dir.path(), &[("COWL_DISABLE", "placeholders")]);
    let files = open_files(&lab.top, DIRS);
    assert!(!snapshot_on_a_disk_that_becomes_full(&lab, &waits));
    let ended = std::fs::read(lab.top.join("d0/moved")).unwrap_err();
    assert_eq!(
        ended.raw_os_error(),
        Some(rustix::io::Errno::NOTCONN.raw_os_error())
    );
    drop(files);
    let top = lab.store.mount("web");
    assert_content(&top, DIRS, b'0', "in the container");
    lab.with_snapshot("snap0", |top| {
        assert_content(top, DIRS, b'0', "in the snapshot")
    });
    end(&lab);
}

#[test]
fn a_full_disk_refuses_a_snapshot_and_changes_nothing() {
    if !can(&[NEEDS, &Kind::Xfs.needs()].concat()) {
        return;
    }
    // More files make the directory of the copies need a block, and then another one.
    let (mut taken, mut refused) = (0, 0);
    for count in [DIRS, 2 * DIRS, 85] {
        let done = snapshots_with_little_space(count);
        println!("{count} files: {} snapshots, {} refused", done.0, done.1);
        taken += done.0;
        refused += done.1;
    }
    assert!(taken > 2 && refused > 2);
}

/// Takes snapshots with more and more space, and returns how many there are, and how many were refused.
fn snapshots_with_little_space(count: usize) -> (usize, usize) {
    let lab = Lab::new(Kind::Xfs, false, None);
    let files = open_files(&lab.top, count);
    let daemon = lab.store.pid("web");
    let step = 8192 * count.div_ceil(DIRS) as u64;
    let (mut taken, mut refused) = (Vec::new(), 0);
    for (round, digit) in (0..30).zip((b'a'..=b'z').cycle()) {
        write(&files, digit);
        let context = format!("{count} files with {} free bytes", round * step);
        fill(&lab, round * step);
        let output = lab.store.cowl(["snapshot", "web"]);
        empty(&lab);
        match output.code {
            0 => taken.push((output.out(), digit)),
            _ => {
                output.fails(1, &["No space left on device"]);
                refused += 1;
            }
        }
        assert_eq!(lab.store.pid("web"), daemon, "{context}");
        assert_content(&lab.top, count, digit, &context);
        assert_no_placeholders(&lab, &context);
    }
    let count_taken = taken.len();
    assert_eq!(lab.store.snapshots("web").len(), count_taken);
    drop(files);
    for (name, digit) in taken {
        lab.with_snapshot(&name, |top| assert_content(top, count, digit, &name));
    }
    end(&lab);
    (count_taken, refused)
}
