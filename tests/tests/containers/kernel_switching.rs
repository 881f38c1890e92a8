//! Switching between cowlfs and kernel overlayfs, with changes of the stack in between, loses nothing.
//! `COWL_SWITCHING=N` runs N seeds, `COWL_SEED=N` one of them.

use std::fs;
use std::path::Path;

use cowl_tests::command::sh_in;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::random::{Generator, Side};
use cowl_tests::tree::{self, Compare, Tree};

const NEEDS: &[Need] = &[Need::Root, Need::Fuse, Need::KernelOverlay];

/// Mounts `web` with a driver, reads it, runs `work` and reads it again.
fn with(store: &Store, driver: &str, work: impl FnOnce(&Path)) -> (Tree, Tree) {
    let output = store.cowl(["mount", "--driver", driver, "web"]).ok();
    let root = std::path::PathBuf::from(output.out());
    let before = tree::read(&root).unwrap();
    work(&root);
    let after = tree::read(&root).unwrap();
    store.ok(["umount", "web"]);
    (before, after)
}

/// Performs random operations. The outcomes are irrelevant: the final tree is compared with what the other driver shows.
fn perform(root: &Path, seed: u64, steps: u64) {
    let mut generator = Generator::new(seed);
    let mut side = Side::new(root);
    let mut known = tree::Paths::default();
    for step in 0..steps {
        if step % 4 == 0 {
            known = tree::paths(root).unwrap();
        }
        let caller = generator.caller(5);
        side.perform(&generator.next(&known), caller);
    }
}

#[test]
fn random_changes_by_both_drivers_are_seen_by_the_other() {
    if !can(NEEDS) {
        return;
    }
    let seeds = std::env::var("COWL_SWITCHING").map_or(1, |text| text.parse().unwrap());
    let only = std::env::var("COWL_SEED").map(|text| text.parse().unwrap());
    let range = only.map_or(0..seeds, |seed| seed..seed + 1);
    for seed in range {
        let store = Store::for_test();
        let source = store.scratch().make("source");
        perform(&source, seed, 200);
        sh_in(
            &source,
            "mkdir many; echo x > many/0; for n in $(seq 9); do ln many/0 many/$n; done",
        )
        .ok();
        store.create("web", &source);
        let mut expected = tree::read(&source).unwrap();
        let mut snapshots = Vec::new();
        for phase in 0..8 {
            let driver = match (phase + seed) % 2 {
                0 => "kernel",
                _ => "fuse",
            };
            let label = format!("seed {seed}, phase {phase}, {driver}");
            let (before, after) = with(&store, driver, |root| {
                perform(root, seed * 100 + phase, 120);
                // The random operations may have removed them, or put a FIFO there.
                sh_in(
                    root,
                    "set +e; chmod 600 many/3; test -f many/5 && echo y >> many/5; rm -f many/7",
                );
            });
            tree::assert_same(&label, &before, &expected, Compare::SAME);
            // The same driver again. After some copy-ups, the kernel reports different inode numbers for the names of one
            // file until it has forgotten them.
            let (again, _) = with(&store, driver, |_| ());
            let compare = Compare {
                groups: driver == "fuse",
                ..Compare::SAME
            };
            tree::assert_same(&format!("{label}, again"), &again, &after, compare);
            expected = again;
            match phase % 4 {
                1 => {
                    store.ok(["snapshot", "--no-sync", "web"]);
                    snapshots.push(expected.clone());
                }
                2 => drop(store.ok(["flatten", "web", "--base"])),
                _ => {}
            }
        }
        for (number, snapshot) in snapshots.iter().enumerate() {
            store.ok(["restore", "web", &format!("snap{number}")]);
            for driver in ["kernel", "fuse"] {
                let (now, _) = with(&store, driver, |_| ());
                let label = format!("seed {seed}, snapshot {number}, {driver}");
                tree::assert_same(&label, &now, snapshot, Compare::SAME);
            }
        }
        store.ok(["check"]);
    }
}

#[test]
fn files_whose_content_is_in_a_lower_layer_remain_readable_after_a_merge() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let source = store.scratch().make("source");
    sh_in(
        &source,
        "seq 30000 > big; seq 40000 > other; ln other linked; mkdir dir",
    )
    .ok();
    store.create("web", &source);
    for round in 0..2 {
        let new = format!("new{round}");
        with(&store, "fuse", |root| {
            fs::write(root.join(new), "x").unwrap()
        });
        store.ok(["snapshot", "--no-sync", "web"]);
    }
    let (_, expected) = with(&store, "kernel", |root| {
        sh_in(
            root,
            "chmod 600 big other; mv big dir/big; mv dir moved; chown 5:5 linked",
        )
        .ok();
    });
    // The old layers still exist: a clone has them.
    store.ok(["clone", "web@snap1", "second"]);
    store.ok(["flatten", "web", "--base"]);
    for driver in ["kernel", "fuse", "kernel"] {
        let (now, _) = with(&store, driver, |_| ());
        tree::assert_same(driver, &now, &expected, Compare::SAME);
    }
    let (_, changed) = with(&store, "kernel", |root| {
        sh_in(root, "echo more >> moved/big; echo more >> linked").ok();
    });
    let (now, _) = with(&store, "fuse", |_| ());
    tree::assert_same("changed", &now, &changed, Compare::SAME);
}

#[test]
fn a_copy_of_a_store_is_mounted_by_the_kernel() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let source = store.scratch().make("source");
    sh_in(&source, "seq 30000 > big; echo a > a; ln a b; mkdir dir").ok();
    store.create("web", &source);
    let (_, expected) = with(&store, "kernel", |root| {
        sh_in(root, "chmod 600 big; echo more >> a; mv dir moved").ok();
    });
    let copy = Store::for_test();
    let paths = [store.path().as_os_str(), copy.path().as_os_str()];
    cowl_tests::command::run("cp", ["-aT".as_ref(), paths[0], paths[1]]).ok();
    for driver in ["kernel", "fuse", "kernel"] {
        let (now, _) = with(&copy, driver, |_| ());
        tree::assert_same(driver, &now, &expected, Compare::SAME);
    }
}

#[test]
fn numbers_of_inodes_last_while_the_driver_is_the_same() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let source = store.scratch().make("source");
    sh_in(
        &source,
        "echo a > a; ln a b; mkdir dir; seq 30000 > dir/big",
    )
    .ok();
    store.create("web", &source);
    let (_, expected) = with(&store, "kernel", |root| {
        sh_in(root, "echo more >> a; chmod 600 dir/big; mv dir moved").ok();
    });
    let (now, _) = with(&store, "kernel", |_| ());
    let linked = |tree: &Tree| {
        let (a, b) = (&tree[&b"a"[..]], &tree[&b"b"[..]]);
        (a.ino == b.ino, a.nlink)
    };
    assert_eq!(linked(&expected), (true, 2));
    assert_eq!(linked(&now), (true, 2));
    let number = |tree: &Tree, path: &[u8]| tree[path].ino;
    assert_eq!(number(&now, b"moved/big"), number(&expected, b"moved/big"));
}

#[test]
fn an_unfinished_journal_of_the_daemon_is_completed_first() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let source = store.scratch().make("source");
    sh_in(&source, "echo a > a; ln a b").ok();
    store.create("web", &source);
    // As a power cut leaves it: the copy and the list of its names are in the work directory.
    let json = store.cowl(["show", "web", "--json"]).ok().json();
    let head = std::path::PathBuf::from(json["head"].as_str().unwrap());
    let work = head.with_file_name("work").join("work");
    fs::create_dir_all(&work).unwrap();
    fs::write(work.join("inode-#1"), "copied\n").unwrap();
    fs::write(work.join("links-#1"), b"a\0b").unwrap();
    let (now, _) = with(&store, "kernel", |root| {
        assert_eq!(fs::read_to_string(root.join("b")).unwrap(), "copied\n");
    });
    assert_eq!(now[&b"a"[..]].ino, now[&b"b"[..]].ino);
}
