//! LXC containers that are restored from a backup, or created from the config of another container.

use cowl_tests::conditions::can;
use cowl_tests::lxc::{Lxc, NEEDS};

/// Returns the archive of the adopted container c1, which has a snapshot and is gone afterwards.
fn backup(lxc: &Lxc) -> String {
    lxc.create("c1");
    lxc.adopt("c1").ok();
    lxc.start("c1");
    lxc.run("c1", "echo kept > /etc/written");
    lxc.store().cowl(["snapshot", "c1"]).ok();
    lxc.run("c1", "echo later > /etc/written");
    lxc.kill("c1");
    lxc.unmounted("c1");
    let archive = lxc.scratch().join("c1.tar");
    let archive = archive.to_str().unwrap().to_owned();
    let args = ["export", "c1", "--with-snapshots", &archive];
    lxc.store().cowl(args).ok();
    lxc.tool("destroy", "c1", [] as [&str; 0]).ok();
    archive
}

#[test]
fn a_backup_becomes_an_lxc_container_in_one_step() {
    if !can(NEEDS) {
        return;
    }
    let lxc = Lxc::for_test();
    let archive = backup(&lxc);
    let path = lxc.path().to_str().unwrap();
    let import = |name: &str| {
        let args = ["import", &archive, name, "--lxc", "-P", path];
        lxc.store().cowl(args)
    };
    std::fs::create_dir(lxc.dir("taken")).unwrap();
    import("taken").fails(1, &["already exists"]);
    lxc.store().cowl(["show", "taken"]).fails(3, &["taken"]);
    import("k6").ok();
    let config = lxc.config("k6");
    // One hook of each kind, and nothing of the original.
    for kind in ["pre-start", "post-stop", "destroy"] {
        let hook = format!("lxc.hook.{kind} = ");
        let count = config.lines().filter(|line| line.starts_with(&hook));
        assert_eq!(count.count(), 1, "{config}");
    }
    assert!(
        !config.contains(lxc.dir("c1").to_str().unwrap()),
        "{config}"
    );
    assert!(config.contains("lxc.uts.name = k6"), "{config}");
    lxc.start("k6");
    assert_eq!(lxc.run("k6", "cat /etc/written; hostname"), "later\nk6");
    lxc.kill("k6");
    lxc.unmounted("k6");
    let restore = ["restore", "k6", "snap0", "--with-config"];
    lxc.store().cowl(restore).ok();
    lxc.start("k6");
    assert_eq!(lxc.run("k6", "cat /etc/written"), "kept");
    lxc.kill("k6");
    lxc.unmounted("k6");
    lxc.tool("destroy", "k6", [] as [&str; 0]).ok();
    assert!(!lxc.dir("k6").try_exists().unwrap());
}

#[test]
fn an_archive_without_an_lxc_config_is_not_registered() {
    if !can(NEEDS) {
        return;
    }
    let lxc = Lxc::for_test();
    let root = lxc.scratch().make("root");
    let plain = lxc.scratch().join("plain.tar");
    let whole = lxc.scratch().join("whole.tar");
    let (root, plain, whole) = (
        root.to_str().unwrap(),
        plain.to_str().unwrap(),
        whole.to_str().unwrap(),
    );
    lxc.store().cowl(["create", "web", "--from", root]).ok();
    lxc.store().cowl(["export", "web", plain]).ok();
    lxc.store()
        .cowl(["export", "web", "--with-snapshots", whole])
        .ok();
    let import = |source: &str| lxc.store().cowl(["import", source, "k7", "--lxc"]);
    import(whole).fails(1, &["no LXC config", "cowl lxc"]);
    for source in [plain, root] {
        import(source).fails(2, &["--with-snapshots", "--config-file"]);
    }
    lxc.store().cowl(["show", "k7"]).fails(3, &["k7"]);
}

/// A config in /etc is not in the directory of its container.
#[test]
fn only_paths_of_the_original_container_are_rewritten() {
    if !can(NEEDS) {
        return;
    }
    let lxc = Lxc::for_test();
    lxc.create("c1");
    let root = lxc.scratch().make("root");
    let elsewhere = lxc.scratch().make("elsewhere");
    let (hook, file) = (elsewhere.join("hook"), elsewhere.join("c1.conf"));
    let own = lxc.dir("c1").join("fstab");
    let more = format!(
        "lxc.hook.post-stop = {}\nlxc.mount.fstab = {}\n",
        hook.display(),
        own.display()
    );
    std::fs::write(&file, lxc.config("c1") + &more).unwrap();
    let root = root.to_str().unwrap();
    lxc.store().cowl(["create", "web", "--from", root]).ok();
    let args = [
        "lxc",
        "web",
        "--config-file",
        file.to_str().unwrap(),
        "-P",
        lxc.path().to_str().unwrap(),
    ];
    lxc.store().cowl(args).ok();
    let config = lxc.config("web");
    let line = format!("lxc.hook.post-stop = {}\n", hook.display());
    assert!(config.contains(&line), "{config}");
    let line = format!(
        "lxc.mount.fstab = {}\n",
        lxc.dir("web").join("fstab").display()
    );
    assert!(config.contains(&line), "{config}");
}

/// Creates and adopts the container c1, whose config needs a hook, a table of mounts and an included file in the
/// container's directory.
fn with_files(lxc: &Lxc) {
    lxc.create("c1");
    let dir = lxc.dir("c1");
    let at = dir.display();
    std::fs::create_dir(dir.join("hooks")).unwrap();
    let write = |name: &str, text: String| std::fs::write(dir.join(name), text).unwrap();
    write(
        "hooks/mount",
        format!(
            "#!/bin/sh\necho \"$LXC_NAME\" >> {}\n",
            lxc.scratch().join("ran").display()
        ),
    );
    write(
        "fstab",
        "tmpfs srv tmpfs size=1M,create=dir 0 0\n".to_owned(),
    );
    write(
        "more.conf",
        format!("lxc.hook.mount = {at}/hooks/mount\nlxc.environment = FROM=include\n"),
    );
    cowl_tests::command::run("chmod", ["755", dir.join("hooks/mount").to_str().unwrap()]).ok();
    let more = format!("lxc.include = {at}/more.conf\nlxc.mount.fstab = {at}/fstab\n");
    std::fs::write(dir.join("config"), lxc.config("c1") + &more).unwrap();
    lxc.adopt("c1").ok();
}

#[track_caller]
fn files_work(lxc: &Lxc, name: &str) {
    let config = lxc.config(name);
    assert!(!config.contains("/lxc/c1/"), "{config}");
    lxc.start(name);
    let seen = lxc.run(
        name,
        "grep -c ' /srv tmpfs' /proc/mounts; tr '\\0' '\\n' < /proc/1/environ | grep FROM",
    );
    assert_eq!(seen, "1\nFROM=include");
    lxc.kill(name);
    lxc.unmounted(name);
    let ran = std::fs::read_to_string(lxc.scratch().join("ran")).unwrap();
    assert_eq!(ran.lines().last(), Some(name));
}

#[test]
fn copies_contain_the_files_of_the_config() {
    if !can(NEEDS) {
        return;
    }
    let lxc = Lxc::for_test();
    with_files(&lxc);
    lxc.store().cowl(["clone", "c1", "c2"]).ok();
    let archive = lxc.scratch().join("c1.tar");
    let archive = archive.to_str().unwrap();
    lxc.store()
        .cowl(["export", "c1", "--with-snapshots", archive])
        .ok();
    // Nothing of the original remains. LXC removes its whole directory.
    lxc.tool("destroy", "c1", [] as [&str; 0]).ok();
    files_work(&lxc, "c2");
    let path = lxc.path().to_str().unwrap();
    lxc.store()
        .cowl(["import", archive, "k6", "--lxc", "-P", path])
        .ok();
    files_work(&lxc, "k6");
    // A destroyed copy leaves no file, and gets its files back.
    lxc.store().cowl(["destroy", "c2", "--yes"]).ok();
    assert!(!lxc.dir("c2").try_exists().unwrap());
    lxc.store().cowl(["undelete", "c2"]).ok();
    files_work(&lxc, "c2");
    // A changed file is the user's.
    std::fs::write(lxc.dir("c2").join("fstab"), "# mine\n").unwrap();
    lxc.store().cowl(["destroy", "c2", "--yes"]).ok();
    let left: Vec<_> = std::fs::read_dir(lxc.dir("c2")).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}
