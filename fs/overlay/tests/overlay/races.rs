//! Races of two threads on one object.

use std::fs;
use std::sync::{Arc, Barrier};
use std::thread;

use cowl_layers::Name;
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::{Layer, Upper};
use cowl_overlay::{
    Caller, OpenOptions, Overlay, OverlayOptions, PushRequest, RenameFlags, SetAttr, Writer,
};

const ROOT: Caller = Caller {
    pid: 0,
    uid: 0,
    gid: 0,
    umask: 0o022,
};

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn overlay(tmp: &std::path::Path) -> Overlay {
    let space = XattrSpace::detect();
    for dir in ["upper", "work"] {
        fs::create_dir(tmp.join(dir)).unwrap();
    }
    let upper = Upper::open(&tmp.join("upper"), &tmp.join("work"), space).unwrap();
    let lower = Layer::open(&tmp.join("lower"), space).unwrap();
    let options = OverlayOptions {
        metacopy: true,
        volatile: true,
        ..OverlayOptions::default()
    };
    Overlay::new(Some(upper), vec![lower], options).unwrap()
}

/// Runs both functions concurrently for every number.
fn run_concurrently(count: usize, one: impl Fn(usize) + Sync, two: impl Fn(usize) + Sync) {
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
fn lookup_racing_with_a_copy_up_finds_the_same_inode() {
    let tmp = tempfile::tempdir().unwrap();
    let lower = tmp.path().join("lower");
    fs::create_dir(&lower).unwrap();
    let count = 1500;
    for number in 0..count {
        fs::write(lower.join(format!("f{number}")), "old").unwrap();
        fs::create_dir(lower.join(format!("d{number}"))).unwrap();
    }
    let overlay = overlay(tmp.path());
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
    run_concurrently(
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
fn reader_opened_during_a_copy_up_sees_later_writes() {
    let tmp = tempfile::tempdir().unwrap();
    let lower = tmp.path().join("lower");
    fs::create_dir(&lower).unwrap();
    let count = 1500;
    for number in 0..count {
        fs::write(lower.join(format!("f{number}")), "old").unwrap();
    }
    let overlay = overlay(tmp.path());
    let root = overlay.root().clone();
    let find = |number| {
        let op = overlay.begin();
        op.lookup(&root, &name(&format!("f{number}")))
            .unwrap()
            .unwrap()
    };
    let done = Barrier::new(2);
    run_concurrently(
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

/// While a file is copied up, its directory can be searched, and a sibling can be copied up.
///
/// If the copy held a lock that the other operations need, they would complete at most once during the copy.
#[test]
fn copy_up_blocks_no_other_operation() {
    let tmp = tempfile::tempdir().unwrap();
    let lower = tmp.path().join("lower");
    fs::create_dir(&lower).unwrap();
    let big = fs::File::create(lower.join("big")).unwrap();
    // Write data instead of a hole, so that the copy takes time.
    let block = vec![1_u8; 1 << 20];
    for _ in 0..256 {
        std::io::Write::write_all(&mut &big, &block).unwrap();
    }
    fs::write(lower.join("small"), "s").unwrap();
    let overlay = overlay(tmp.path());
    let root = overlay.root().clone();
    let find = |text| overlay.begin().lookup(&root, &name(text)).unwrap().unwrap();
    let (big, small) = (find("big"), find("small"));
    let how = OpenOptions {
        keep_atime: false,
        write: true,
        truncate: false,
        exec: false,
    };
    let rounds = std::sync::atomic::AtomicUsize::new(0);
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
            rounds.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
    });
    assert!(
        rounds.into_inner() > 1,
        "the copy of 256 MiB blocked all other operations"
    );
}

/// Two files are renamed to each other's names repeatedly.
///
/// Concurrent requests for one of them never return data of the other one, and never ENOENT.
#[test]
fn attributes_during_a_rename_are_of_the_right_object() {
    let tmp = tempfile::tempdir().unwrap();
    fs::create_dir(tmp.path().join("lower")).unwrap();
    let overlay = overlay(tmp.path());
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

/// A metacopy is opened for writing while it is moved and another file gets its name.
///
/// The content must be copied into the metacopy, not into the other file.
#[test]
fn metacopy_completed_during_a_rename_is_the_right_file() {
    let tmp = tempfile::tempdir().unwrap();
    let lower = tmp.path().join("lower");
    fs::create_dir(&lower).unwrap();
    let count = 1000;
    for number in 0..count {
        fs::write(lower.join(format!("f{number}")), "old").unwrap();
    }
    let overlay = overlay(tmp.path());
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
    run_concurrently(
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
            // A panic here would leave the other thread waiting at the barrier.
            match op.open(ROOT, &known[number], how) {
                Ok(handle) => overlay.close(&handle),
                Err(error) => failed.lock().unwrap().push((number, error)),
            }
        },
    );
    assert_eq!(failed.into_inner().unwrap(), []);
    for number in 0..count {
        let read = |first: &str| {
            fs::read_to_string(tmp.path().join(format!("upper/{first}{number}"))).unwrap()
        };
        assert_eq!((&*read("f"), &*read("g")), ("new file", "old"), "{number}");
    }
}

/// A name of a file is looked up while it is removed, as when links are counted.
///
/// A stale record of the name must not overwrite a new file of that name when the file is copied up later.
#[test]
fn name_removed_during_a_lookup_does_not_reappear() {
    let tmp = tempfile::tempdir().unwrap();
    let lower = tmp.path().join("lower");
    fs::create_dir(&lower).unwrap();
    let count = 600;
    for number in 0..count {
        fs::write(lower.join(format!("a{number}")), "old").unwrap();
        let (one, two) = (format!("a{number}"), format!("b{number}"));
        fs::hard_link(lower.join(one), lower.join(two)).unwrap();
    }
    let overlay = overlay(tmp.path());
    let root = overlay.root().clone();
    let text = |first: &str, number: usize| name(&format!("{first}{number}"));
    let known: Vec<_> = (0..count)
        .map(|number| {
            let op = overlay.begin();
            op.lookup(&root, &text("a", number)).unwrap().unwrap()
        })
        .collect();
    run_concurrently(
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
    for dir in ["upper2", "work2"] {
        fs::create_dir(tmp.path().join(dir)).unwrap();
    }
    let (new, work) = (tmp.path().join("upper2"), tmp.path().join("work2"));
    let upper = Upper::open(&new, &work, XattrSpace::detect()).unwrap();
    overlay.push_layer(upper, &PushRequest::default()).unwrap();
    for (number, inode) in known.iter().enumerate() {
        let op = overlay.begin();
        let set = SetAttr {
            mode: Some(0o600),
            ..SetAttr::default()
        };
        op.set_attr(ROOT, inode, &set, None).unwrap();
        assert!(
            !new.join(format!("b{number}")).try_exists().unwrap(),
            "b{number} reappeared as a name of a{number}"
        );
    }
}

/// A file is linked while a rename gives its name to another file.
#[test]
fn link_during_a_replacement_links_the_right_file() {
    let tmp = tempfile::tempdir().unwrap();
    fs::create_dir(tmp.path().join("lower")).unwrap();
    let overlay = overlay(tmp.path());
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
    run_concurrently(
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
