//! Two threads on one object: what one of them sees must be what the other made.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

use std::fs;
use std::sync::{Arc, Barrier};
use std::thread;

use cowl_fs::Name;
use cowl_fs::format::XattrSpace;
use cowl_fs::layer::{Layer, Upper};
use cowl_fs::overlay::{Behaviour, Caller, OpenHow, Overlay, SetAttr, Writer};

const ROOT: Caller = Caller {
    pid: 0,
    uid: 0,
    gid: 0,
    umask: 0o022,
};

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn overlay(place: &std::path::Path) -> Overlay {
    let space = XattrSpace::detect();
    for folder in ["upper", "work"] {
        fs::create_dir(place.join(folder)).unwrap();
    }
    let upper = Upper::open(&place.join("upper"), &place.join("work"), space).unwrap();
    let lower = Layer::open(&place.join("lower"), space).unwrap();
    let behaviour = Behaviour {
        metacopy: true,
        volatile: true,
        ..Behaviour::default()
    };
    Overlay::new(Some(upper), vec![lower], behaviour).unwrap()
}

/// Runs both for every number at the same moment.
fn both(count: usize, one: impl Fn(usize) + Sync, two: impl Fn(usize) + Sync) {
    let barrier = Barrier::new(2);
    thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..count {
                barrier.wait();
                one(number);
            }
        });
        for number in 0..count {
            barrier.wait();
            two(number);
        }
    });
}

#[test]
fn a_lookup_beside_a_copy_up_finds_the_same_object() {
    let place = tempfile::tempdir().unwrap();
    let lower = place.path().join("lower");
    fs::create_dir(&lower).unwrap();
    let count = 1500;
    for number in 0..count {
        fs::write(lower.join(format!("f{number}")), "old").unwrap();
        fs::create_dir(lower.join(format!("d{number}"))).unwrap();
    }
    let overlay = overlay(place.path());
    let root = overlay.root().clone();
    let known: Vec<_> = (0..count)
        .flat_map(|number| [format!("f{number}"), format!("d{number}")])
        .map(|text| {
            let found = overlay
                .begin()
                .lookup(&root, &name(&text))
                .unwrap()
                .unwrap();
            overlay.inodes().remember(&found);
            found
        })
        .collect();
    both(
        count,
        |number| {
            let op = overlay.begin();
            let set = SetAttr {
                mode: Some(0o750),
                ..SetAttr::default()
            };
            op.set_attr(ROOT, &known[2 * number], &set, None).unwrap();
            op.set_attr(ROOT, &known[2 * number + 1], &set, None)
                .unwrap();
        },
        |number| {
            for _ in 0..20 {
                let op = overlay.begin();
                for (text, at) in [("f", 2 * number), ("d", 2 * number + 1)] {
                    let text = name(&format!("{text}{number}"));
                    let found = op.lookup(&root, &text).unwrap().unwrap();
                    assert!(Arc::ptr_eq(&found, &known[at]), "{text} is two objects");
                }
            }
        },
    );
}

#[test]
fn an_open_for_reading_beside_the_first_for_writing_sees_what_is_written() {
    let place = tempfile::tempdir().unwrap();
    let lower = place.path().join("lower");
    fs::create_dir(&lower).unwrap();
    let count = 1500;
    for number in 0..count {
        fs::write(lower.join(format!("f{number}")), "old").unwrap();
    }
    let overlay = overlay(place.path());
    let root = overlay.root().clone();
    let find = |number| {
        let op = overlay.begin();
        op.lookup(&root, &name(&format!("f{number}")))
            .unwrap()
            .unwrap()
    };
    let done = Barrier::new(2);
    both(
        count,
        |number| {
            let inode = find(number);
            let op = overlay.begin();
            let how = OpenHow {
                keep_atime: false,
                write: true,
                truncate: false,
                exec: false,
            };
            let handle = op.open(ROOT, &inode, how).unwrap();
            op.write(&handle, 0, b"new", Writer::Privileged).unwrap();
            overlay.close(&handle);
            done.wait();
        },
        |number| {
            let inode = find(number);
            let op = overlay.begin();
            let handle = op.open(ROOT, &inode, OpenHow::default()).unwrap();
            done.wait();
            let mut buffer = [0; 3];
            op.read(&handle, 0, &mut buffer).unwrap();
            overlay.close(&handle);
            assert_eq!(&buffer, b"new", "f{number}");
        },
    );
}

/// Work on one file never stops work on another: while one is copied up, its folder is listed and a
/// sibling is copied up as well. No time is measured; a lock held over the copy would be a deadlock
/// here, because the copy waits for the others.
#[test]
fn a_copy_up_holds_nobody_up() {
    let place = tempfile::tempdir().unwrap();
    let lower = place.path().join("lower");
    fs::create_dir(&lower).unwrap();
    let big = fs::File::create(lower.join("big")).unwrap();
    // Data, not a hole, so that there is something to copy.
    let block = vec![1_u8; 1 << 20];
    for _ in 0..256 {
        std::io::Write::write_all(&mut &big, &block).unwrap();
    }
    fs::write(lower.join("small"), "s").unwrap();
    let overlay = overlay(place.path());
    let root = overlay.root().clone();
    let find = |text| overlay.begin().lookup(&root, &name(text)).unwrap().unwrap();
    let (big, small) = (find("big"), find("small"));
    let how = OpenHow {
        keep_atime: false,
        write: true,
        truncate: false,
        exec: false,
    };
    let turns = std::sync::atomic::AtomicUsize::new(0);
    let copied = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let handle = overlay.begin().open(ROOT, &big, how).unwrap();
            copied.store(true, std::sync::atomic::Ordering::SeqCst);
            overlay.close(&handle);
        });
        while !copied.load(std::sync::atomic::Ordering::SeqCst) {
            let op = overlay.begin();
            assert!(op.lookup(&root, &name("small")).unwrap().is_some());
            op.attr(&big).unwrap();
            let handle = op.open(ROOT, &small, how).unwrap();
            op.write(&handle, 0, b"t", Writer::Privileged).unwrap();
            overlay.close(&handle);
            turns.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
    });
    assert!(
        turns.into_inner() > 1,
        "the copy of 256 MiB let nobody pass"
    );
}
