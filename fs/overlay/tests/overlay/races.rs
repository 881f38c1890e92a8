//! Two threads on one object: what one of them sees must be what the other made.

use std::fs;
use std::sync::{Arc, Barrier};
use std::thread;

use cowl_layers::Name;
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::{Layer, Upper};
use cowl_overlay::{Caller, OpenOptions, Overlay, OverlayOptions, RenameFlags, SetAttr, Writer};

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
    let options = OverlayOptions {
        metacopy: true,
        volatile: true,
        ..OverlayOptions::default()
    };
    Overlay::new(Some(upper), vec![lower], options).unwrap()
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
            overlay.inodes().count_lookup(&found);
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
            let how = OpenOptions {
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
            let handle = op.open(ROOT, &inode, OpenOptions::default()).unwrap();
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
    let how = OpenOptions {
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

/// One name is moved to and fro while another file takes it in turn: what is asked of the object meanwhile
/// is never answered for the other one, nor with "no such name".
#[test]
fn attributes_beside_a_rename_are_the_objects_own() {
    let place = tempfile::tempdir().unwrap();
    fs::create_dir(place.path().join("lower")).unwrap();
    let overlay = overlay(place.path());
    let root = overlay.root().clone();
    let make = |text: &str| {
        let op = overlay.begin();
        let link = name(&format!("{text}-link"));
        let link = op.symlink(ROOT, &root, &link, text.as_bytes()).unwrap();
        let file = op.mknod(ROOT, &root, &name(text), 0o100_644, 0).unwrap();
        op.set_xattr(ROOT, &file, b"user.own", text.as_bytes(), 0)
            .unwrap();
        (file, link)
    };
    let (one, two) = (make("one"), make("two"));
    let done = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..500 {
                for (from, to) in [
                    ("one", "free"),
                    ("two", "one"),
                    ("one", "two"),
                    ("free", "one"),
                ] {
                    for end in ["", "-link"] {
                        let (from, to) = (format!("{from}{end}"), format!("{to}{end}"));
                        overlay
                            .begin()
                            .rename(
                                ROOT,
                                &root,
                                &name(&from),
                                &root,
                                &name(&to),
                                RenameFlags::default(),
                            )
                            .unwrap();
                    }
                }
            }
            done.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        while !done.load(std::sync::atomic::Ordering::SeqCst) {
            let op = overlay.begin();
            for ((file, link), text) in [(&one, &b"one"[..]), (&two, b"two")] {
                assert_eq!(op.get_xattr(file, b"user.own").unwrap(), text);
                assert!(!op.list_xattr(ROOT, file).unwrap().is_empty());
                assert_eq!(op.read_link(link).unwrap(), text);
            }
        }
    });
}

/// A file whose content is still below is opened for writing while it is moved away and another one
/// gets its name: the content goes where it belongs.
#[test]
fn a_file_that_is_filled_beside_a_rename_is_the_right_one() {
    let place = tempfile::tempdir().unwrap();
    let lower = place.path().join("lower");
    fs::create_dir(&lower).unwrap();
    let count = 1000;
    for number in 0..count {
        fs::write(lower.join(format!("f{number}")), "old").unwrap();
    }
    let overlay = overlay(place.path());
    let root = overlay.root().clone();
    let text = |first: &str, number: usize| name(&format!("{first}{number}"));
    let known: Vec<_> = (0..count)
        .map(|number| {
            let op = overlay.begin();
            let inode = op.lookup(&root, &text("f", number)).unwrap().unwrap();
            let set = SetAttr {
                mode: Some(0o600),
                ..SetAttr::default()
            };
            op.set_attr(ROOT, &inode, &set, None).unwrap();
            let new = op
                .mknod(ROOT, &root, &text("n", number), 0o100_644, 0)
                .unwrap();
            let how = OpenOptions {
                write: true,
                ..OpenOptions::default()
            };
            let handle = op.open(ROOT, &new, how).unwrap();
            op.write(&handle, 0, b"new file", Writer::Privileged)
                .unwrap();
            overlay.close(&handle);
            inode
        })
        .collect();
    let failed = std::sync::Mutex::new(Vec::new());
    both(
        count,
        |number| {
            for (from, to) in [("f", "g"), ("n", "f")] {
                let (from, to) = (text(from, number), text(to, number));
                let op = overlay.begin();
                op.rename(ROOT, &root, &from, &root, &to, RenameFlags::default())
                    .unwrap();
            }
        },
        |number| {
            let op = overlay.begin();
            let how = OpenOptions {
                write: true,
                ..OpenOptions::default()
            };
            // No panic here: the other thread would wait for ever.
            match op.open(ROOT, &known[number], how) {
                Ok(handle) => overlay.close(&handle),
                Err(error) => failed.lock().unwrap().push((number, error)),
            }
        },
    );
    assert_eq!(failed.into_inner().unwrap(), []);
    for number in 0..count {
        let read = |first: &str| {
            fs::read_to_string(place.path().join(format!("upper/{first}{number}"))).unwrap()
        };
        assert_eq!((&*read("f"), &*read("g")), ("new file", "old"), "{number}");
    }
}

/// A name of a file is looked up while it is removed (a link count does that to find the others). When
/// the layer is frozen later and the file changes, the name stays whose it is by then.
#[test]
fn a_name_that_was_removed_beside_a_lookup_does_not_come_back() {
    let place = tempfile::tempdir().unwrap();
    let lower = place.path().join("lower");
    fs::create_dir(&lower).unwrap();
    let count = 600;
    for number in 0..count {
        fs::write(lower.join(format!("a{number}")), "old").unwrap();
        let (one, two) = (format!("a{number}"), format!("b{number}"));
        fs::hard_link(lower.join(one), lower.join(two)).unwrap();
    }
    let overlay = overlay(place.path());
    let root = overlay.root().clone();
    let text = |first: &str, number: usize| name(&format!("{first}{number}"));
    let known: Vec<_> = (0..count)
        .map(|number| {
            let op = overlay.begin();
            op.lookup(&root, &text("a", number)).unwrap().unwrap()
        })
        .collect();
    both(
        count,
        |number| overlay.begin().unlink(&root, &text("b", number)).unwrap(),
        |number| {
            let name = text("b", number);
            while overlay.begin().lookup(&root, &name).unwrap().is_some() {}
        },
    );
    for number in 0..count {
        let op = overlay.begin();
        let name = text("b", number);
        op.mknod(ROOT, &root, &name, 0o100_644, 0).unwrap();
    }
    for folder in ["upper2", "work2"] {
        fs::create_dir(place.path().join(folder)).unwrap();
    }
    let (new, work) = (place.path().join("upper2"), place.path().join("work2"));
    let upper = Upper::open(&new, &work, XattrSpace::detect()).unwrap();
    overlay.push_layer(upper).unwrap();
    for (number, inode) in known.iter().enumerate() {
        let op = overlay.begin();
        let set = SetAttr {
            mode: Some(0o600),
            ..SetAttr::default()
        };
        op.set_attr(ROOT, inode, &set, None).unwrap();
        assert!(
            !new.join(format!("b{number}")).try_exists().unwrap(),
            "b{number} came back as a name of a{number}"
        );
    }
}

/// The name by which a file is linked may be another file's by then.
#[test]
fn a_link_beside_a_replacement_is_one_of_the_file_that_was_meant() {
    let place = tempfile::tempdir().unwrap();
    fs::create_dir(place.path().join("lower")).unwrap();
    let overlay = overlay(place.path());
    let root = overlay.root().clone();
    let text = |first: &str, number: usize| name(&format!("{first}{number}"));
    let count = 3000;
    let known: Vec<_> = (0..count)
        .map(|number| {
            let op = overlay.begin();
            op.mknod(ROOT, &root, &text("b", number), 0o100_644, 0)
                .unwrap();
            op.mknod(ROOT, &root, &text("a", number), 0o100_600, 0)
                .unwrap()
        })
        .collect();
    both(
        count,
        |number| {
            let linked = overlay
                .begin()
                .link(&known[number], &root, &text("new", number));
            if let Err(error) = linked {
                assert!(error.is_absent(), "{error}");
            }
        },
        |number| {
            let (from, to) = (text("b", number), text("a", number));
            let flags = RenameFlags::default();
            let op = overlay.begin();
            op.rename(ROOT, &root, &from, &root, &to, flags).unwrap();
        },
    );
    for (number, meant) in known.iter().enumerate() {
        let op = overlay.begin();
        if let Some(found) = op.lookup(&root, &text("new", number)).unwrap() {
            assert!(Arc::ptr_eq(&found, meant), "new{number} is another file");
        }
    }
}
