//! Containers that are mounted with kernel overlayfs (`--driver kernel`): commands, refusals, and lost records.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use cowl_tests::command::{run, run_command, sh, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::mount::{self, wait_until};

const NEEDS: &[Need] = &[Need::Root, Need::Fuse, Need::KernelOverlay];

/// Returns a store with the container `web`, whose file `a` has three names.
fn store() -> Store {
    filled(Store::for_test())
}

fn filled(store: Store) -> Store {
    let source = store.scratch().make("source");
    sh_in(
        &source,
        "echo one > a; ln a b; mkdir dir; ln a dir/c; seq 30000 > big; echo x > dir/x",
    )
    .ok();
    store.create("web", &source);
    store
}

/// Mounts `web` with the kernel driver.
fn mount_kernel(store: &Store) -> PathBuf {
    let path = PathBuf::from(
        store
            .cowl(["mount", "--driver", "kernel", "web"])
            .ok()
            .out(),
    );
    assert_eq!(kind(&path), "overlay");
    path
}

/// Returns the type of the file system at a mount point; empty if there is none.
fn kind(path: &Path) -> String {
    mount::at(path).map_or_else(String::new, |mount| mount.kind)
}

fn state(store: &Store) -> String {
    let json = store.cowl(["status", "web", "--json"]).ok().json();
    json["state"].as_str().unwrap().to_owned()
}

/// The kernel cannot be asked about a directory on such a mount.
#[test]
fn a_mount_is_in_use_also_if_the_kernel_cannot_be_asked() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    let script = r#"S=${STORE%/*}; mount --bind "$S" "$S"; "$COWL" mount --driver kernel web > at
        mount --make-unbindable "$S"; "$COWL" snapshot web 2>&1 && exit 1
        mount --make-private "$S"; mount -o remount,ro,bind "$S"; "$COWL" list 2>&1
        "$COWL" snapshot web 2>&1 && exit 1
        mount -o remount,rw,bind "$S"; "$COWL" umount web; "$COWL" snapshot web"#;
    let mut shell = Command::new("unshare");
    shell
        .args(["-m", "--propagation", "private", "sh", "-ec", script])
        .current_dir(&**store.scratch())
        .env("STORE", store.path())
        .env("COWL_STORE", store.path())
        .env("COWL", cowl_tests::programs::cowl());
    let output = run_command(shell, b"").ok().out();
    assert!(output.contains("with the driver kernel"), "{output}");
    assert!(output.ends_with("snap0"), "{output}");
}

struct Running(Child);

impl Running {
    /// Starts a process with a working directory.
    fn in_dir(dir: &Path) -> Self {
        let mut command = Command::new("sleep");
        command.arg("1000").current_dir(dir).stdin(Stdio::null());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn commands_work_on_a_container_mounted_by_the_kernel() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    let root = mount_kernel(&store);
    assert_eq!(mount_kernel(&store), root, "it stays mounted");
    let status = store.cowl(["status", "web", "--json"]).ok().json();
    assert_eq!(status["driver"], "kernel");
    assert_eq!(status["state"], "mounted");
    assert!(status["pid"].is_null());
    assert!(store.ok(["status"]).contains(" kernel "));
    assert!(store.ok(["list"]).contains(root.to_str().unwrap()));

    fs::write(root.join("new"), "text").unwrap();
    let diff = store.ok(["diff", "web"]);
    assert!(diff.contains("/new"), "{diff}");
    assert!(store.ok(["ls", "web:/"]).contains("new"));
    assert_eq!(store.ok(["cat", "web:/new"]), "text");
    store.ok(["du", "web"]);
}

#[test]
fn commands_that_need_the_daemon_are_refused() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    store.ok(["snapshot", "web"]);
    let root = mount_kernel(&store);
    fs::write(root.join("dir/x"), "text").unwrap();
    for args in [
        &["snapshot", "web"][..],
        &["restore", "web", "snap0", "--", "dir/x"],
        &["undo", "web", "--", "dir/x"],
        &["flatten", "web"],
        &["flatten", "web", "--base"],
        &["clone", "web", "copy"],
        &["stats", "web"],
        &["upgrade", "web"],
    ] {
        let output = store.cowl(args);
        assert_eq!(output.code, 4, "{args:?}: {}", output.report());
        let text = output.err();
        assert!(text.contains("with the driver kernel"), "{args:?}: {text}");
        assert!(text.contains("cowl umount web"), "{args:?}: {text}");
    }
    store.ok(["upgrade", "--all"]);
    store.refused(
        ["mount", "--driver", "fuse", "web"],
        4,
        &["already mounted with the driver kernel", "cowl umount web"],
    );
    // Without an explicit driver, any is accepted.
    assert_eq!(store.mount("web"), root);
    assert_eq!(kind(&root), "overlay");
    store.ok(["umount", "--force", "web"]);
    store.ok(["snapshot", "web"]);
    store.refused(
        ["mount", "--driver", "kernel", "web@snap0"],
        2,
        &["omit --driver"],
    );
    store.refused(["mount", "--driver", "other", "web"], 2, &["other"]);
}

#[test]
fn a_mount_in_use_is_neither_unmounted_nor_replaced() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    store.ok(["snapshot", "web"]);
    let root = mount_kernel(&store);
    fs::write(root.join("new"), "text").unwrap();
    let user = Running::in_dir(&root.join("dir"));
    for args in [
        &["umount", "web"][..],
        &["restore", "web", "snap0"],
        &["destroy", "web", "--yes"],
    ] {
        store.refused(args, 4, &["sleep: working directory", "kill "]);
        assert_eq!(kind(&root), "overlay", "{args:?}");
    }
    drop(user);
    // A process that another test starts at the moment holds a copy.
    wait_until("the restore", || {
        store.cowl(["restore", "web", "snap0"]).code == 0
    });
    assert_eq!(
        kind(&root),
        "overlay",
        "it is mounted again, by the same driver"
    );
    assert!(!root.join("new").try_exists().unwrap());
    wait_until("the end", || store.cowl(["umount", "web"]).code == 0);
    assert_eq!(state(&store), "not-mounted");
    store.refused(["umount", "web"], 1, &["not mounted"]);
    mount_kernel(&store);
    store.ok(["destroy", "web", "--yes"]);
    assert_eq!(kind(&root), "");
}

#[test]
fn exec_mounts_for_the_command_only() {
    if !can(NEEDS) || !can(&[Need::Program("busybox")]) {
        return;
    }
    let store = Store::for_test();
    store.create("web", &cowl_tests::rootfs::busybox_tar().unwrap());
    let line = "grep ' / ' /proc/mounts | tail -n1 | cut -d' ' -f3; echo x > /made";
    let args = ["exec", "--driver", "kernel", "web", "--", "sh", "-c", line];
    assert_eq!(store.ok(args), "overlay\n");
    assert_eq!(state(&store), "not-mounted");
    assert_eq!(store.ok(["cat", "web:/made"]), "x\n");
    // The setting has the same effect.
    let mut command = store.command(["exec", "web", "--", "sh", "-c", line]);
    command.env("COWL_DRIVER", "kernel");
    assert_eq!(run_command(command, b"").ok().out(), "overlay");
    let mut command = store.command(["config", "--json"]);
    command.env("COWL_DRIVER", "other");
    run_command(command, b"").fails(2, &["COWL_DRIVER", "it must be fuse or kernel"]);
}

#[test]
fn names_of_one_file_are_linked_after_the_mount_has_ended() {
    if !can(NEEDS) {
        return;
    }
    // However the mount ends.
    for end in ["cowl", "umount"] {
        let store = store();
        let root = mount_kernel(&store);
        let number = fs::metadata(root.join("a")).unwrap().ino();
        sh_in(&root, "echo two > a; rm b; ln a e").ok();
        for name in ["a", "dir/c", "e"] {
            let found = fs::metadata(root.join(name)).unwrap();
            assert_eq!((found.ino(), found.nlink()), (number, 3), "{name}");
        }
        match end {
            "cowl" => drop(store.ok(["umount", "web"])),
            _ => drop(run("umount", [root.as_os_str()]).ok()),
        }
        assert_eq!(state(&store), "not-mounted");
        // The layer is frozen.
        store.ok(["snapshot", "web"]);
        for driver in ["fuse", "kernel"] {
            store.ok(["mount", "--driver", driver, "web"]);
            for name in ["a", "dir/c", "e"] {
                let text = fs::read_to_string(root.join(name)).unwrap();
                assert_eq!(text, "two\n", "{end}, {driver}, {name}");
                let found = fs::metadata(root.join(name)).unwrap();
                assert_eq!(found.nlink(), 3, "{end}, {driver}, {name}");
            }
            sh_in(&root, "echo two > dir/c; test ! -e b; mv e f; mv f e").ok();
            let found = fs::metadata(root.join("a")).unwrap();
            assert_eq!(found.nlink(), 3, "{end}, {driver}");
            store.ok(["umount", "web"]);
        }
    }
}

#[test]
fn a_mount_without_its_records_is_not_mistaken_for_none() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    let root = mount_kernel(&store);
    fs::write(root.join("new"), "text").unwrap();
    let runs = store.run_dirs();
    assert_eq!(runs.len(), 1);
    fs::remove_dir_all(&runs[0]).unwrap();
    for args in [
        &["snapshot", "web"][..],
        &["mount", "web"],
        &["mount", "--driver", "kernel", "web"],
        &["mount", "--driver", "fuse", "web"],
        &["destroy", "web", "--yes"],
        &["umount", "web"],
    ] {
        let output = store.cowl(args);
        assert_ne!(output.code, 0, "{args:?}: {}", output.report());
    }
    let named = format!("umount {}", root.display());
    store.refused(
        ["umount", "web"],
        4,
        &["in use by a mount of kernel overlayfs", &named],
    );
    // Not even if it is unmounted and only a process still uses it.
    let user = Running::in_dir(&root);
    mount::detach(&root).unwrap();
    store.refused(
        ["snapshot", "web"],
        4,
        &["in use by a mount of kernel overlayfs"],
    );
    drop(user);
    wait_until("a snapshot", || store.cowl(["snapshot", "web"]).code == 0);
    assert_eq!(store.ok(["cat", "web@snap0:/new"]), "text");
}

#[test]
fn a_detached_mount_is_mounted_until_no_process_uses_it() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    let root = mount_kernel(&store);
    let user = Running::in_dir(&root);
    mount::detach(&root).unwrap();
    assert_eq!(state(&store), "mounted-elsewhere");
    store.refused(["snapshot", "web"], 4, &["driver kernel"]);
    store.refused(["umount", "web"], 4, &["sleep: working directory"]);
    drop(user);
    wait_until("the end", || state(&store) == "not-mounted");
    store.ok(["mount", "web"]);
    assert_eq!(kind(&root), "fuse.cowlfs");
}

#[test]
fn a_mount_in_another_namespace_is_found_and_ended() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    let other = Running({
        let mut command = store.command(["mount", "--driver", "kernel", "web"]);
        let program = command.get_program().to_owned();
        let args: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        command = Command::new("unshare");
        command
            .args(["-m", "sh", "-c", "\"$@\" && exec sleep 1000", "sh"])
            .arg(program)
            .args(args)
            .stdout(Stdio::null());
        command.spawn().unwrap()
    });
    wait_until("the mount", || state(&store) == "mounted-elsewhere");
    store.refused(["snapshot", "web"], 4, &["driver kernel"]);
    store.ok(["umount", "web"]);
    assert_eq!(state(&store), "not-mounted");
    store.ok(["snapshot", "web"]);
    drop(other);
}

#[test]
fn layers_that_the_kernel_cannot_read_are_refused() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    let root = store.mount("web");
    sh_in(&root, "mknod dir/zero c 0 0").ok();
    store.ok(["umount", "web"]);
    store.refused(
        ["mount", "--driver", "kernel", "web"],
        1,
        &[
            "/dir contains character devices with the number 0:0",
            "--driver fuse",
        ],
    );
    assert_eq!(state(&store), "not-mounted");
    assert_eq!(store.mount("web"), root);
    sh_in(&root, "rm dir/zero; rmdir dir 2> /dev/null || rm -r dir").ok();
    store.ok(["umount", "web"]);
    mount_kernel(&store);
}

#[test]
fn a_file_system_that_the_kernel_cannot_use_is_named() {
    if !can(NEEDS) {
        return;
    }
    let scratch = cowl_tests::scratch::Scratch::for_test();
    let below = mount::Stack {
        lowers: vec![scratch.make("lower")],
        upper: Some((scratch.make("upper"), scratch.make("work"))),
    };
    let overlay = mount::Overlay::kernel(&below, &scratch.make("own"));
    let store = filled(Store::in_scratch(cowl_tests::scratch::Scratch::new_in(
        overlay.path(),
        "store",
    )));
    let named = store.path().to_str().unwrap().to_owned();
    store.refused(
        ["mount", "--driver", "kernel", "web"],
        1,
        &["the kernel refuses to mount web", &named, "--driver fuse"],
    );
    assert_eq!(state(&store), "not-mounted");
    drop(store);
    overlay.unmount();
}

#[test]
fn the_mount_has_the_same_flags_as_one_of_the_daemon() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    let dir = store.scratch().make("open to all");
    sh(&format!("chmod 755 '{}'", dir.display())).ok();
    let flags = |args: &[&str]| {
        let path = dir.to_str().unwrap();
        let args = [&["mount", "web", path], args].concat();
        store.cowl(&args).ok();
        let text = fs::read_to_string("/proc/self/mounts").unwrap();
        let path = path.replace(' ', "\\040");
        let line = text
            .lines()
            .find(|line| line.split(' ').nth(1) == Some(&path));
        let flags = line.unwrap().split(' ').nth(3).unwrap();
        let known = ["nosuid", "nodev", "noexec", "ro"];
        let found: Vec<_> = flags
            .split(',')
            .filter(|flag| known.contains(flag))
            .collect();
        let found = found.join(",");
        store.ok(["umount", "web"]);
        found
    };
    for more in [&[][..], &["--suid"], &["--nosuid"]] {
        let kernel = flags(&[&["--driver", "kernel"], more].concat());
        assert_eq!(kernel, flags(more), "{more:?}");
    }
}

#[test]
fn a_store_with_an_odd_path_and_many_layers_is_mounted() {
    if !can(NEEDS) {
        return;
    }
    let scratch = cowl_tests::scratch::Scratch::new("kernel,a=b:c\\d");
    let store = filled(Store::in_scratch(scratch));
    let command = |args: &[&str]| {
        let mut command = store.command(args);
        command.env("COWL_DEPTH_LIMIT", "500");
        run_command(command, b"").ok()
    };
    command(&["mount", "web"]);
    let root = store.mount("web");
    for number in 0..40 {
        fs::write(root.join(format!("new{number}")), "text").unwrap();
        command(&["snapshot", "--no-sync", "web"]);
    }
    command(&["umount", "web"]);
    command(&["mount", "--driver", "kernel", "web"]);
    assert_eq!(kind(&root), "overlay");
    for number in 0..40 {
        assert!(root.join(format!("new{number}")).try_exists().unwrap());
    }
    command(&["umount", "web"]);
}

#[test]
fn an_ephemeral_container_ends_with_its_mount() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    store.ok(["snapshot", "web"]);
    store.ok(["clone", "--ephemeral", "web@snap0", "once"]);
    let root = PathBuf::from(
        store
            .cowl(["mount", "--driver", "kernel", "once"])
            .ok()
            .out(),
    );
    run("umount", [root.as_os_str()]).ok();
    // As after any end that cowl has not caused, the next command that opens the container removes it.
    store.ok(["status"]);
    assert!(!store.ok(["list"]).contains("once"));
}
