//! An overlay that is rebuilt from the record of its state answers as the recorded one did. `model.rs` applies random
//! operations before and after; here are the cases that they rarely reach.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use cowl_layers::error::Errno;
use cowl_layers::sys::process;
use cowl_overlay::{FileHandle, Overlay, RecordError, SetAttr};

use crate::common::{Fs, Kept, Lab, READ, WRITE, create_files};

/// Rebuilds the overlay with these open files, which are replaced by those of the new overlay.
fn rebuild(fs: Fs, open: &mut [Arc<FileHandle>]) -> Fs {
    let numbered = |open: &[Arc<FileHandle>]| -> Vec<(u64, Arc<FileHandle>)> {
        (0..).zip(open.iter().cloned()).collect()
    };
    let taken = fs.overlay.record(&numbered(open)).unwrap();
    let bytes = taken.record.clone();
    let rebuilt = Overlay::rebuild(taken).unwrap();
    drop(fs);
    for (number, file) in (0..).zip(open.iter_mut()) {
        *file = rebuilt.files[&number].clone();
    }
    let fs = Fs::new(rebuilt.overlay);
    let again = fs.overlay.record(&numbered(open)).unwrap().record;
    assert!(again == bytes, "the new overlay has another record");
    fs
}

#[test]
fn listing_continues_in_a_rebuilt_overlay() {
    let lab = Lab::new(|top| {
        let names: Vec<String> = (0..500).map(|number| format!("d/{number}")).collect();
        create_files(top, &names.iter().map(String::as_str).collect::<Vec<_>>());
    });
    let fs = lab.open();
    let read = |fs: &Fs, offset: u64, most: usize| {
        let dir = fs.find("d").unwrap();
        let listing = fs.overlay.begin().listing(&dir, offset).unwrap();
        let mut next = offset;
        let part = listing.entries_from(offset).take(most);
        let names: Vec<Vec<u8>> = part
            .map(|(behind, entry)| {
                next = behind;
                entry.name().to_vec()
            })
            .collect();
        (names, next)
    };
    let (mut names, next) = read(&fs, 0, 200);
    let fs = rebuild(fs, &mut []);
    // A removed name is not listed twice, nor is any other one skipped.
    let gone = String::from_utf8(names.last().unwrap().clone()).unwrap();
    fs.unlink(&format!("d/{gone}")).unwrap();
    names.extend(read(&fs, next, 1000).0);
    let distinct: BTreeSet<_> = names.iter().collect();
    assert_eq!((names.len(), distinct.len()), (502, 502));
}

#[test]
fn objects_without_names_are_still_usable() {
    let lab = Lab::new(|top| create_files(top, &["lower", "gone/a", "kept", "linked"]));
    std::fs::hard_link(lab.lower().join("linked"), lab.lower().join("other")).unwrap();
    let fs = lab.open();
    fs.create("upper", b"upper").unwrap();
    let mut open = [
        fs.open("lower", READ).unwrap(),
        fs.open("upper", WRITE).unwrap(),
        fs.open("linked", WRITE).unwrap(),
    ];
    fs.chmod("kept", 0o600).unwrap();
    let metacopy = fs.open("kept", READ).unwrap();
    let dir = fs.find("gone").unwrap();
    for path in ["lower", "upper", "linked", "kept", "gone/a"] {
        fs.unlink(path).unwrap();
    }
    fs.rmdir("gone").unwrap();
    let number = dir.ino();
    drop(dir);
    let mut all = [open[0].clone(), open[1].clone(), open[2].clone(), metacopy];
    let fs = rebuild(fs, &mut all);
    open.clone_from_slice(&all[..3]);

    assert_eq!(fs.read_handle(&all[0]).unwrap(), b"content of lower");
    fs.write_handle(&all[1], 5, b" and more").unwrap();
    assert_eq!(fs.read_handle(&all[1]).unwrap(), b"upper and more");
    fs.write_handle(&all[2], 0, b"C").unwrap();
    assert_eq!(fs.read("other").unwrap(), b"Content of linked");
    assert_eq!(fs.read_handle(&all[3]).unwrap(), b"content of kept");
    let links = |file: &FileHandle| fs.attr_of_inode(file.inode()).unwrap().stat.nlink;
    assert_eq!(all.each_ref().map(|file| links(file)), [0, 0, 1, 0]);
    let dir = fs.overlay.inodes().get(number).unwrap();
    assert_eq!(fs.attr_of_inode(&dir).unwrap().stat.nlink, 0);
    assert!(fs.overlay.begin().listing(&dir, 0).unwrap().is_empty());
}

/// Double change: a daemon is killed after it made a change and before its reply, and its successor is replaced before the
/// kernel has sent the request again.
#[test]
fn unanswered_requests_are_retained_by_a_replacement_after_a_kill() {
    const RESENT: u64 = 1 << 63;
    let lab = Lab::new(|top| create_files(top, &["file"]));
    let fs = lab.open();
    let killed = Kept::new();
    fs.overlay.attach(&killed.ledger);
    let request = killed.ledger.begin(77);
    fs.mkdir("made").unwrap();
    let (overlay, next, _) = killed.recover(&fs.overlay, &mut []);
    drop(request);
    let taken = overlay.record(&[]).unwrap();
    drop((overlay, next));
    // It can be replaced again before it has a ledger.
    let overlay = Overlay::rebuild(taken).unwrap().overlay;
    let fs = Fs::new(
        Overlay::rebuild(overlay.record(&[]).unwrap())
            .unwrap()
            .overlay,
    );
    let last = Kept::new();
    fs.overlay.attach(&last.ledger);
    let other = last.ledger.begin(79);
    assert_eq!(fs.mkdir("made").unwrap_err(), Errno::EXIST);
    drop(other);
    let request = last.ledger.begin(77 | RESENT);
    fs.mkdir("made").unwrap();
    drop(request);
    let request = last.ledger.begin(77 | RESENT);
    assert_eq!(fs.mkdir("made").unwrap_err(), Errno::EXIST);
    drop(request);
}

#[test]
fn numbers_times_and_counts_are_retained() {
    let lab = Lab::new(|top| create_files(top, &["f", "g", "d/h"]));
    let fs = lab.open();
    let before = fs.attr("f").unwrap();
    // Copied up without a visible change, so that the ctime on disk is another one.
    let mut open = [fs.open("f", WRITE).unwrap()];
    assert_eq!(fs.attr("f").unwrap().stat.ctime, before.stat.ctime);
    let inode = open[0].inode().clone();
    fs.overlay.inodes().replace_node_id(&inode, inode.ino());
    let renewed = fs.overlay.inodes().node_id(&inode);
    assert_ne!(renewed, inode.ino());
    fs.overlay.inodes().count_lookup_as(&inode, renewed);
    drop(inode);
    // A held ctime of an object that is forgotten and looked up again.
    let held = fs.attr("d/h").unwrap();
    let writer = fs.open("d/h", WRITE).unwrap();
    fs.overlay.close(&writer);
    drop(writer);
    fs.overlay.forget(held.ino, u64::MAX);

    let fs = rebuild(fs, &mut open);
    assert_eq!(fs.overlay.open_files(), Some((0, 1)));
    let inode = open[0].inode().clone();
    assert_eq!(inode.ino(), before.ino);
    assert_eq!(fs.overlay.inodes().node_id(&inode), renewed);
    assert!(fs.overlay.inodes().get(renewed).is_some());
    assert_eq!(fs.attr("f").unwrap().stat.ctime, before.stat.ctime);
    let after = fs.attr("d/h").unwrap();
    assert_eq!((after.ino, after.stat.ctime), (held.ino, held.stat.ctime));
    assert!(inode.has_writers());
    fs.overlay.close(&open[0]);
    assert!(!inode.has_writers());
    // The kernel forgets what it looked up in the old overlay.
    let count = fs.overlay.inodes().len();
    drop(inode);
    drop(open);
    fs.overlay.forget(renewed, 1);
    fs.overlay.forget(before.ino, u64::MAX);
    assert_eq!(fs.overlay.inodes().len(), count - 1);
}

#[test]
fn a_changed_layer_is_an_error_and_the_old_overlay_continues() {
    let lab = Lab::new(|top| create_files(top, &["f", "g"]));
    let fs = lab.open();
    fs.create("new", b"new").unwrap();
    fs.find("new").unwrap();
    let taken = fs.overlay.record(&[]).unwrap();
    let damaged = cowl_overlay::Handover {
        record: taken.record[..taken.record.len() - 1].to_vec(),
        descriptors: Vec::new(),
        layers: taken.layers.clone(),
        upper: taken.upper.clone(),
        locks: taken.locks.clone(),
        retained: Vec::new(),
        options: taken.options.clone(),
    };
    assert!(matches!(
        Overlay::rebuild(damaged),
        Err(RecordError::Damaged(_))
    ));
    std::fs::rename(lab.upper().join("new"), lab.path().join("away")).unwrap();
    let error = Overlay::rebuild(taken).unwrap_err();
    assert!(
        matches!(error, RecordError::Inode { error, .. } if error.errno() == Errno::STALE),
        "{error}"
    );
    std::fs::rename(lab.path().join("away"), lab.upper().join("new")).unwrap();
    assert_eq!(fs.read("new").unwrap(), b"new");
    let set = SetAttr {
        mode: Some(0o600),
        ..SetAttr::default()
    };
    fs.set("g", &set).unwrap();
}

#[test]
fn a_descriptor_of_another_object_is_refused() {
    let lab = Lab::new(|top| create_files(top, &["f"]));
    let fs = lab.open();
    // Each of them is only accessible by a descriptor.
    fs.create("one", b"one").unwrap();
    fs.create("two", b"two").unwrap();
    fs.mkdir("dir").unwrap();
    let open = [fs.open("one", READ).unwrap(), fs.open("two", READ).unwrap()];
    let dir = fs.find("dir").unwrap();
    fs.unlink("one").unwrap();
    fs.unlink("two").unwrap();
    fs.rmdir("dir").unwrap();
    let numbered = || (0..).zip(open.iter().cloned()).collect::<Vec<_>>();
    let count = fs.overlay.record(&numbered()).unwrap().descriptors.len();
    assert_eq!(count, 3);
    for (one, other) in [(0, 1), (0, 2), (1, 2)] {
        let mut taken = fs.overlay.record(&numbered()).unwrap();
        taken.descriptors.swap(one, other);
        let refused = Overlay::rebuild(taken).unwrap_err();
        assert!(
            matches!(refused, RecordError::Descriptor { index, .. } if index == one),
            "{refused}"
        );
    }
    for index in 0..count {
        let mut taken = fs.overlay.record(&numbered()).unwrap();
        let other = std::fs::File::open("/dev/null").unwrap();
        taken.descriptors[index] = Arc::new(other.into());
        let refused = Overlay::rebuild(taken).unwrap_err();
        assert!(
            matches!(refused, RecordError::Descriptor { index: at, .. } if at == index),
            "{refused}"
        );
    }
    let mut taken = fs.overlay.record(&numbered()).unwrap();
    taken.descriptors.pop();
    let refused = Overlay::rebuild(taken).unwrap_err().to_string();
    assert!(refused.contains("was not handed over"), "{refused}");
    drop(dir);
    let rebuilt = Overlay::rebuild(fs.overlay.record(&numbered()).unwrap()).unwrap();
    assert_eq!(rebuilt.files.len(), 2);
}

/// The maximum memory of a known inode with its record, in bytes. Measured: 321 (docs/decisions/0030).
const BYTES_WITH_RECORD: u64 = 330;

/// `COWL_SCALE_FILES` sets the number of files.
///
/// The test measures in a process of its own, because other tests of this process use memory at the same time.
#[test]
fn a_known_inode_with_its_record_is_small() {
    const NAME: &str = "record::a_known_inode_with_its_record_is_small";
    const ALONE: &str = "COWL_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return measure_inodes_and_record();
    }
    let alone = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let text = String::from_utf8(alone.stdout).unwrap();
    let errors = String::from_utf8(alone.stderr).unwrap();
    assert!(alone.status.success(), "{text}{errors}");
    let measured = text.lines().find(|line| line.contains("files:"));
    println!("{}", measured.unwrap());
}

fn measure_inodes_and_record() {
    let files = std::env::var("COWL_SCALE_FILES").map_or(20_000, |files| files.parse().unwrap());
    let lab = Lab::new(|top| {
        for number in 0..files {
            let dir = top.join(format!("directory{}", number / 1000));
            if number % 1000 == 0 {
                std::fs::create_dir(&dir).unwrap();
            }
            std::fs::write(dir.join(format!("file{number}")), b"").unwrap();
        }
    });
    let fs = lab.open();
    let memory = || {
        process::give_memory_back();
        process::own_memory().unwrap()
    };
    // One-time allocations do not count.
    fs.find("directory0/file0").unwrap();
    let before = memory();
    for number in 0..files {
        fs.find(&format!("directory{}/file{number}", number / 1000))
            .unwrap();
    }
    let known = memory() - before;
    let started = Instant::now();
    let taken = fs.overlay.record(&[]).unwrap();
    let (size, recorded) = (taken.record.len(), started.elapsed());
    let with_record = memory() - before;
    let started = Instant::now();
    let rebuilt = Overlay::rebuild(taken).unwrap();
    let rebuilding = started.elapsed();
    assert_eq!(rebuilt.overlay.inodes().len(), fs.overlay.inodes().len());
    let each = with_record / files;
    println!(
        "{files} files: {} bytes for an inode, {each} with the record, which has {} bytes; {recorded:?} to record, \
         {rebuilding:?} to rebuild; {} MiB at most",
        known / files,
        size as u64 / files,
        peak_memory() >> 20,
    );
    assert!(size as u64 / files <= 64, "{size} bytes");
    assert!(each < BYTES_WITH_RECORD, "{each} bytes");
}

/// Returns the maximum memory of this process so far, in bytes.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = peak.unwrap().trim().strip_suffix(" kB").unwrap();
    kilobytes.parse::<u64>().unwrap() << 10
}
