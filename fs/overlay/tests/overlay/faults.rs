//! Fault injection: each changing system call fails in turn.
//!
//! Afterwards, a new mount must have the tree from before or from after the operation, and an empty work directory.

use std::path::Path;

use crate::common::{FIXED_TIME, Fs, Lab, R, READ, Tree, create_files, set_xattr};
use cowl_layers::error::Errno;
use cowl_layers::layer::Upper;
use cowl_layers::panics::take_ended;
use cowl_layers::sys::copy::SyncScope;
use cowl_layers::sys::fault::{arm, arm_once, arm_panic, disarm};

struct Case {
    name: &'static str,
    /// Operations before the tested one, without faults.
    setup: fn(&Fs),
    act: fn(&Fs) -> R<()>,
}

fn no_setup(_: &Fs) {}

const CASES: &[Case] = &[
    Case {
        name: "append to a lower file",
        setup: no_setup,
        act: |fs| fs.append("d/f", b"more"),
    },
    Case {
        name: "truncate a lower file",
        setup: no_setup,
        act: |fs| fs.truncate("d/f", 3),
    },
    Case {
        name: "open with O_TRUNC",
        setup: no_setup,
        act: |fs| fs.overwrite("d/f", b""),
    },
    Case {
        name: "open a metacopy with O_TRUNC",
        setup: |fs| fs.chmod("d/f", 0o600).unwrap(),
        act: |fs| fs.overwrite("d/f", b""),
    },
    Case {
        name: "append to a metacopy",
        setup: |fs| fs.chmod("d/f", 0o600).unwrap(),
        act: |fs| fs.append("d/f", b"more"),
    },
    Case {
        name: "append to a renamed metacopy",
        setup: |fs| fs.rename("d/f", "e").unwrap(),
        act: |fs| fs.append("e", b"more"),
    },
    Case {
        name: "chmod a lower file",
        setup: no_setup,
        act: |fs| fs.chmod("d/f", 0o600),
    },
    Case {
        name: "chmod a lower directory",
        setup: no_setup,
        act: |fs| fs.chmod("d/sub", 0o700),
    },
    Case {
        name: "chmod one of three names",
        setup: no_setup,
        act: |fs| fs.chmod("d/h2", 0o600),
    },
    Case {
        name: "append to one of three names",
        setup: no_setup,
        act: |fs| fs.append("h1", b"+"),
    },
    Case {
        name: "unlink one of three names",
        setup: no_setup,
        act: |fs| fs.unlink("d/h2"),
    },
    Case {
        name: "setxattr",
        setup: no_setup,
        act: |fs| fs.set_xattr("d/f", "user.new", b"1"),
    },
    Case {
        name: "unlink a lower file",
        setup: no_setup,
        act: |fs| fs.unlink("d/f"),
    },
    Case {
        name: "unlink a merged file",
        setup: |fs| fs.append("d/f", b"x").unwrap(),
        act: |fs| fs.unlink("d/f"),
    },
    Case {
        name: "rmdir a lower directory",
        setup: no_setup,
        act: |fs| fs.rmdir("empty"),
    },
    Case {
        name: "rmdir a merged directory with whiteouts",
        setup: |fs| fs.unlink("m/x").unwrap(),
        act: |fs| fs.rmdir("m"),
    },
    Case {
        name: "rename a lower file",
        setup: no_setup,
        act: |fs| fs.rename("d/f", "new"),
    },
    Case {
        name: "rename one of three names",
        setup: no_setup,
        act: |fs| fs.rename("h1", "h9"),
    },
    Case {
        name: "rename a lower file over an upper one",
        setup: |fs| fs.create("up", b"up").unwrap(),
        act: |fs| fs.rename("d/f", "up"),
    },
    Case {
        name: "rename over a lower file",
        setup: no_setup,
        act: |fs| fs.rename("d/f", "m/x"),
    },
    Case {
        name: "rename a lower directory",
        setup: no_setup,
        act: |fs| fs.rename("d", "moved"),
    },
    Case {
        name: "rename a merged directory across parents",
        setup: |fs| fs.create("d/new", b"new").unwrap(),
        act: |fs| fs.rename("d", "m/moved"),
    },
    Case {
        name: "rename a directory over an emptied one",
        setup: |fs| fs.unlink("m/x").unwrap(),
        act: |fs| fs.rename("d", "m"),
    },
    Case {
        name: "rename a new directory over an emptied one",
        setup: |fs| {
            fs.unlink("m/x").unwrap();
            fs.mkdir("n").unwrap();
            fs.create("n/inside", b"1").unwrap();
        },
        act: |fs| fs.rename("n", "m"),
    },
    Case {
        name: "rename a new directory over a whiteout",
        setup: |fs| {
            fs.rmdir("empty").unwrap();
            fs.mkdir("n").unwrap();
            fs.create("n/inside", b"1").unwrap();
        },
        act: |fs| fs.rename("n", "empty"),
    },
    Case {
        name: "exchange two directories",
        setup: no_setup,
        act: |fs| fs.exchange("d", "m"),
    },
    Case {
        name: "mkdir over a whiteout",
        setup: |fs| {
            fs.unlink("m/x").unwrap();
            fs.rmdir("m").unwrap();
        },
        act: |fs| fs.mkdir("m"),
    },
    Case {
        name: "create over a whiteout",
        setup: |fs| fs.unlink("d/f").unwrap(),
        act: |fs| fs.create("d/f", b""),
    },
    Case {
        name: "mkdir in a lower directory",
        setup: no_setup,
        act: |fs| fs.mkdir("d/sub/n"),
    },
    Case {
        name: "link a lower file",
        setup: no_setup,
        act: |fs| fs.link("d/f", "m/l"),
    },
    Case {
        name: "link one of three names",
        setup: no_setup,
        act: |fs| fs.link("d/h2", "m/h4"),
    },
    Case {
        name: "link over a whiteout",
        setup: |fs| fs.unlink("m/x").unwrap(),
        act: |fs| fs.link("d/f", "m/x"),
    },
    Case {
        name: "symlink in a lower directory",
        setup: no_setup,
        act: |fs| fs.symlink("d/s", "x"),
    },
];

fn build(top: &Path) {
    create_files(top, &["d/f", "d/sub/inner", "m/x", "empty/", "h1"]);
    std::fs::hard_link(top.join("h1"), top.join("d/h2")).unwrap();
    std::fs::hard_link(top.join("h1"), top.join("d/sub/h3")).unwrap();
    set_xattr(&top.join("d/f"), "user.old", b"old");
}

/// The cases in which a fault may leave a changed mtime.
///
/// The content of a metacopy is copied before the mtime is restored. The caller is about to change the file anyway.
const COMPLETE_METACOPIES: [&str; 3] = [
    "open a metacopy with O_TRUNC",
    "append to a metacopy",
    "append to a renamed metacopy",
];

/// Returns the merged tree without times that were set in this run, because they differ between runs.
fn visible_tree(fs: &Fs) -> Tree {
    let mut tree = fs.tree();
    for shown in tree.values_mut() {
        shown.mtime = shown.mtime.filter(|time| *time == FIXED_TIME);
    }
    tree
}

fn prepare(case: &Case) -> (Lab, Fs) {
    let lab = Lab::new(build);
    let fs = lab.open();
    (case.setup)(&fs);
    drop(fs);
    let fs = lab.open();
    (lab, fs)
}

/// Runs a case with a crash at every changing call in turn, and returns the number of crashes.
fn crash_at_every_call(case: &Case) -> u64 {
    let name = case.name;
    let (lab, fs) = prepare(case);
    let before = visible_tree(&fs);
    (case.act)(&fs).unwrap();
    let live = visible_tree(&fs);
    drop(fs);
    let after = visible_tree(&lab.open());
    assert_eq!(live, after, "{name}: another tree after a new mount");
    assert_ne!(before, after, "{name}: nothing happened");
    for successes in 0.. {
        let (lab, fs) = prepare(case);
        // Before an operation, the kernel has looked up the names.
        visible_tree(&fs);
        disarm();
        arm(successes);
        let result = (case.act)(&fs);
        let calls = disarm();
        drop(fs);
        let fs = lab.open();
        let mut now = visible_tree(&fs);
        if COMPLETE_METACOPIES.contains(&name) && now != after {
            for (path, shown) in &mut now {
                shown.mtime = before.get(path).and_then(|old| old.mtime);
            }
        }
        if result.is_ok() {
            assert_eq!(
                now, after,
                "{name}: success was reported, but only {successes} of {calls} calls succeeded"
            );
        } else {
            assert!(
                now == before || now == after,
                "{name}: neither the old nor the new tree after {successes} calls:\n{}",
                difference(&before, &after, &now)
            );
        }
        let leftovers = std::fs::read_dir(lab.work().join("work")).unwrap().count();
        assert_eq!(
            leftovers, 0,
            "{name}: the work directory is not empty after {successes} calls"
        );
        if calls <= successes {
            return successes;
        }
    }
    unreachable!()
}

/// The effect of an injected fault.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The call fails, as on a full disk.
    Error,
    /// The thread panics before the call. If it holds a lock, the process ends.
    Panic,
}

/// Runs a case in which each changing call fails once in turn.
///
/// The mount remains usable and has the old or the new tree. A retry succeeds, and the next mount has the new tree.
/// After a panic that ends the process, the next mount has the old or the new tree.
fn fail_once_at_every_call(case: &Case, fault: Fault) -> Result<u64, String> {
    let name = case.name;
    let (lab, fs) = prepare(case);
    let before = visible_tree(&fs);
    (case.act)(&fs).unwrap();
    let after = visible_tree(&fs);
    drop((fs, lab));
    for successes in 0.. {
        let (lab, mut fs) = prepare(case);
        visible_tree(&fs);
        // If the journal entry cannot be removed, it counts as a link until the next mount.
        fs.links_may_be_off = true;
        disarm();
        let act = std::panic::AssertUnwindSafe(|| (case.act)(&fs));
        let result = match fault {
            Fault::Error => {
                arm_once(successes);
                act()
            }
            Fault::Panic => {
                arm_panic(successes);
                std::panic::catch_unwind(act).unwrap_or(Err(Errno::IO))
            }
        };
        let calls = disarm();
        if take_ended() {
            drop(fs);
            let mut now = visible_tree(&lab.open());
            if COMPLETE_METACOPIES.contains(&name) && now != after {
                for (path, shown) in &mut now {
                    shown.mtime = before.get(path).and_then(|old| old.mtime);
                }
            }
            if now != before && now != after {
                let difference = difference(&before, &after, &now);
                return Err(format!(
                    "{name}: neither the old nor the new tree after a panic after {successes} calls:\n{difference}"
                ));
            }
            continue;
        }
        let mut states = Vec::new();
        let current = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| visible_tree(&fs)));
        states.push(current.map_err(|_| format!("{name}: inconsistent after {successes} calls"))?);
        if result.is_err() {
            // Retry without faults.
            (case.act)(&fs)
                .map_err(|e| format!("{name}: the retry failed after {successes} calls: {e}"))?;
        }
        drop(fs);
        states.push(visible_tree(&lab.open()));
        if COMPLETE_METACOPIES.contains(&name) && states[0] != after {
            for (path, shown) in &mut states[0] {
                shown.mtime = before.get(path).and_then(|old| old.mtime);
            }
        }
        for (path, shown) in &mut states[0] {
            let expected = before.get(path).or(after.get(path));
            if expected.is_some_and(|old| old.names.len() > 1) {
                shown.nlink = shown.names.len() as u64;
            }
        }
        if states[0] != before && states[0] != after {
            let difference = difference(&before, &after, &states[0]);
            return Err(format!(
                "{name}: neither the old nor the new tree after {successes} calls:\n{difference}"
            ));
        }
        if states[1] != after {
            let difference = difference(&before, &after, &states[1]);
            return Err(format!(
                "{name}: wrong tree after a retry after {successes} calls:\n{difference}"
            ));
        }
        if calls <= successes {
            return Ok(successes);
        }
    }
    unreachable!()
}

#[test]
fn failed_operation_can_be_retried() {
    let mut failed = Vec::new();
    for case in CASES {
        match fail_once_at_every_call(case, Fault::Error) {
            Ok(injected) => assert!(injected > 0),
            Err(problem) => failed.push(problem),
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn panicked_operation_leaves_the_old_or_the_new_tree() {
    let mut failed = Vec::new();
    for case in CASES {
        match fail_once_at_every_call(case, Fault::Panic) {
            Ok(injected) => assert!(injected > 0),
            Err(problem) => failed.push(problem),
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// The recovery by a mount after a crash may crash itself, repeatedly.
#[test]
fn recovery_can_be_interrupted() {
    let cases = CASES
        .iter()
        .filter(|case| case.name.contains("three names"));
    let mut interrupted = 0;
    for case in cases {
        let name = case.name;
        let (lab, fs) = prepare(case);
        let before = visible_tree(&fs);
        (case.act)(&fs).unwrap();
        let after = visible_tree(&fs);
        drop((fs, lab));
        for successes in 0.. {
            let (lab, fs) = prepare(case);
            visible_tree(&fs);
            disarm();
            arm(successes);
            let result = (case.act)(&fs);
            let calls = disarm();
            drop(fs);
            for recovered in 0.. {
                arm(recovered);
                let opened = Upper::open(&lab.upper(), &lab.work(), lab.space);
                disarm();
                match opened {
                    Ok(_) => break,
                    Err(_) => interrupted += 1,
                }
            }
            let now = visible_tree(&lab.open());
            let is_expected = now == after || (result.is_err() && now == before);
            let difference = difference(&before, &after, &now);
            assert!(
                is_expected,
                "{name}: after {successes} calls:\n{difference}"
            );
            if calls <= successes {
                break;
            }
        }
    }
    println!("{interrupted} recoveries interrupted");
    assert!(interrupted > 0);
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
fn crash_at_every_call_leaves_old_or_new_tree() {
    let mut failed = Vec::new();
    for case in CASES {
        match std::panic::catch_unwind(|| crash_at_every_call(case)) {
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
fn fsync_covers_writes_before_a_snapshot() {
    let lab = Lab::new(|top| create_files(top, &["d/old"]));
    let fs = lab.open();
    fs.create("d/new", b"text").unwrap();
    lab.push(&fs).unwrap();
    let (file, dir) = (fs.open("d/new", READ).unwrap(), fs.find("d").unwrap());
    let op = fs.overlay.begin();
    op.fsync(&file, SyncScope::All).unwrap();
    op.fsync_dir(&dir).unwrap();
    // An injected I/O error is returned, so both calls reach the disk.
    arm(0);
    let results = [op.fsync(&file, SyncScope::Data), op.fsync_dir(&dir)];
    disarm();
    assert_eq!(
        results.map(|done| done.map_err(|e| e.errno())),
        [Err(Errno::IO); 2]
    );
    drop(op);
    fs.overlay.close(&file);
}
