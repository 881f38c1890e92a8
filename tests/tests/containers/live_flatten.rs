//! Merging the layers of a mounted container while processes use it.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use cowl_tests::command::run_command;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::process::descriptors;
use cowl_tests::tree;

/// Returns a mounted container whose files are in the base and in three deltas.
fn layered(store: &Store) -> std::path::PathBuf {
    let base = store.scratch().make("base");
    for name in ["program", "kept", "changed", "deleted", "moved"] {
        fs::write(base.join(name), format!("base {name}")).unwrap();
    }
    fs::copy("/bin/sleep", base.join("program")).unwrap();
    for dir in ["dir/inner", "merged", "left"] {
        fs::create_dir_all(base.join(dir)).unwrap();
    }
    for number in 0..300 {
        fs::write(base.join(format!("dir/{number}")), "entry").unwrap();
    }
    store.create("web", &base);
    let root = store.mount("web");
    for round in 0..3 {
        fs::write(root.join("changed"), format!("round {round}")).unwrap();
        fs::write(root.join(format!("merged/{round}")), "new").unwrap();
        fs::write(
            root.join(format!("only{round}")),
            format!("only in {round}"),
        )
        .unwrap();
        store.ok(["snapshot", "web"]);
        store.ok(["rm", "web", &format!("snap{round}")]);
    }
    fs::rename(root.join("moved"), root.join("left/moved")).unwrap();
    root
}

fn layers(store: &Store) -> usize {
    fs::read_dir(store.path().join("layers")).unwrap().count()
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn run(program: &Path) -> Running {
    let mut command = Command::new(program);
    Running(command.arg("1000").stdin(Stdio::null()).spawn().unwrap())
}

/// Returns the properties that a process can observe through a descriptor.
///
/// A directory reports its link count only if it is in a single layer.
fn observe(file: &File) -> (u64, u64, i64, i64, i64, u64) {
    let stat = file.metadata().unwrap();
    let ctime = (stat.ctime(), stat.ctime_nsec());
    let links = if stat.is_dir() { 1 } else { stat.nlink() };
    (
        stat.ino(),
        links,
        ctime.0,
        ctime.1,
        stat.mtime(),
        stat.size(),
    )
}

#[test]
fn layers_are_merged_while_files_are_open() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    let root = layered(&store);
    let pid = store.pid("web");
    let before = tree::read(&root).unwrap();
    let opened: Vec<File> = ["kept", "changed", "only1", "merged", "dir", "left/moved"]
        .map(|name| File::open(root.join(name)).unwrap())
        .into();
    let observed: Vec<_> = opened.iter().map(observe).collect();
    let mut writer = OpenOptions::new()
        .append(true)
        .open(root.join("only0"))
        .unwrap();
    let deleted = File::open(root.join("deleted")).unwrap();
    let deleted_delta = File::open(root.join("only2")).unwrap();
    let program = run(&root.join("program"));
    let mut listing = fs::read_dir(root.join("dir")).unwrap();
    let mut listed: Vec<_> = listing.by_ref().take(100).map(Result::unwrap).collect();
    let held = descriptors(pid);

    assert_eq!(layers(&store), 5, "the base, three deltas, and the head");
    store.ok(["flatten", "web", "--base"]);
    assert_eq!(layers(&store), 2, "the merged layer and the head");
    assert_eq!(store.pid("web"), pid, "the daemon is the same");
    assert!(descriptors(pid) <= held, "the merged layers are closed");

    tree::assert_tree("after the merge", &root, &before);
    assert_eq!(opened.iter().map(observe).collect::<Vec<_>>(), observed);
    for (name, file) in ["kept", "changed", "only1"].iter().zip(&opened) {
        let mut content = Vec::new();
        (&*file).read_to_end(&mut content).unwrap();
        assert_eq!(content, fs::read(root.join(name)).unwrap(), "{name}");
    }
    writer.write_all(b", and more").unwrap();
    assert_eq!(
        fs::read_to_string(root.join("only0")).unwrap(),
        "only in 0, and more"
    );
    listed.extend(listing.map(Result::unwrap));
    assert_eq!(listed.len(), 301, "300 files and a directory");
    // Files of the merged layer can be changed, removed and run like any other.
    fs::remove_file(root.join("deleted")).unwrap();
    fs::remove_file(root.join("only2")).unwrap();
    let mut content = [0; 12];
    deleted.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(&content, b"base deleted");
    assert_eq!(deleted_delta.metadata().unwrap().nlink(), 0);
    fs::set_permissions(root.join("kept"), fs::Permissions::from_mode(0o600)).unwrap();
    drop(program);
    drop(run(&root.join("program")));
    let changed = tree::read(&root).unwrap();
    drop((opened, writer, deleted, deleted_delta, listed));
    store.ok(["umount", "web"]);
    let root = store.mount("web");
    tree::assert_tree("after a new mount", &root, &changed);
    store.ok(["check"]);
}

/// The content of such a file exists only in the old layer.
#[test]
fn layers_with_deleted_files_in_use_are_retained_until_these_are_closed() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    let root = layered(&store);
    let deleted = File::open(root.join("only1")).unwrap();
    fs::remove_file(root.join("only1")).unwrap();
    let directory = File::open(root.join("merged")).unwrap();
    fs::remove_dir_all(root.join("merged")).unwrap();
    store.ok(["flatten", "web"]);
    // The directory is in all three deltas.
    assert_eq!(layers(&store), 6);
    // Evicts the descriptors of the content.
    let others: Vec<_> = (0..300)
        .map(|number| File::open(root.join(format!("dir/{number}"))).unwrap())
        .collect();
    let mut content = [0; 9];
    deleted.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(&content, b"only in 1");
    assert_eq!(directory.metadata().unwrap().nlink(), 0);
    drop((deleted, directory, others));
    // The kernel forgets the objects some time after the last close.
    let start = std::time::Instant::now();
    while layers(&store) > 3 && start.elapsed().as_secs() < 60 {
        store.ok(["flatten", "web"]);
        store.ok(["gc"]);
    }
    assert_eq!(layers(&store), 3, "the base, the merged layer and the head");
    store.ok(["umount", "web"]);
}

/// The daemon does not record all names of a file, but none of them may lead to a second file.
#[test]
fn hard_links_are_one_file_whatever_name_is_known() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    let root = layered(&store);
    let name = |number: u32| root.join(format!("name{number}"));
    fs::write(name(0), "original").unwrap();
    for number in 1..12 {
        fs::hard_link(name(0), name(number)).unwrap();
    }
    let opened = OpenOptions::new().write(true).open(name(0)).unwrap();
    for number in (0..2).chain(4..12) {
        fs::remove_file(name(number)).unwrap();
    }
    for snapshot in ["snap3", "snap4"] {
        fs::write(root.join("changed"), snapshot).unwrap();
        store.ok(["snapshot", "web"]);
        store.ok(["rm", "web", snapshot]);
    }
    store.ok(["flatten", "web"]);
    let number = opened.metadata().unwrap().ino();
    for left in [2, 3] {
        let stat = fs::metadata(name(left)).unwrap();
        assert_eq!((stat.ino(), stat.nlink()), (number, 2), "name{left}");
    }
    opened.write_all_at(b"replaced", 0).unwrap();
    opened.sync_all().unwrap();
    drop(opened);
    for remount in [false, true] {
        if remount {
            store.ok(["umount", "web"]);
            store.ok(["mount", "web"]);
        }
        for left in [2, 3] {
            assert_eq!(fs::read(name(left)).unwrap(), b"replaced", "name{left}");
        }
    }
    store.ok(["umount", "web"]);
}

/// After a remount, only the name that was used is known; then it is removed.
#[test]
fn last_name_of_a_file_is_found_although_it_was_never_used() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    let root = layered(&store);
    fs::write(root.join("used"), "original").unwrap();
    fs::hard_link(root.join("used"), root.join("left/other")).unwrap();
    store.ok(["umount", "web"]);
    store.ok(["mount", "web"]);
    let opened = OpenOptions::new()
        .write(true)
        .open(root.join("used"))
        .unwrap();
    fs::remove_file(root.join("used")).unwrap();
    for snapshot in ["snap3", "snap4"] {
        fs::write(root.join("changed"), snapshot).unwrap();
        store.ok(["snapshot", "web"]);
        store.ok(["rm", "web", snapshot]);
    }
    store.ok(["flatten", "web"]);
    let other = root.join("left/other");
    assert_eq!(
        fs::metadata(&other).unwrap().ino(),
        opened.metadata().unwrap().ino()
    );
    opened.write_all_at(b"replaced", 0).unwrap();
    opened.sync_all().unwrap();
    drop(opened);
    assert_eq!(fs::read(&other).unwrap(), b"replaced");
    store.ok(["umount", "web"]);
    store.ok(["mount", "web"]);
    assert_eq!(fs::read(&other).unwrap(), b"replaced");
    store.ok(["umount", "web"]);
}

/// Race: an object is renamed or exchanged after its move was planned.
#[test]
fn objects_that_are_renamed_during_the_merge_retain_their_content() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    const COUNT: usize = 400;
    let store = Store::for_test();
    let base = store.scratch().make("base");
    for number in 0..COUNT {
        fs::create_dir(base.join(format!("d{number}"))).unwrap();
        fs::write(base.join(format!("d{number}/kept")), format!("{number:04}")).unwrap();
        fs::write(base.join(format!("f{number}")), format!("{number:04}")).unwrap();
    }
    store.create("web", &base);
    let root = store.mount("web");
    for round in 0..3 {
        for number in 0..COUNT {
            fs::write(root.join(format!("d{number}/{round}")), "").unwrap();
        }
        // Only the attributes are copied up, so the content stays in the layers that are merged.
        for number in 0..COUNT {
            let mode = fs::Permissions::from_mode(0o600 + round);
            fs::set_permissions(root.join(format!("f{number}")), mode).unwrap();
        }
        store.ok(["snapshot", "web"]);
        store.ok(["rm", "web", &format!("snap{round}")]);
    }
    for number in 0..COUNT {
        fs::write(root.join(format!("d{number}/new")), "").unwrap();
        let mode = fs::Permissions::from_mode(0o640);
        fs::set_permissions(root.join(format!("f{number}")), mode).unwrap();
    }
    let mut places: Vec<usize> = (0..COUNT).collect();
    let ended = AtomicBool::new(false);
    let mut renamed = 0;
    std::thread::scope(|scope| {
        let flatten = scope.spawn(|| {
            store.ok(["flatten", "web", "--base"]);
            ended.store(true, Ordering::Release);
        });
        while renamed < COUNT / 2 && !ended.load(Ordering::Acquire) {
            fs::rename(
                root.join(format!("d{renamed}")),
                root.join(format!("e{renamed}")),
            )
            .unwrap();
            let other = COUNT - 1 - renamed;
            let path = |number: usize| root.join(format!("f{number}"));
            rustix::fs::renameat_with(
                rustix::fs::CWD,
                path(renamed),
                rustix::fs::CWD,
                path(other),
                rustix::fs::RenameFlags::EXCHANGE,
            )
            .unwrap();
            places.swap(renamed, other);
            renamed += 1;
        }
        flatten.join().unwrap();
    });
    for number in 0..renamed {
        fs::rename(
            root.join(format!("e{number}")),
            root.join(format!("x{number}")),
        )
        .unwrap();
    }
    for remount in [false, true] {
        if remount {
            store.ok(["umount", "web"]);
            store.ok(["mount", "web"]);
        }
        for (number, place) in places.iter().enumerate() {
            let dir = if number < renamed { "x" } else { "d" };
            let kept = fs::read_to_string(root.join(format!("{dir}{number}/kept"))).unwrap();
            assert_eq!(kept, format!("{number:04}"));
            let content = fs::read_to_string(root.join(format!("f{number}"))).unwrap();
            assert_eq!(content, format!("{place:04}"), "f{number}");
        }
    }
    store.ok(["umount", "web"]);
}

/// A container that is never unmounted would otherwise get one layer deeper with each snapshot.
#[test]
fn a_mounted_container_stays_below_the_depth_limit() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    let root = layered(&store);
    let mut log = OpenOptions::new()
        .append(true)
        .create(true)
        .open(root.join("log"))
        .unwrap();
    for round in 0..30 {
        writeln!(log, "{round}").unwrap();
        fs::write(root.join("changed"), round.to_string()).unwrap();
        let mut snapshot = store.command(["snapshot", "web"]);
        snapshot.env("COWL_DEPTH_LIMIT", "8");
        run_command(snapshot, b"").ok();
        let status = store.cowl(["status", "web", "--json"]).ok().json();
        let depth = cowl_tests::cowl::find(&status, "layers").and_then(|n| n.as_u64());
        assert!(depth.unwrap() <= 8, "{status}");
    }
    assert_eq!(
        fs::read_to_string(root.join("log"))
            .unwrap()
            .lines()
            .count(),
        30
    );
    drop(log);
    for round in [0, 13, 29] {
        let name = format!("web@snap{}", round + 3);
        let out = store.cowl(["cat", &format!("{name}:changed")]).ok().out();
        assert_eq!(out, round.to_string(), "{name}");
    }
}
