//! Refused uses of adopt and release, with a command to run instead and without changes; and unusual directories that
//! are accepted.

use std::path::{Path, PathBuf};

use cowl_tests::command;
use cowl_tests::conditions::{Need, can};
use cowl_tests::images::Kind;
use cowl_tests::lxc::{Lxc, NEEDS};
use cowl_tests::tree::{self, Compare};

/// Creates a container's directory like those of LXC, without LXC.
fn make(lxc: &Lxc, name: &str) -> PathBuf {
    let rootfs = lxc.scratch().make(&format!("lxc/{name}/rootfs"));
    std::fs::create_dir_all(rootfs.join("etc")).unwrap();
    std::fs::write(rootfs.join("etc/file"), "content\n").unwrap();
    let config = format!("# mine\nlxc.rootfs.path = dir:{}\n", rootfs.display());
    std::fs::write(lxc.dir(name).join("config"), config).unwrap();
    rootfs
}

/// Refused with these words, and not a byte changed.
#[track_caller]
fn refused(lxc: &Lxc, name: &str, code: i32, words: &[&str]) {
    let before = tree::read(&lxc.dir(name)).unwrap();
    lxc.adopt(name).fails(code, words);
    let after = tree::read(&lxc.dir(name)).unwrap();
    tree::assert_same(name, &before, &after, Compare::IDENTICAL);
}

#[test]
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
fn invalid_adoptions_are_refused() {
    if !can(&[Need::Root]) {
        return;
    }
    let lxc = Lxc::for_test();
    let rootfs = make(&lxc, "c1");
    let store = lxc.store();
    let set = |line: &str| {
        let config = lxc.dir("c1").join("config");
        std::fs::write(config, format!("# mine\n{line}\n")).unwrap();
    };
    let plain = format!("lxc.rootfs.path = dir:{}", rootfs.display());
    lxc.adopt("c2")
        .fails(3, &["LXC container c2 does not exist", "lxc-ls"]);

    // Kinds of root filesystems that are not plain directories.
    for kind in [
        "overlay:/a:/b",
        "btrfs:/a",
        "zfs:p/a",
        "lvm:/dev/a/b",
        "loop:/a.img",
    ] {
        set(&format!("lxc.rootfs.path = {kind}"));
        let word = kind.split(':').next().unwrap();
        refused(&lxc, "c1", 1, &[word, "lxc-copy", "-B dir"]);
    }
    set("lxc.rootfs = /old/style");
    refused(&lxc, "c1", 1, &["lxc.rootfs.path", "lxc-update-config"]);
    set(&plain);

    // Overlay clones by LXC depend on it.
    let depends = lxc.dir("c1").join("lxc_snapshots");
    make(&lxc, "c9");
    std::fs::write(&depends, format!("{}\nc9\n", lxc.path().display())).unwrap();
    refused(&lxc, "c1", 1, &["depend on its files", "lxc_snapshots"]);
    std::fs::remove_file(&depends).unwrap();

    // Marks of an overlay: in a layer they would mean something.
    let white = rootfs.join("etc/white");
    command::run("mknod", [white.to_str().unwrap(), "c", "0", "0"]).ok();
    refused(&lxc, "c1", 1, &["etc/white", "cowl create NAME --from"]);
    std::fs::remove_file(&white).unwrap();

    // A process works in it.
    let mut child = std::process::Command::new("sleep")
        .arg("100")
        .current_dir(rootfs.join("etc"))
        .spawn()
        .unwrap();
    refused(&lxc, "c1", 4, &["in use by pid", &child.id().to_string()]);
    child.kill().unwrap();
    child.wait().unwrap();

    // Something is mounted in it.
    let inner = rootfs.join("etc");
    command::run("mount", ["-t", "tmpfs", "none", inner.to_str().unwrap()]).ok();
    lxc.adopt("c1").fails(4, &["mounted in", "umount"]);
    command::run("umount", [&inner]).ok();

    // Names.
    store.create("taken", &rootfs);
    let path = lxc.path().to_str().unwrap();
    store
        .cowl(["adopt", "c1", "-P", path, "--name", "taken"])
        .fails(1, &["taken already exists"]);
    store
        .cowl(["adopt", rootfs.to_str().unwrap()])
        .fails(2, &["--name NAME"]);
    store
        .cowl(["adopt", "/", "--name", "root"])
        .fails(2, &["cannot adopt the root filesystem"]);
    let inside = store.path().join("layers");
    store
        .cowl(["adopt", inside.to_str().unwrap(), "--name", "own"])
        .fails(2, &["contains the store"]);
    // The layers that were not adopted left nothing.
    store.cowl(["destroy", "taken", "--yes", "--now"]).ok();
    let layers = std::fs::read_dir(store.path().join("layers")).unwrap();
    assert_eq!(layers.count(), 0);

    lxc.adopt("c1").ok();
    lxc.adopt("c1").fails(1, &["c1 is already adopted"]);
    // Lines of cowl that a user changed are corrected, and all other lines are unchanged.
    let right = lxc.config("c1");
    let spoiled = right.replace("hook pre-start", "hook post-start") + "lxc.start.auto = 1\n";
    std::fs::write(lxc.dir("c1").join("config"), &spoiled).unwrap();
    lxc.adopt("c1").ok();
    let renewed = lxc.config("c1");
    let sorted = |text: &str| {
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&renewed), sorted(&(right + "lxc.start.auto = 1\n")));
    store.cowl(["release", "c1"]).ok();
    assert_eq!(
        lxc.config("c1"),
        format!("# mine\n{plain}\nlxc.start.auto = 1\n")
    );
}

#[test]
fn invalid_releases_are_refused() {
    if !can(&[Need::Root]) {
        return;
    }
    let lxc = Lxc::for_test();
    let rootfs = make(&lxc, "c1");
    let store = lxc.store();
    store.create("made", &rootfs);
    store
        .cowl(["release", "made"])
        .fails(2, &["not adopted", "cowl export made"]);
    lxc.adopt("c1").ok();
    store.cowl(["snapshot", "c1"]).ok();
    store
        .cowl(["release", "c1"])
        .fails(1, &["its snapshot", "--with-snapshots", "--yes"]);
    std::fs::write(rootfs.join("mine"), "not the container's\n").unwrap();
    store
        .cowl(["release", "c1", "--yes"])
        .fails(1, &["mine", "move it away"]);
    std::fs::rename(rootfs.join("mine"), lxc.scratch().join("mine")).unwrap();
    store.cowl(["release", "c1", "--yes"]).ok();
    assert_eq!(
        std::fs::read(rootfs.join("etc/file")).unwrap(),
        b"content\n"
    );
    assert!(!rootfs.join("MOVED-TO-COWL.txt").try_exists().unwrap());
}

/// Two at once, under two names: one has it, whole.
#[test]
fn a_directory_is_adopted_once() {
    if !can(&[Need::Root]) {
        return;
    }
    let lxc = Lxc::for_test();
    let rootfs = make(&lxc, "c1");
    // The second name of a file outside is pointed out.
    std::fs::hard_link(rootfs.join("etc/file"), lxc.scratch().join("second")).unwrap();
    let store = lxc.store();
    store.create("other", &rootfs);
    let path = rootfs.to_str().unwrap();
    let results: Vec<_> = std::thread::scope(|scope| {
        let start =
            |name: &'static str| scope.spawn(move || store.cowl(["adopt", path, "--name", name]));
        let started = ["a", "b", "c"].map(start);
        started
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let (done, refused): (Vec<_>, Vec<_>) =
        results.into_iter().partition(|output| output.code == 0);
    assert_eq!((done.len(), refused.len()), (1, 2));
    assert!(
        done[0].err().contains("one file has a hard link"),
        "{}",
        done[0].report()
    );
    let list = store.cowl(["list", "--no-header"]).ok().out();
    assert_eq!(list.lines().count(), 2, "{list}");
    let name = list.lines().find_map(|line| {
        let name = line.split_whitespace().next().unwrap();
        (name != "other").then(|| name.to_owned())
    });
    store.cowl(["release", &name.unwrap()]).ok();
    assert_eq!(
        std::fs::read(rootfs.join("etc/file")).unwrap(),
        b"content\n"
    );
}

/// A base layer that clones depend on is copied instead of moved.
#[test]
fn a_release_does_not_affect_clones() {
    if !can(&[Need::Root]) {
        return;
    }
    let lxc = Lxc::for_test();
    let rootfs = make(&lxc, "c1");
    let store = lxc.store();
    store
        .cowl(["adopt", rootfs.to_str().unwrap(), "--name", "web"])
        .ok();
    store.cowl(["clone", "web", "other"]).ok();
    store.cowl(["release", "web"]).ok();
    std::fs::write(rootfs.join("etc/file"), "changed\n").unwrap();
    let out = lxc.scratch().join("out");
    store
        .cowl(["export", "other", out.to_str().unwrap(), "--dir"])
        .ok();
    assert_eq!(std::fs::read(out.join("etc/file")).unwrap(), b"content\n");
}

#[test]
fn a_symlinked_root_and_a_snapshot_of_lxc_are_adopted() {
    if !can(&[Need::Root]) {
        return;
    }
    let lxc = Lxc::for_test();
    let rootfs = make(&lxc, "c1");
    let real = lxc.scratch().join("elsewhere");
    std::fs::rename(&rootfs, &real).unwrap();
    std::os::unix::fs::symlink(&real, &rootfs).unwrap();
    let snap = lxc.dir("c1").join("snaps/snap0");
    std::fs::create_dir_all(&snap).unwrap();
    let output = lxc.adopt("c1").ok().err();
    assert!(
        output.contains("elsewhere") && output.contains("lxc-snapshot"),
        "{output}"
    );
    assert!(real.join("MOVED-TO-COWL.txt").try_exists().unwrap());
    lxc.store().cowl(["release", "c1"]).ok();
    assert_eq!(std::fs::read(real.join("etc/file")).unwrap(), b"content\n");
    assert_eq!(std::fs::read_link(&rootfs).unwrap(), real);
    assert!(snap.try_exists().unwrap());
}

/// A store on the file system of the container, whether asked for or not.
#[test]
fn adopt_creates_a_store_on_the_file_system_of_the_container() {
    let needs = [NEEDS, &Kind::Ext4.needs()].concat();
    if !can(&needs) {
        return;
    }
    let lxc = Lxc::for_test();
    let image = Kind::Ext4.mount(lxc.scratch(), "other");
    let there = image.join("c1");
    std::fs::create_dir_all(there.join("etc")).unwrap();
    std::fs::write(there.join("etc/file"), "content\n").unwrap();
    let store = lxc.store();
    let word = |path: &Path| path.to_str().unwrap().to_owned();
    let elsewhere = word(&lxc.scratch().join("store2"));
    let args = [
        "adopt",
        &word(&there),
        "--name",
        "web",
        "--store-at",
        &elsewhere,
    ];
    store
        .cowl(args)
        .fails(2, &["not on the file system", "cowl create NAME --from"]);
    store.cowl(["adopt", &word(&there), "--name", "web"]).ok();
    assert!(image.join(".cowl/store.json").try_exists().unwrap());
    let list = store.cowl(["list"]).ok().out();
    assert!(list.contains("web"), "{list}");
    let mount_point = store.mount("web");
    std::fs::write(mount_point.join("etc/new"), "new\n").unwrap();
    assert_eq!(
        std::fs::read(mount_point.join("etc/file")).unwrap(),
        b"content\n"
    );
    lxc.unmounted("web");
    store.cowl(["release", "web"]).ok();
    assert_eq!(std::fs::read(there.join("etc/new")).unwrap(), b"new\n");
}

/// While a hook of the start runs, the container's monitor does not answer.
#[test]
fn a_container_whose_config_includes_a_file_starts() {
    if !can(NEEDS) {
        return;
    }
    let lxc = Lxc::for_test();
    lxc.create("c1");
    let included = lxc.scratch().join("included");
    std::fs::write(&included, "lxc.uts.name = other\n").unwrap();
    let text = format!("{}lxc.include = {}\n", lxc.config("c1"), included.display());
    std::fs::write(lxc.dir("c1").join("config"), text).unwrap();
    lxc.adopt("c1").ok();
    lxc.start("c1");
    assert_eq!(lxc.run("c1", "hostname"), "other");
    lxc.kill("c1");
    lxc.unmounted("c1");
}

/// LXC ignores a mount whose target is an absolute path in another directory than the root filesystem.
#[test]
fn mounts_with_an_absolute_target_remain() {
    if !can(NEEDS) {
        return;
    }
    let lxc = Lxc::for_test();
    lxc.create("c1");
    let data = lxc.scratch().make("data");
    std::fs::write(data.join("file"), "data\n").unwrap();
    let rootfs = lxc.dir("c1").join("rootfs");
    let entry = |target: &Path| {
        let (data, target) = (data.display(), target.display());
        format!("{data} {target} none bind,create=dir 0 0\n")
    };
    let config = lxc.config("c1") + "lxc.mount.entry = " + &entry(&rootfs.join("mnt/data"));
    let write = |text: &str| std::fs::write(lxc.dir("c1").join("config"), text).unwrap();

    // Users have to change other files themselves.
    let other = lxc.scratch().join("other");
    for line in [
        format!("lxc.mount.fstab = {}\n", other.display()),
        format!("lxc.include = {}\n", other.display()),
    ] {
        let target = rootfs.join("mnt/other");
        let text = match line.contains("fstab") {
            true => entry(&target),
            false => format!("lxc.mount.entry = {}", entry(&target)),
        };
        std::fs::write(&other, text).unwrap();
        write(&format!("{config}{line}"));
        let output = lxc.adopt("c1");
        output.fails(
            1,
            &[
                "mnt/other",
                "write the target as a relative path: mnt/other",
            ],
        );
    }

    write(&config);
    let output = lxc.adopt("c1").ok();
    assert!(
        output.err().contains("become relative: 1"),
        "{}",
        output.report()
    );
    let entries = lxc.config("c1");
    assert!(entries.contains(&entry(Path::new("mnt/data"))), "{entries}");
    lxc.start("c1");
    assert_eq!(lxc.run("c1", "cat /mnt/data/file"), "data");
    lxc.kill("c1");
    lxc.unmounted("c1");

    let store = lxc.store();
    let output = store.cowl(["rename", "c1", "c2"]).ok();
    assert!(
        output.err().contains("keeps its name"),
        "{}",
        output.report()
    );
    assert!(
        lxc.config("c1").contains("cowl release c2"),
        "{}",
        lxc.config("c1")
    );
    lxc.start("c1");
    lxc.kill("c1");
    lxc.unmounted("c2");
    let (text, path) = (lxc.config("c1"), lxc.dir("c1").join("config"));
    std::fs::remove_file(&path).unwrap();
    let output = store.cowl(["rename", "c2", "c3"]).ok();
    assert!(
        output.err().contains("still has the name c2"),
        "{}",
        output.report()
    );
    std::fs::write(&path, text).unwrap();
    store.cowl(["release", "c3"]).ok();
    assert_eq!(lxc.config("c1"), config);
}
