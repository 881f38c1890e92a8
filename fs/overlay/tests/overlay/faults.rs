//! Whatever changing call is the last one that worked, a new mount shows the tree as it was before the
//! operation or as it is after it, and the work folder is empty.

use std::path::Path;

use crate::common::{Fs, Lab, R, READ, THEN, Tree, plant, set_xattr};
use cowl_layers::error::Errno;
use cowl_layers::layer::Upper;
use cowl_layers::sys::copy::SyncScope;
use cowl_layers::sys::fault::{arm, arm_once, disarm};

struct Case {
    name: &'static str,
    /// What happens before, without faults.
    first: fn(&Fs),
    act: fn(&Fs) -> R<()>,
}

fn nothing(_: &Fs) {}

const CASES: &[Case] = &[
    Case {
        name: "append to a lower file",
        first: nothing,
        act: |fs| fs.append("d/f", b"more"),
    },
    Case {
        name: "cut a lower file",
        first: nothing,
        act: |fs| fs.truncate("d/f", 3),
    },
    Case {
        name: "open with O_TRUNC",
        first: nothing,
        act: |fs| fs.overwrite("d/f", b""),
    },
    Case {
        name: "open a metacopy with O_TRUNC",
        first: |fs| fs.chmod("d/f", 0o600).unwrap(),
        act: |fs| fs.overwrite("d/f", b""),
    },
    Case {
        name: "append to a metacopy",
        first: |fs| fs.chmod("d/f", 0o600).unwrap(),
        act: |fs| fs.append("d/f", b"more"),
    },
    Case {
        name: "append to a renamed metacopy",
        first: |fs| fs.rename("d/f", "e").unwrap(),
        act: |fs| fs.append("e", b"more"),
    },
    Case {
        name: "chmod a lower file",
        first: nothing,
        act: |fs| fs.chmod("d/f", 0o600),
    },
    Case {
        name: "chmod a lower folder",
        first: nothing,
        act: |fs| fs.chmod("d/sub", 0o700),
    },
    Case {
        name: "chmod one of three names",
        first: nothing,
        act: |fs| fs.chmod("d/h2", 0o600),
    },
    Case {
        name: "append to one of three names",
        first: nothing,
        act: |fs| fs.append("h1", b"+"),
    },
    Case {
        name: "unlink one of three names",
        first: nothing,
        act: |fs| fs.unlink("d/h2"),
    },
    Case {
        name: "setxattr",
        first: nothing,
        act: |fs| fs.set_xattr("d/f", "user.new", b"1"),
    },
    Case {
        name: "unlink a lower file",
        first: nothing,
        act: |fs| fs.unlink("d/f"),
    },
    Case {
        name: "unlink a merged file",
        first: |fs| fs.append("d/f", b"x").unwrap(),
        act: |fs| fs.unlink("d/f"),
    },
    Case {
        name: "rmdir a lower folder",
        first: nothing,
        act: |fs| fs.rmdir("empty"),
    },
    Case {
        name: "rmdir a merged folder with whiteouts",
        first: |fs| fs.unlink("m/x").unwrap(),
        act: |fs| fs.rmdir("m"),
    },
    Case {
        name: "rename a lower file",
        first: nothing,
        act: |fs| fs.rename("d/f", "new"),
    },
    Case {
        name: "rename one of three names",
        first: nothing,
        act: |fs| fs.rename("h1", "h9"),
    },
    Case {
        name: "rename a lower file over an upper one",
        first: |fs| fs.create("up", b"up").unwrap(),
        act: |fs| fs.rename("d/f", "up"),
    },
    Case {
        name: "rename over a lower file",
        first: nothing,
        act: |fs| fs.rename("d/f", "m/x"),
    },
    Case {
        name: "rename a lower folder",
        first: nothing,
        act: |fs| fs.rename("d", "moved"),
    },
    Case {
        name: "rename a merged folder across parents",
        first: |fs| fs.create("d/new", b"new").unwrap(),
        act: |fs| fs.rename("d", "m/moved"),
    },
    Case {
        name: "rename a folder over an emptied one",
        first: |fs| fs.unlink("m/x").unwrap(),
        act: |fs| fs.rename("d", "m"),
    },
    Case {
        name: "rename a new folder over an emptied one",
        first: |fs| {
            fs.unlink("m/x").unwrap();
            fs.mkdir("n").unwrap();
            fs.create("n/inside", b"1").unwrap();
        },
        act: |fs| fs.rename("n", "m"),
    },
    Case {
        name: "rename a new folder over a whiteout",
        first: |fs| {
            fs.rmdir("empty").unwrap();
            fs.mkdir("n").unwrap();
            fs.create("n/inside", b"1").unwrap();
        },
        act: |fs| fs.rename("n", "empty"),
    },
    Case {
        name: "exchange two folders",
        first: nothing,
        act: |fs| fs.exchange("d", "m"),
    },
    Case {
        name: "mkdir over a whiteout",
        first: |fs| {
            fs.unlink("m/x").unwrap();
            fs.rmdir("m").unwrap();
        },
        act: |fs| fs.mkdir("m"),
    },
    Case {
        name: "create over a whiteout",
        first: |fs| fs.unlink("d/f").unwrap(),
        act: |fs| fs.create("d/f", b""),
    },
    Case {
        name: "mkdir in a lower folder",
        first: nothing,
        act: |fs| fs.mkdir("d/sub/n"),
    },
    Case {
        name: "link a lower file",
        first: nothing,
        act: |fs| fs.link("d/f", "m/l"),
    },
    Case {
        name: "link one of three names",
        first: nothing,
        act: |fs| fs.link("d/h2", "m/h4"),
    },
    Case {
        name: "link over a whiteout",
        first: |fs| fs.unlink("m/x").unwrap(),
        act: |fs| fs.link("d/f", "m/x"),
    },
    Case {
        name: "symlink in a lower folder",
        first: nothing,
        act: |fs| fs.symlink("d/s", "x"),
    },
];

fn build(top: &Path) {
    plant(top, &["d/f", "d/sub/inner", "m/x", "empty/", "h1"]);
    std::fs::hard_link(top.join("h1"), top.join("d/h2")).unwrap();
    std::fs::hard_link(top.join("h1"), top.join("d/sub/h3")).unwrap();
    set_xattr(&top.join("d/f"), "user.old", b"old");
}

/// A content that is brought up late (`fill`) changes the file's time before it is put back. Whoever
/// asked for that was about to change the file, so that such a time may show.
const FILLS: [&str; 3] = [
    "open a metacopy with O_TRUNC",
    "append to a metacopy",
    "append to a renamed metacopy",
];

/// A time of this run reads as none: another run has another one.
fn seen(fs: &Fs) -> Tree {
    let mut tree = fs.tree();
    for shown in tree.values_mut() {
        shown.mtime = shown.mtime.filter(|time| *time == THEN);
    }
    tree
}

fn prepared(case: &Case) -> (Lab, Fs) {
    let lab = Lab::new(build);
    let fs = lab.open();
    (case.first)(&fs);
    drop(fs);
    let fs = lab.open();
    (lab, fs)
}

/// Returns the number of faults that made the operation fail or left it half done.
fn run(case: &Case) -> u64 {
    let name = case.name;
    let (lab, fs) = prepared(case);
    let before = seen(&fs);
    (case.act)(&fs).unwrap();
    let live = seen(&fs);
    drop(fs);
    let after = seen(&lab.open());
    assert_eq!(live, after, "{name}: another tree after a new mount");
    assert_ne!(before, after, "{name}: nothing happened");
    for good in 0.. {
        let (lab, fs) = prepared(case);
        // A kernel has looked at the names before.
        seen(&fs);
        disarm();
        arm(good);
        let result = (case.act)(&fs);
        let calls = disarm();
        drop(fs);
        let fs = lab.open();
        let mut now = seen(&fs);
        if FILLS.contains(&name) && now != after {
            for (path, shown) in &mut now {
                shown.mtime = before.get(path).and_then(|old| old.mtime);
            }
        }
        if result.is_ok() {
            assert_eq!(
                now, after,
                "{name}: told that it worked, {good} of {calls} calls did"
            );
        } else {
            assert!(
                now == before || now == after,
                "{name}: after {good} calls neither before nor after:\n{}",
                difference(&before, &after, &now)
            );
        }
        let left = std::fs::read_dir(lab.work().join("work")).unwrap().count();
        assert_eq!(
            left, 0,
            "{name}: the work folder is not empty after {good} calls"
        );
        if calls <= good {
            return good;
        }
    }
    unreachable!()
}

/// A call that failed once, as on a full disk, leaves a mount that goes on: it shows the tree before or
/// after, and so does the next mount.
fn go_on(case: &Case) -> Result<u64, String> {
    let name = case.name;
    let (lab, fs) = prepared(case);
    let before = seen(&fs);
    (case.act)(&fs).unwrap();
    let after = seen(&fs);
    drop((fs, lab));
    for good in 0.. {
        let (lab, mut fs) = prepared(case);
        seen(&fs);
        // When the journal's entry can't be removed, its link counts until the next mount.
        fs.links_may_be_off = true;
        disarm();
        arm_once(good);
        let result = (case.act)(&fs);
        let calls = disarm();
        let mut states = Vec::new();
        let seen_now = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| seen(&fs)));
        states.push(seen_now.map_err(|_| format!("{name}: broken after {good} calls"))?);
        if result.is_err() {
            // Again, now that it can work.
            (case.act)(&fs).map_err(|e| format!("{name}: not again after {good} calls: {e}"))?;
        }
        drop(fs);
        states.push(seen(&lab.open()));
        if FILLS.contains(&name) && states[0] != after {
            for (path, shown) in &mut states[0] {
                shown.mtime = before.get(path).and_then(|old| old.mtime);
            }
        }
        for (path, shown) in &mut states[0] {
            let fitting = before.get(path).or(after.get(path));
            if fitting.is_some_and(|old| old.names.len() > 1) {
                shown.nlink = shown.names.len() as u64;
            }
        }
        if states[0] != before && states[0] != after {
            let difference = difference(&before, &after, &states[0]);
            return Err(format!(
                "{name}: in between after {good} calls:\n{difference}"
            ));
        }
        if states[1] != after {
            let difference = difference(&before, &after, &states[1]);
            return Err(format!("{name}: again after {good} calls:\n{difference}"));
        }
        if calls <= good {
            return Ok(good);
        }
    }
    unreachable!()
}

#[test]
fn a_failed_call_can_be_made_again() {
    let mut failed = Vec::new();
    for case in CASES {
        match go_on(case) {
            Ok(injected) => assert!(injected > 0),
            Err(why) => failed.push(why),
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// A mount that makes good what a killed one left may be killed itself, again and again.
#[test]
fn recovery_can_be_cut_off_too() {
    let cases = CASES
        .iter()
        .filter(|case| case.name.contains("three names"));
    let mut cut_off = 0;
    for case in cases {
        let name = case.name;
        let (lab, fs) = prepared(case);
        let before = seen(&fs);
        (case.act)(&fs).unwrap();
        let after = seen(&fs);
        drop((fs, lab));
        for good in 0.. {
            let (lab, fs) = prepared(case);
            seen(&fs);
            disarm();
            arm(good);
            let result = (case.act)(&fs);
            let calls = disarm();
            drop(fs);
            for recovered in 0.. {
                arm(recovered);
                let opened = Upper::open(&lab.upper(), &lab.work(), lab.space);
                disarm();
                match opened {
                    Ok(_) => break,
                    Err(_) => cut_off += 1,
                }
            }
            let now = seen(&lab.open());
            let fits = now == after || (result.is_err() && now == before);
            let difference = difference(&before, &after, &now);
            assert!(fits, "{name}: after {good} calls:\n{difference}");
            if calls <= good {
                break;
            }
        }
    }
    println!("{cut_off} recoveries cut off");
    assert!(cut_off > 0);
}

fn difference(before: &Tree, after: &Tree, now: &Tree) -> String {
    let mut lines = String::new();
    let mut paths: Vec<_> = before
        .keys()
        .chain(after.keys())
        .chain(now.keys())
        .collect();
    paths.sort();
    paths.dedup();
    for path in paths {
        let (b, a, n) = (before.get(path), after.get(path), now.get(path));
        if n != b || n != a {
            lines += &format!("{path}:\n  before {b:?}\n  after  {a:?}\n  now    {n:?}\n");
        }
    }
    lines
}

#[test]
fn before_or_after_at_every_call() {
    let mut failed = Vec::new();
    for case in CASES {
        match std::panic::catch_unwind(|| run(case)) {
            Ok(injected) => {
                println!("{injected:3} faults: {}", case.name);
                assert!(injected > 0, "{}: no fault was injected", case.name);
            }
            Err(_) => {
                disarm();
                failed.push(case.name);
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn what_was_written_before_a_snapshot_can_be_synced_after_it() {
    let lab = Lab::new(|top| plant(top, &["d/old"]));
    let fs = lab.open();
    fs.create("d/new", b"text").unwrap();
    lab.push(&fs).unwrap();
    let (file, dir) = (fs.open("d/new", READ).unwrap(), fs.find("d").unwrap());
    let op = fs.overlay.begin();
    op.fsync(&file, SyncScope::All).unwrap();
    op.fsync_dir(&dir).unwrap();
    // An error of the disk is told, so the disk was asked.
    arm(0);
    let told = [op.fsync(&file, SyncScope::Data), op.fsync_dir(&dir)];
    disarm();
    assert_eq!(
        told.map(|done| done.map_err(|e| e.errno())),
        [Err(Errno::IO); 2]
    );
    drop(op);
    fs.overlay.close(&file);
}
