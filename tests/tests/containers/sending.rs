//! Containers that move between two hosts over ssh, and their backups by other programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cowl_tests::command::{Output, run, run_command, sh};
use cowl_tests::conditions::{Need, can, can_mount};
use cowl_tests::cowl::Store;
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;
use cowl_tests::two_hosts::{NEEDS, TwoHosts};
use serde_json::Value;

/// Returns content that does not become smaller when it is compressed.
fn bytes(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// Returns the fields of the snapshots that must be the same on both hosts.
fn described(store: &Store) -> Vec<Value> {
    let list = store.cowl(["list", "web", "--json"]).ok().json();
    let fields = ["name", "created", "comment", "tags", "protected"];
    let snapshots = list["snapshots"].as_array().unwrap().iter();
    snapshots
        .map(|snapshot| fields.map(|field| snapshot[field].clone()).into())
        .collect()
}

/// Returns the archive of a state. Equal trees have equal archives.
fn tree(store: &Store, state: &str) -> Vec<u8> {
    store.cowl(["export", state, "-"]).ok().stdout
}

fn snapshot(store: &Store, comment: &str) -> String {
    store
        .ok(["snapshot", "web", "-m", comment])
        .trim()
        .to_owned()
}

/// A takes three snapshots and sends them; B receives, changes and sends back; A receives.
#[test]
fn only_new_layers_travel_between_two_hosts() {
    if !can(&NEEDS) || !can_mount(&[]) {
        return;
    }
    let hosts = TwoHosts::start();
    let (a, b) = (Store::for_test(), Store::for_test());
    let cowl = programs::cowl();
    let base = a.beside("base");
    fs::create_dir_all(base.join("etc")).unwrap();
    fs::write(base.join("large"), bytes(4_000_000, 1)).unwrap();
    fs::write(base.join("etc/file"), "zero").unwrap();
    a.create("web", &base);
    let top = a.mount("web");
    for (round, seed) in [("one", 2), ("two", 3), ("three", 4)] {
        fs::write(top.join("etc/file"), round).unwrap();
        fs::write(top.join(round), bytes(50_000, seed)).unwrap();
        snapshot(&a, round);
    }
    a.ok(["tag", "web@snap1", "color=blue"]);
    a.ok(["protect", "web@snap2"]);
    let on_wire = |run: &dyn Fn()| {
        let before = hosts.bytes();
        run();
        hosts.bytes() - before
    };

    // As a user types it, with a pipe.
    let pipe = format!(
        "{cowl} --store {a} send web | {ssh} {server} {cowl} --store {b} receive",
        cowl = cowl.display(),
        a = a.path().display(),
        b = b.path().display(),
        ssh = hosts.ssh(),
        server = hosts.server()
    );
    let first = on_wire(&|| drop(sh(&pipe).ok()));
    assert!((4_150_000..5_500_000).contains(&first), "{first}");
    assert_eq!(described(&b), described(&a));
    for state in ["web", "web@snap0", "web@snap1", "web@snap2"] {
        assert!(tree(&b, state) == tree(&a, state), "{state}");
    }

    let copy = |args: &[&str]| -> Output {
        let mut command = a.command(["copy", "--remote", cowl.to_str().unwrap()]);
        command.args(args).env("COWL_SSH", hosts.ssh());
        run_command(command, b"").ok()
    };
    let url = hosts.url(b.path());
    // Nothing is new.
    let nothing = on_wire(&|| drop(copy(&["web", &url])));
    assert!(nothing < 60_000, "{nothing}");

    // B changes and sends back, while A also continues.
    let there = b.mount("web");
    fs::write(there.join("etc/file"), "from B").unwrap();
    fs::write(there.join("four"), bytes(100_000, 5)).unwrap();
    assert_eq!(snapshot(&b, "at B"), "snap3");
    fs::write(top.join("etc/file"), "from A").unwrap();
    assert_eq!(snapshot(&a, "at A"), "snap3");
    let own = described(&a);
    let before: Vec<_> = (0..4).map(|n| tree(&a, &format!("web@snap{n}"))).collect();
    let back = on_wire(&|| {
        let output = copy(&["--from", &url, "web"]);
        assert!(
            output.err().contains("web@snap4 was sent as snap3"),
            "{}",
            output.err()
        );
    });
    assert!((100_000..200_000).contains(&back), "{back}");
    for (n, tree_before) in before.iter().enumerate() {
        assert!(tree(&a, &format!("web@snap{n}")) == *tree_before, "snap{n}");
    }
    assert!(tree(&a, "web@snap4") == tree(&b, "web@snap3"));
    let now = described(&a);
    assert_eq!(now.len(), own.len() + 1);
    assert!(own.iter().all(|snapshot| now.contains(snapshot)));
    // A was mounted all the time; its current state is its own until it is restored.
    assert_eq!(fs::read_to_string(top.join("etc/file")).unwrap(), "from A");
    a.ok(["restore", "web", "snap4"]);
    assert_eq!(fs::read_to_string(top.join("etc/file")).unwrap(), "from B");
    for store in [&a, &b] {
        store.ok(["umount", "web"]);
        store.ok(["check", "--deep"]);
    }
}

/// Creates and mounts a file system of 32 MiB.
fn small_disk(scratch: &Scratch, name: &str) -> PathBuf {
    let (image, at) = (scratch.join("image"), scratch.make(name));
    let file = fs::File::create(&image).unwrap();
    file.set_len(32 << 20).unwrap();
    let script = "mkfs.ext4 -q -m0 \"$0\"; mount -o loop \"$0\" \"$1\"";
    let args = [
        "-euc".as_ref(),
        script.as_ref(),
        image.as_os_str(),
        at.as_os_str(),
    ];
    run("sh", args).ok();
    at
}

/// A transfer for which the disk is too small changes nothing, and its complete layers serve a smaller one.
#[test]
fn a_full_disk_interrupts_a_transfer_without_damage() {
    if !can(&[Need::Root]) {
        return;
    }
    let (a, b) = (Store::for_test(), Store::on(small_disk));
    let base = a.beside("base");
    fs::create_dir(&base).unwrap();
    fs::write(base.join("file"), bytes(6_000_000, 1)).unwrap();
    a.create("web", &base);
    snapshot(&a, "small");
    let head = a.cowl(["show", "web", "--json"]).ok().json()["head"].clone();
    fs::write(
        Path::new(head.as_str().unwrap()).join("large"),
        bytes(40_000_000, 2),
    )
    .unwrap();
    snapshot(&a, "large");
    let stream = a.cowl(["send", "web"]).ok().stdout;
    let words = [
        "No space left",
        "free some space",
        "1 of 2 layers are complete",
    ];
    b.cowl_with(["receive"], &stream).fails(1, &words);
    let list = b.cowl(["list", "--json"]).ok().json();
    assert_eq!(list["containers"], serde_json::json!([]));
    let small = a.cowl(["send", "web@snap0"]).ok().stdout;
    let received = b.cowl_with(["receive", "--json"], &small).ok().json();
    assert_eq!(
        (&received["layers"], &received["present_layers"]),
        (&0.into(), &1.into())
    );
    assert!(tree(&b, "web") == tree(&a, "web@snap0"));
    b.ok(["check", "--deep"]);
}

/// A store with a container of many files, and two snapshots: one file differs.
fn two_snapshots() -> Store {
    let store = Store::for_test();
    let base = store.beside("base");
    fs::create_dir_all(base.join("dir")).unwrap();
    for n in 0..200 {
        fs::write(base.join(format!("dir/{n}")), format!("content {n}")).unwrap();
    }
    store.create("web", &base);
    let top = store.mount("web");
    fs::write(top.join("dir/7"), "changed once").unwrap();
    snapshot(&store, "one");
    fs::write(top.join("dir/8"), "changed again").unwrap();
    snapshot(&store, "two");
    store.ok(["umount", "web"]);
    store
}

/// Mounts a snapshot at the path of each backup, and runs the backup.
fn with_snapshot<T>(store: &Store, name: &str, at: &Path, backup: impl FnOnce() -> T) -> T {
    fs::create_dir_all(at).unwrap();
    let at = at.to_str().unwrap();
    store.ok(["mount", &format!("web@{name}"), at]);
    let done = backup();
    store.ok(["umount", at]);
    done
}

#[test]
fn restic_reads_only_what_has_changed() {
    if !can_mount(&[Need::Program("restic")]) {
        return;
    }
    let store = two_snapshots();
    let at = store.beside("backup/web");
    let restic = |args: &[&str]| -> Output {
        let mut command = Command::new("restic");
        command
            .args(args)
            .env("RESTIC_REPOSITORY", store.beside("repository"))
            .env("RESTIC_PASSWORD", "secret")
            .env("RESTIC_CACHE_DIR", store.beside("cache"));
        run_command(command, b"").ok()
    };
    restic(&["init"]);
    let backup = |name: &str| -> [u64; 3] {
        with_snapshot(&store, name, &at, || {
            let output = restic(&["backup", "--json", at.to_str().unwrap()]);
            let summary = output.out().lines().last().unwrap().to_owned();
            let summary: Value = serde_json::from_str(&summary).unwrap();
            ["files_new", "files_changed", "files_unmodified"]
                .map(|field| summary[field].as_u64().unwrap())
        })
    };
    assert_eq!(backup("snap0"), [200, 0, 0]);
    assert_eq!(backup("snap1"), [0, 1, 199]);
    assert_eq!(backup("snap1"), [0, 0, 200]);
    let target = store.beside("restored");
    restic(&["restore", "latest", "--target", target.to_str().unwrap()]);
    let restored = target.join(at.strip_prefix("/").unwrap()).join("dir/8");
    assert_eq!(fs::read_to_string(restored).unwrap(), "changed again");
}

#[test]
fn borg_reads_only_what_has_changed() {
    if !can_mount(&[Need::Program("borg")]) {
        return;
    }
    let store = two_snapshots();
    let at = store.beside("backup/web");
    let repository = store.beside("repository");
    let borg = |args: &[&str]| -> Output {
        let mut command = Command::new("borg");
        command
            .args(args)
            .env("BORG_REPO", &repository)
            .env("BORG_BASE_DIR", store.beside("borg"))
            .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
        run_command(command, b"").ok()
    };
    borg(&["init", "--encryption", "none"]);
    let backup = |name: &str, archive: &str| -> [usize; 3] {
        with_snapshot(&store, name, &at, || {
            let archive = format!("::{archive}");
            let output = borg(&["create", "--list", &archive, at.to_str().unwrap()]);
            let count = |status: &str| {
                let is_file = |line: &&str| line.starts_with(status) && line.contains("/dir/");
                output.err().lines().filter(is_file).count()
            };
            ["A ", "M ", "U "].map(count)
        })
    };
    assert_eq!(backup("snap0", "first"), [200, 0, 0]);
    // The second file that is read is the one with the newest ctime of the backup before.
    assert_eq!(backup("snap1", "second"), [1, 1, 198]);
}
