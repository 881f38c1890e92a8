//! The main job on a real Debian root filesystem: create, mount, exec with dpkg installing packages, snapshot,
//! damage, list, diff, restore to the same and to a new name, clone, flatten, export, status, umount and destroy;
//! also after the daemon died and while processes use the mount.

use std::path::{Path, PathBuf};

use cowl_tests::command::{run, sh, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::mount::{self, wait_until};
use cowl_tests::process::Inside;
use cowl_tests::rootfs;
use cowl_tests::tree::{self, Compare, Tree, assert_tree};

const NEEDS: [Need; 3] = [Need::Root, Need::Fuse, Need::Debian];

/// Creates a store and a Debian tree with additional objects: capabilities, ACLs, xattrs, hard links across
/// directories, devices, and a hole.
fn debian() -> (Store, PathBuf) {
    let store = Store::for_test();
    let base = store.scratch().make("base");
    rootfs::unpack(&rootfs::debian_tar().unwrap(), &base).unwrap();
    sh_in(
        &base,
        "cd srv; mkdir -p deep/er shared; chmod 2775 shared; chown 1000:1001 shared
         setfacl -m u:1000:rwx,d:u:1000:rx shared; setfacl -m g:1001:r deep
         echo content > linked; ln linked deep/alias; ln linked deep/er/alias
         setfattr -n user.note -v kept linked; setfattr -n trusted.note -v kept deep
         cp linked able; setcap cap_net_bind_service=ep able; chmod 4755 deep/er
         mkfifo fifo; mknod null c 1 3; truncate -s 3M sparse; echo end >> sparse
         ln -s nowhere dangling; touch 'a name with spaces, colons: and \\'; touch \"$(printf 'bad\\377')\"
         touch -h -d '2001-02-03 04:05:06.789' dangling; touch -d '2001-02-03 04:05:06.789' able",
    )
    .ok();
    (store, base)
}

fn small(store: &Store) -> PathBuf {
    let base = store.scratch().make("small");
    sh_in(
        &base,
        "mkdir -p bin dev etc proc tmp; cp /bin/busybox bin; echo one > etc/file; ln -s busybox bin/sh",
    )
    .ok();
    base
}

#[test]
fn all_main_operations_work_on_debian() {
    if !can(&NEEDS) {
        return;
    }
    let (store, base) = debian();
    store.create("web", &base);
    let mount_point = store.mount("web");
    assert_tree(
        "the container equals the directory",
        &mount_point,
        &tree::read(&base).unwrap(),
    );
    assert!(
        store
            .exec("web", "cat /etc/os-release")
            .out()
            .contains("bookworm")
    );

    // The snapshot must contain a package that the base does not have.
    store.exec(
        "web",
        "dpkg -i /root/debs/less_*.deb && less --version && mv /srv/deep /srv/moved",
    );
    let before = tree::read(&mount_point).unwrap();
    assert_eq!(
        before[&b"srv/linked"[..].to_vec()].nlink,
        3,
        "hard links stay one file"
    );
    assert_eq!(
        store
            .cowl(["snapshot", "web", "-m", "before the upgrade"])
            .ok()
            .out(),
        "snap0"
    );
    assert_tree("a snapshot changes nothing", &mount_point, &before);

    damage(&store, &mount_point);
    let damaged = tree::read(&mount_point).unwrap();
    assert!(!tree::differences(&before, &damaged, Compare::SAME).is_empty());
    lists_and_diffs(&store);

    store.restore("web", "snap0");
    assert_tree("restored, mounted as it was", &mount_point, &before);
    assert!(
        store
            .exec("web", "less --version; ls /usr/bin | wc -l")
            .out()
            .contains("less")
    );

    // The state before the restore is an automatic snapshot, so that the restore can be undone.
    let automatic = store
        .snapshots("web")
        .into_iter()
        .find(|name| name != "snap0")
        .unwrap();
    store.restore("web", &automatic);
    assert_tree("the restore undone", &mount_point, &damaged);
    store.restore("web", "snap0");
    assert_tree("and done again", &mount_point, &before);

    copies(&store, &before);
    exported(&store, &before);
    store.cowl(["umount", "web"]).ok();
    assert!(mount::at(&mount_point).is_none());
    let mounted_anew = store.mount("web");
    assert_tree("after a new mount", &mounted_anew, &before);
    store.cowl(["umount", "web"]).ok();
    for name in ["web", "web2", "web3"] {
        store.cowl(["destroy", name, "--yes"]).ok();
    }
    assert_eq!(
        store
            .cowl(["list", "--json"])
            .ok()
            .out()
            .matches("web")
            .count(),
        0
    );
    assert!(
        mount::below(store.path()).is_empty(),
        "nothing stays mounted"
    );
}

fn damage(store: &Store, mount_point: &Path) {
    store.exec("web", "dpkg -i /root/debs/*.deb && hello");
    store.exec("web", "apt-get purge -y -qq hello 2>&1");
    store.exec(
        "web",
        "echo oops >> /etc/passwd; rm /etc/debian_version; mv /var/lib /var/library",
    );
    store.exec(
        "web",
        "mv /srv/moved /srv/shared/moved; mkdir /srv/moved; echo new > /srv/moved/new",
    );
    store.exec(
        "web",
        "chown -R 1000:1000 /root; echo more >> /srv/linked; rm /srv/null; mkdir /srv/null",
    );
    sh(&format!("rm -rf '{}/usr/bin'", mount_point.display())).ok();
}

fn lists_and_diffs(store: &Store) {
    let list = store.cowl(["list"]).ok().out();
    assert!(list.contains("web"), "{list}");
    let list = store.cowl(["list", "web"]).ok().out();
    assert!(
        list.contains("snap0") && list.contains("before the upgrade"),
        "{list}"
    );
    assert_eq!(store.snapshots("web"), ["snap0"]);
    assert!(
        store
            .cowl(["list", "--json"])
            .ok()
            .json()
            .to_string()
            .contains("\"web\"")
    );

    let diff = store.cowl(["diff", "web@snap0", "web"]).ok().out();
    let letter = |path: &str| {
        diff.lines().find_map(|line| {
            let (letter, rest) = line.split_at_checked(1)?;
            (rest.trim().trim_start_matches('/') == path).then(|| letter.to_owned())
        })
    };
    for (path, expected) in [
        ("etc/passwd", "M"),
        ("etc/debian_version", "D"),
        ("srv/moved/new", "A"),
        ("srv/null", "T"),
        ("usr/bin/ls", "D"),
    ] {
        assert_eq!(
            letter(path).as_deref(),
            Some(expected),
            "{path} in\n{diff:.3000}"
        );
    }
    assert!(
        diff.lines().any(|line| line.starts_with('R')),
        "no rename in\n{diff:.3000}"
    );
    let json = store
        .cowl(["diff", "web@snap0", "web", "--json"])
        .ok()
        .json()
        .to_string();
    assert!(json.contains("etc/passwd"));
    let nothing = store.cowl(["diff", "web@snap0", "web@snap0"]).ok();
    assert_eq!(nothing.out(), "", "a state does not differ from itself");
}

/// A new name, a clone, and flattening: all show the state, none touches the others.
fn copies(store: &Store, before: &Tree) {
    store.cowl(["restore", "web", "snap0", "web2"]).ok();
    store.cowl(["clone", "web@snap0", "web3"]).ok();
    let (two, three) = (store.mount("web2"), store.mount("web3"));
    assert_tree("restored to a new name", &two, before);
    assert_tree("a clone", &three, before);
    sh_in(
        &three,
        "rm -rf usr/share; echo three > srv/three; mv srv/moved srv/again",
    )
    .ok();
    store.cowl(["snapshot", "web3", "-m", "one"]).ok();
    sh_in(
        &three,
        "rm srv/three; mkdir usr/share; echo 4 > usr/share/four; mv srv/again srv/third",
    )
    .ok();
    store.cowl(["snapshot", "web3", "-m", "two"]).ok();
    sh_in(&three, "chmod 700 srv/third").ok();
    let state = tree::read(&three).unwrap();
    store.cowl(["flatten", "web3"]).ok();
    assert_tree("flattened while mounted", &three, &state);
    store.cowl(["umount", "web3"]).ok();
    assert_tree("flattened, a new mount", &store.mount("web3"), &state);
    assert_tree("a clone's writes stay its own", &two, before);
    for name in ["web2", "web3"] {
        store.cowl(["umount", name]).ok();
    }
}

fn exported(store: &Store, before: &Tree) {
    let compare = Compare {
        nlink: true,
        groups: true,
        exact_times: true,
        numbers: false,
    };
    for (name, flag) in [
        ("web.tar", ""),
        ("web.tar.gz", "-z"),
        ("web.tar.zst", "--zstd"),
    ] {
        let file = store.scratch().join(name);
        store
            .cowl(["export", "web@snap0", file.to_str().unwrap()])
            .ok();
        let unpacked = store.scratch().make("unpacked");
        sh(&format!(
            "tar {flag} --numeric-owner --acls --xattrs --xattrs-include='*' -xpf '{}' -C '{}'",
            file.display(),
            unpacked.display()
        ))
        .ok();
        tree::assert_same(name, &tree::read(&unpacked).unwrap(), before, compare);
        std::fs::remove_dir_all(unpacked).unwrap();
        std::fs::remove_file(file).unwrap();
    }
    let piped = store.cowl(["export", "web@snap0", "-"]).ok();
    assert_eq!(piped.stdout.len() % 512, 0, "a tar on standard output");
}

#[test]
fn a_container_is_created_from_every_kind_of_source() {
    if !can(&NEEDS) {
        return;
    }
    let (store, base) = debian();
    // The comparison ignores times of directories that tar does not preserve.
    let expected = tree::read(&base).unwrap();
    let tar = store.scratch().join("base.tar");
    sh(&format!(
        "cd '{}'; tar --numeric-owner --acls --xattrs --xattrs-include='*' --format=posix -cf '{}' .
         cd ..; gzip -1 -k base.tar; zstd -q -1 base.tar; xz -0 -T2 -k base.tar",
        base.display(),
        tar.display()
    ))
    .ok();
    for name in ["base.tar", "base.tar.gz", "base.tar.zst", "base.tar.xz"] {
        let container = name.replace("base.tar", "from");
        store.create(&container, &store.scratch().join(name));
        assert_tree(name, &store.mount(&container), &expected);
        store.cowl(["umount", &container]).ok();
        store.cowl(["destroy", &container, "--yes"]).ok();
    }
    let bytes = std::fs::read(store.scratch().join("base.tar.zst")).unwrap();
    store
        .cowl_with(["create", "piped", "--from", "-"], &bytes)
        .ok();
    assert_tree("standard input", &store.mount("piped"), &expected);
}

#[test]
fn a_mount_whose_daemon_died_is_remounted() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    store.create("web", &small(&store));
    let mount_point = store.mount("web");
    std::fs::write(mount_point.join("written"), "before the kill").unwrap();
    std::fs::rename(mount_point.join("etc"), mount_point.join("etcetera")).unwrap();
    let before = tree::read(&mount_point).unwrap();
    for next in [
        &["mount", "web"][..],
        &["snapshot", "web"],
        &["exec", "web", "--", "/bin/sh"],
    ] {
        let pid = store.pid("web");
        store.kill_daemon("web");
        wait_until("the daemon's death", || {
            std::fs::read_dir(&mount_point).is_err()
        });
        let output = store.cowl(next).ok();
        assert!(
            !output.err().is_empty(),
            "says what it found: {}",
            output.report()
        );
        assert_ne!(store.pid("web"), pid);
        assert_tree("after the kill", &store.mount("web"), &before);
    }
    store.kill_daemon("web");
    wait_until("the daemon's death", || {
        std::fs::read_dir(&mount_point).is_err()
    });
    store.cowl(["status", "web"]).ok();
    store.cowl(["umount", "web"]).ok();
    store.cowl(["destroy", "web", "--yes"]).ok();
}

#[test]
fn busy_containers_are_refused_with_pids_and_a_command() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    store.create("web", &small(&store));
    let mount_point = store.mount("web");
    store.cowl(["snapshot", "web"]).ok();
    std::fs::write(mount_point.join("later"), "later").unwrap();
    let before = tree::read(&mount_point).unwrap();
    let inside = Inside::of(&mount_point);
    let pid = inside.id().to_string();
    for refused in [
        &["restore", "web", "snap0"][..],
        &["destroy", "web", "--yes"],
        &["umount", "web"],
    ] {
        let output = store.cowl(refused).fails(4, &[&pid, "sleep"]);
        assert!(
            output.err().contains("cowl "),
            "names what to type: {}",
            output.report()
        );
        assert_tree("a refusal changes nothing", &mount_point, &before);
        assert_eq!(store.snapshots("web"), ["snap0"]);
    }
    // A snapshot does not require any process to leave the mount, not even one that writes.
    store.cowl(["snapshot", "web", "-m", "while in use"]).ok();
    let writer = std::fs::File::options()
        .write(true)
        .open(mount_point.join("later"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&writer, b"L", 0).unwrap();
    store.cowl(["snapshot", "web"]).ok();
    std::os::unix::fs::FileExt::write_all_at(&writer, b"R", 0).unwrap();
    assert_eq!(std::fs::read(mount_point.join("later")).unwrap(), b"Rater");
    drop(writer);
    drop(inside);
    store.restore("web", "snap0");
    assert!(mount_point.join("later").symlink_metadata().is_err());
}

#[test]
fn a_daemon_inherits_nothing_from_the_shell_that_mounted() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    store.create("web", &small(&store));
    let mount = format!(
        "'{}' --store '{}' mount web",
        cowl_tests::programs::cowl().display(),
        store.path().display()
    );
    // `cat` ends only when no process holds the pipe; the end of the session sends SIGHUP.
    let output = run(
        "timeout",
        [
            "20",
            "setsid",
            "-w",
            "sh",
            "-c",
            &format!("{mount} 2>&1 | cat"),
        ],
    )
    .ok();
    let mount_point = PathBuf::from(output.out());
    assert_eq!(
        std::fs::read_to_string(mount_point.join("etc/file")).unwrap(),
        "one\n"
    );

    // Mounted at a directory of the user; a second call prints the same path.
    store.cowl(["umount", "web"]).ok();
    let own = store.scratch().make("own mount");
    let args = ["mount", "web", "--at", own.to_str().unwrap()];
    assert_eq!(store.cowl(args).ok().out(), own.to_str().unwrap());
    assert_eq!(store.cowl(args).ok().out(), own.to_str().unwrap());
    assert_eq!(store.mount("web"), own);
    store.cowl(["snapshot", "web"]).ok();
    std::fs::write(own.join("new"), "").unwrap();
    store.restore("web", "snap0");
    assert!(
        mount::at(&own).is_some(),
        "remounted at the same mount point"
    );
    assert!(own.join("new").symlink_metadata().is_err());
}

#[test]
fn exec_returns_the_exit_code_of_the_program() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    store.create("web", &small(&store));
    let code = |words: &[&str]| {
        store
            .cowl(
                ["exec", "web", "--"]
                    .into_iter()
                    .chain(words.iter().copied()),
            )
            .code
    };
    assert_eq!(code(&["/bin/sh", "-c", "exit 7"]), 7);
    assert_eq!(code(&["/bin/sh", "-c", "kill -9 $$"]), 137);
    // A terminal can be made: apt wants one for its log.
    assert_eq!(code(&["/bin/sh", "-c", ": <> /dev/ptmx"]), 0);
    assert_eq!(code(&["/bin/absent"]), 127);
    assert_eq!(code(&["/etc/file"]), 126);
    assert!(
        mount::below(store.path()).is_empty(),
        "exec unmounts what it mounted"
    );
    let output = store
        .cowl_with(["exec", "web", "--", "/bin/busybox", "cat"], b"through")
        .ok();
    assert_eq!(output.out(), "through");
    // Mounted before: it stays mounted.
    let mount_point = store.mount("web");
    assert_eq!(code(&["/bin/busybox", "touch", "/made"]), 0);
    assert!(mount_point.join("made").is_file());
}
