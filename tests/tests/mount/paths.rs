//! Undo of changes and restore of single paths, through a real mount.

use std::io::{Read, Seek, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use cowl_tests::command::sh_in;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::random::{Generator, Side};
use cowl_tests::tree::{self, assert_tree};

const NEEDS: [Need; 2] = [Need::Root, Need::Fuse];

/// Runs random operations, and syncs all mappings at the end.
fn disturb(generator: &mut Generator, mount_point: &Path, steps: usize) {
    let mut side = Side::new(mount_point);
    let mut known = tree::Paths::default();
    for step in 0..steps {
        if step % 4 == 0 {
            known = tree::paths(mount_point).unwrap();
        }
        let caller = generator.caller(0);
        side.perform(&generator.next(&known), caller);
    }
    side.sync_mappings();
}

#[test]
fn undo_reverts_random_changes() {
    if !can(&NEEDS) {
        return;
    }
    let seeds = match std::env::var("COWL_SEED") {
        Ok(seed) => {
            let seed: u64 = seed.parse().unwrap();
            seed..seed + 1
        }
        Err(_) => 0..8,
    };
    for seed in seeds {
        eprintln!("seed {seed}");
        let store = Store::for_test();
        let base = store.scratch().make("base");
        let mut generator = Generator::new(seed);
        disturb(&mut generator, &base, 150);
        store.create("web", &base);
        let mount_point = store.mount("web");
        disturb(&mut generator, &mount_point, 50);
        store.cowl(["snapshot", "web"]).ok();
        let then = tree::read(&mount_point).unwrap();
        disturb(&mut generator, &mount_point, 120);
        let changed = tree::read(&mount_point).unwrap();
        // Through the mount.
        store.cowl(["undo", "web"]).ok();
        assert_tree("undone through the mount", &mount_point, &then);
        assert_eq!(store.cowl(["diff", "web@snap0", "web"]).ok().out(), "");
        store.cowl(["restore", "web", "--undo"]).ok();
        assert_tree("and that again", &mount_point, &changed);
        // And without one.
        store.cowl(["umount", "web"]).ok();
        store.cowl(["undo", "web", "snap0"]).ok();
        let mount_point = store.mount("web");
        assert_tree("undone without a mount", &mount_point, &then);
        store.cowl(["umount", "web"]).ok();
    }
}

/// A process in the container, killed on drop.
struct Inside(Child);

impl Drop for Inside {
    fn drop(&mut self) {
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait().map(drop)) {
            eprintln!("cannot end it: {error}");
        }
    }
}

#[test]
fn restored_paths_are_visible_to_running_programs() {
    if !can(&NEEDS) {
        return;
    }
    let store = Store::for_test();
    let base = store.scratch().make("base");
    sh_in(
        &base,
        "mkdir -p etc/conf.d var; echo good > etc/conf; echo one > etc/conf.d/one
         chown 3:4 etc/conf; chmod 640 etc/conf; setfattr -n user.note -v kept etc/conf
         setfacl -m u:1000:r etc/conf.d/one; setfacl -d -m u:1000:rwx etc/conf.d
         ln etc/conf.d/one etc/conf.d/two; touch -d '2001-02-03 04:05:06.789' etc/conf etc/conf.d",
    )
    .ok();
    store.create("web", &base);
    let mount_point = store.mount("web");
    store.cowl(["snapshot", "web"]).ok();
    let then = tree::read(&mount_point.join("etc")).unwrap();

    let mut sleeper = Command::new("sleep");
    sleeper.arg("600").current_dir(mount_point.join("var"));
    let _inside = Inside(sleeper.stdin(Stdio::null()).spawn().unwrap());
    let mut log = std::fs::File::create(mount_point.join("var/log")).unwrap();
    log.write_all(b"before ").unwrap();
    sh_in(
        &mount_point.join("etc"),
        "echo bad > conf; chmod 600 conf; rm -r conf.d; echo new > new",
    )
    .ok();
    let mut old = std::fs::File::open(mount_point.join("etc/conf")).unwrap();

    // Restoring the whole container is refused, because it is in use.
    store.cowl(["restore", "web", "snap0"]).fails(4, &["sleep"]);
    store
        .cowl(["restore", "web", "snap0", "--", "etc/new"])
        .fails(3, &["--delete"]);
    store
        .cowl(["restore", "web", "snap0", "--", "/etc/conf"])
        .ok();
    let text = |path: &str| std::fs::read_to_string(mount_point.join(path)).unwrap();
    assert_eq!(text("etc/conf"), "good\n");
    // A descriptor that was opened before refers to the old content.
    let mut content = String::new();
    old.read_to_string(&mut content).unwrap();
    assert_eq!(content, "bad\n");
    store
        .cowl(["restore", "web", "snap0", "--delete", "--", "etc"])
        .ok();
    assert_tree("a directory is restored", &mount_point.join("etc"), &then);

    // Later writes through the old descriptor go to the old file.
    log.write_all(b"after").unwrap();
    assert_eq!(text("var/log"), "before after");
    store.cowl(["undo", "web", "snap0", "--", "var"]).ok();
    log.write_all(b" the end").unwrap();
    log.rewind().unwrap();
    assert!(std::fs::symlink_metadata(mount_point.join("var/log")).is_err());
    assert_eq!(store.cowl(["diff", "web@snap0", "web"]).ok().out(), "");
    drop(log);
    drop(old);
    drop(_inside);
    // Only the last restore is undone.
    store.cowl(["restore", "web", "--undo"]).ok();
    assert_eq!(text("var/log"), "before after");
    assert_tree("nothing else", &mount_point.join("etc"), &then);
    store.cowl(["umount", "web"]).ok();
}

/// A mount inside the container is not part of the container.
#[test]
fn mounts_inside_a_container_are_not_changed() {
    if !can(&NEEDS) {
        return;
    }
    let store = Store::for_test();
    let source = store.scratch().make("source");
    std::fs::write(source.join("file"), "one").unwrap();
    store.create("web", &source);
    let mount = store.mount("web");
    store.cowl(["snapshot", "web"]).ok();
    let outside = store.scratch().make("outside");
    std::fs::write(outside.join("precious"), "data").unwrap();
    let inside = mount.join("new/data");
    std::fs::create_dir_all(&inside).unwrap();
    std::fs::write(mount.join("file"), "two").unwrap();
    cowl_tests::command::run("mount", [Path::new("--bind"), &outside, &inside]).ok();
    for args in [
        &["undo", "web"][..],
        &["restore", "web", "snap0", "--delete", "--", "new"],
    ] {
        store.cowl(args).fails(4, &["new/data", "umount"]);
    }
    // Other paths can be restored.
    store.cowl(["undo", "web", "--", "file"]).ok();
    assert_eq!(std::fs::read_to_string(mount.join("file")).unwrap(), "one");
    assert_eq!(
        std::fs::read_to_string(outside.join("precious")).unwrap(),
        "data"
    );
    cowl_tests::command::run("umount", [&inside]).ok();
    store.cowl(["undo", "web"]).ok();
    assert!(mount.join("new").symlink_metadata().is_err());
}

/// Restores a part of a renamed directory, by its old path and by its new one.
#[test]
fn part_of_a_renamed_directory_is_restored() {
    if !can(&NEEDS) {
        return;
    }
    let store = Store::for_test();
    let source = store.scratch().make("source");
    std::fs::create_dir(source.join("d")).unwrap();
    for name in ["d/x", "d/y"] {
        std::fs::write(source.join(name), name).unwrap();
    }
    store.create("web", &source);
    store.cowl(["snapshot", "web"]).ok();
    let mount = store.mount("web");
    std::fs::rename(mount.join("d"), mount.join("e")).unwrap();
    let left = format!("e/.cowl-{}", "0".repeat(32));
    std::fs::write(mount.join(&left), "left by a killed command").unwrap();
    store.cowl(["restore", "web", "snap0", "--", "d/x"]).ok();
    assert_eq!(std::fs::read_to_string(mount.join("d/x")).unwrap(), "d/x");
    assert!(mount.join("d/y").symlink_metadata().is_err());
    store
        .cowl(["restore", "web", "snap0", "--delete", "--", "e/y"])
        .ok();
    assert!(mount.join("e/y").symlink_metadata().is_err());
    assert!(mount.join(&left).symlink_metadata().is_err());
    assert_eq!(std::fs::read_to_string(mount.join("e/x")).unwrap(), "d/x");
    std::fs::write(mount.join("e/x"), "changed").unwrap();
    store
        .cowl(["restore", "web", "snap0", "--delete", "--", "e/x"])
        .ok();
    assert!(mount.join("e/x").symlink_metadata().is_err());
}
