//! Copies of a mount in other mount namespaces. Unused copies block no command and nothing is killed for them; copies
//! in use, and deliberate mounts, are refused and named. A mount ends with the namespace that it was created in.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use cowl_tests::command::{self, run, run_command};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::mount::{self, Overlay, Stack, wait_until};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;

pub(crate) const NEEDS: &[Need] = &[Need::Root, Need::Fuse, Need::Program("unshare")];

/// Returns a mounted container whose only file was changed after its only snapshot.
pub(crate) fn changed(store: &Store) -> PathBuf {
    let source = store.scratch().make("source");
    std::fs::write(source.join("file"), "one\n").unwrap();
    store.create("web", &source);
    let mount_point = store.mount("web");
    store.cowl(["snapshot", "web"]).ok();
    std::fs::write(mount_point.join("file"), "changed\n").unwrap();
    mount_point
}

/// A process that reports when it is ready, and is killed when dropped.
pub(crate) struct Holder(Child);

impl Holder {
    #[track_caller]
    pub(crate) fn start(words: &[&str]) -> Holder {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "{words:?}");
        Holder(child)
    }

    /// Runs a shell line in a new mount namespace, and then waits.
    #[track_caller]
    fn in_namespace(options: &[&str], line: &str) -> Holder {
        let line = format!("{line}\necho ready; read line || true");
        let words = [&["unshare"], options, &["sh", "-euc", &line]].concat();
        Holder::start(&words)
    }

    fn id(&self) -> u32 {
        self.0.id()
    }

    #[track_caller]
    pub(crate) fn lives(&mut self) {
        assert!(self.0.try_wait().unwrap().is_none(), "it was killed");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

const PRIVATE: &[&str] = &["-m", "--propagation", "private"];
/// The options that a service manager uses for a service with private mounts.
const SERVICE: &[&str] = &["-m", "--propagation", "slave"];
/// Mounts in this namespace are locked: they cannot be unmounted individually.
pub(crate) const USER: &[&str] = &["-Urm", "--propagation", "private"];

#[track_caller]
fn wait_for_end(pid: u32) {
    wait_until("the daemon ends", || {
        // An orphan is a zombie until its parent reaps it.
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
        status.is_err() || status.is_ok_and(|status| status.contains("State:\tZ"))
    });
}

#[test]
fn unused_copies_of_a_mount_block_no_command() {
    if !can(NEEDS) {
        return;
    }
    for kinds in [&[PRIVATE, SERVICE][..], &[PRIVATE, SERVICE, USER]] {
        let store = Store::for_test();
        let mount_point = changed(&store);
        let holders = || kinds.iter().map(|kind| Holder::in_namespace(kind, ""));
        let mut held: Vec<_> = holders().collect();
        let daemon = store.pid("web");
        store.restore("web", "snap0");
        assert_eq!(std::fs::read(mount_point.join("file")).unwrap(), b"one\n");
        wait_for_end(daemon);
        held.extend(holders());
        let daemon = store.pid("web");
        store.cowl(["umount", "web"]).ok();
        assert!(mount::at(&mount_point).is_none());
        wait_for_end(daemon);
        // No layer is locked anymore.
        store.cowl(["mount", "web"]).ok();
        held.extend(holders());
        store.cowl(["destroy", "web", "--now", "--yes"]).ok();
        let left: Vec<_> = std::fs::read_dir(store.path().join("layers"))
            .unwrap()
            .collect();
        assert!(left.is_empty(), "{left:?}");
        held.iter_mut().for_each(Holder::lives);
    }
}

#[test]
fn copies_of_a_mounted_snapshot_block_no_command() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    changed(&store);
    store.cowl(["mount", "web@snap0"]).ok();
    let mut held: Vec<_> = [PRIVATE, SERVICE, USER]
        .map(|kind| Holder::in_namespace(kind, ""))
        .into();
    store.cowl(["umount", "web@snap0"]).ok();
    store.cowl(["restore", "web", "snap0"]).ok();
    store.cowl(["umount", "web"]).ok();
    // The snapshot's layers are no longer in use.
    store.cowl(["rm", "web", "snap0"]).ok();
    held.iter_mut().for_each(Holder::lives);
}

/// The pause process, which holds the namespaces of an unprivileged user's podman.
#[test]
fn the_pause_process_of_podman_blocks_no_command() {
    let needs = [NEEDS, &[Need::Program("podman"), Need::Program("setpriv")]].concat();
    if !can(&needs) {
        return;
    }
    use std::os::unix::fs::PermissionsExt;
    let store = Store::for_test();
    let mount_point = changed(&store);
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&**store.scratch(), open).unwrap();
    let home = store.scratch().make("home");
    run("chown", ["65534:65534", home.to_str().unwrap()]).ok();
    let mut podman = Command::new("setpriv");
    podman
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .args(["podman", "--events-backend", "none", "--cgroup-manager"])
        .args(["cgroupfs", "--storage-driver", "vfs", "unshare", "true"])
        .env("HOME", &home)
        .env("XDG_CONFIG_HOME", &home)
        .env("XDG_RUNTIME_DIR", &home)
        .current_dir(&home);
    run_command(podman, b"").ok();
    let pid = std::fs::read_to_string(home.join("libpod/tmp/pause.pid")).unwrap();
    let pause = Path::new("/proc").join(pid.trim());
    let copies = std::fs::read_to_string(pause.join("mountinfo")).unwrap();
    assert!(copies.contains(mount_point.to_str().unwrap()), "{copies}");
    let daemon = store.pid("web");
    store.restore("web", "snap0");
    assert_eq!(std::fs::read(mount_point.join("file")).unwrap(), b"one\n");
    wait_for_end(daemon);
    let daemon = store.pid("web");
    store.cowl(["umount", "web"]).ok();
    wait_for_end(daemon);
    assert!(pause.try_exists().unwrap(), "it was killed");
    run("kill", [pid.trim()]).ok();
}

/// A namespace that only a file holds: no process leads to it.
#[test]
fn a_copy_without_a_process_holds_no_layer() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let mount_point = changed(&store);
    // The file of a namespace cannot be in a mount that the namespace would copy.
    let dir = store.scratch().make("held");
    run("mount", ["-t", "tmpfs", "none", dir.to_str().unwrap()]).ok();
    run("mount", ["--make-private", dir.to_str().unwrap()]).ok();
    let file = dir.join("namespace");
    std::fs::write(&file, "").unwrap();
    let option = format!("--mount={}", file.display());
    // A namespace can be held only by one with a lower id. Since Linux 6.18 each CPU has ids of its own to give, so the
    // new namespace may have the lower one.
    wait_until("a namespace with a higher id", || {
        let made = run("unshare", [&option, "--propagation", "private", "true"]);
        made.code == 0 || {
            assert!(made.err().contains("Invalid argument"), "{}", made.report());
            false
        }
    });
    let daemon = store.pid("web");
    store.restore("web", "snap0");
    assert_eq!(std::fs::read(mount_point.join("file")).unwrap(), b"one\n");
    wait_for_end(daemon);
    // The namespace still exists, and its copy of the mount is dead.
    let inside = format!("--mount={}", file.display());
    let look = run(
        "nsenter",
        [inside.as_str(), "ls", mount_point.to_str().unwrap()],
    );
    assert_ne!(look.code, 0, "{}", look.report());
    run("umount", [&file]).ok();
}

/// A process that uses the mount in any way, in any namespace, is named, and nothing changes.
#[test]
fn use_in_another_namespace_is_refused_and_named() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let mount_point = changed(&store);
    let at = mount_point.display();
    std::fs::copy(
        programs::in_path("sleep").unwrap(),
        mount_point.join("sleep"),
    )
    .unwrap();
    let map = format!(
        "exec python3 -c 'import mmap, os\nfd = os.open(\"{at}/file\", os.O_RDONLY)\n\
         m = mmap.mmap(fd, 0, prot=mmap.PROT_READ)\nos.close(fd)\nprint(\"ready\", flush=True)\ninput()'"
    );
    let thread = format!(
        "exec python3 -c 'import ctypes, os, threading\ndef work():\n \
         ctypes.CDLL(None).unshare(0x200)\n os.chdir(\"{at}\")\n \
         print(\"ready\", flush=True)\n input()\nt = threading.Thread(target=work)\nt.start()\nt.join()'"
    );
    let run_it = format!("{at}/sleep 1000 & echo ready; wait");
    for (line, word) in [
        (format!("cd {at}"), "working directory"),
        (format!("exec 3< {at}/file"), "open file"),
        (format!("exec 3>> {at}/file"), "file open for writing"),
        (map, "mapped file"),
        (run_it, "program"),
        (thread, "working directory"),
    ] {
        let mut holder = Holder::in_namespace(PRIVATE, &line);
        for verb in [&["restore", "web", "snap0"][..], &["umount", "web"]] {
            let refused = store.cowl(verb.iter().copied());
            refused.fails(4, &[word, "kill"]);
        }
        holder.lives();
        // The program is a child of the holder.
        run("pkill", ["-P", &holder.id().to_string()]);
    }
    assert_eq!(
        std::fs::read(mount_point.join("file")).unwrap(),
        b"changed\n"
    );
    // A loop device is not a process.
    if can(&[Need::Program("losetup")]) {
        std::fs::write(mount_point.join("image"), vec![0; 1 << 20]).unwrap();
        let image = mount_point.join("image");
        let set_up = run("losetup", ["--find", "--show", image.to_str().unwrap()]);
        // A container may not have loop devices.
        if set_up.code == 0 {
            store.cowl(["umount", "web"]).fails(4, &["web is in use"]);
            run("losetup", ["-d", &set_up.out()]).ok();
        }
    }
    wait_until("all is let go of", || {
        store.cowl(["restore", "web", "snap0"]).code == 0
    });
    assert_eq!(std::fs::read(mount_point.join("file")).unwrap(), b"one\n");
}

/// A user that can create namespaces can hide a copy behind a file system that does not respond.
#[test]
fn an_unresponsive_namespace_delays_no_command() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let mount_point = changed(&store);
    let dir = store.scratch().make("hanging");
    let line = format!(
        "cd {dir}; mkdir -p l/sub u w m; {cowlfs} -f -o lowerdir=l,upperdir=u,workdir=w,timeout=0 m & D=$!
         while ! mountpoint -q m; do sleep 0.02; done
         mount --rbind / m/sub; test -e m/sub{mount_point}/file; umount {mount_point}; echo $D > pid
         cd /; kill -STOP $D",
        dir = dir.display(),
        cowlfs = programs::cowlfs().display(),
        mount_point = mount_point.display(),
    );
    let mut holder = Holder::in_namespace(PRIVATE, &line);
    let daemon = store.pid("web");
    store.restore("web", "snap0");
    wait_for_end(daemon);
    assert_eq!(std::fs::read(mount_point.join("file")).unwrap(), b"one\n");
    holder.lives();
    let stopped = std::fs::read_to_string(dir.join("pid")).unwrap();
    run("kill", ["-KILL", stopped.trim()]).ok();
}

/// A deliberate mount is not a mere copy: if it were detached, its users would write to the directory below.
#[test]
fn a_bind_mount_in_another_namespace_is_refused_and_named() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let mount_point = changed(&store);
    let volume = store.scratch().make("volume");
    let line = format!(
        "mount --bind {} {}",
        mount_point.display(),
        volume.display()
    );
    let holder = Holder::in_namespace(PRIVATE, &line);
    let at = volume.to_str().unwrap();
    let pid = format!("pid {}", holder.id());
    store
        .cowl(["restore", "web", "snap0"])
        .fails(4, &["mounted at", at, &pid, "kill"]);
    assert_eq!(
        std::fs::read(mount_point.join("file")).unwrap(),
        b"changed\n"
    );
    // In the caller's namespace. No test that runs at the same time can copy that namespace.
    let mut command = Command::new("nsenter");
    command.arg(format!("--mount=/proc/{}/ns/mnt", holder.id()));
    let umount = store.command(["umount", "web"]);
    command.arg(umount.get_program()).args(umount.get_args());
    command.envs(
        umount
            .get_envs()
            .filter_map(|(key, value)| Some((key, value?))),
    );
    let output = run_command(command, b"");
    assert!(!output.err().contains("kill"), "{}", output.err());
    output.fails(4, &["mounted at", at, "umount"]);
    drop(holder);
    store.cowl(["restore", "web", "snap0"]).ok();
    assert_eq!(std::fs::read(mount_point.join("file")).unwrap(), b"one\n");
}

/// A mount that is covered by another file system is not mistaken for it.
#[test]
fn a_mount_below_another_one_is_not_affected() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let mount_point = changed(&store);
    let at = mount_point.to_str().unwrap();
    run("mount", ["-t", "tmpfs", "none", at]).ok();
    store
        .cowl(["umount", "web"])
        .fails(1, &["another file system is mounted over"]);
    run("umount", [at]).ok();
    assert_eq!(
        std::fs::read(mount_point.join("file")).unwrap(),
        b"changed\n"
    );
    store.cowl(["umount", "web"]).ok();
}

/// A daemon that was started in a chroot knows its mount by a different path.
#[test]
fn a_mount_created_in_a_chroot_is_found() {
    let needs = [NEEDS, &[Need::Program("chroot")]].concat();
    if !can(&needs) {
        return;
    }
    let store = Store::for_test();
    let source = store.scratch().make("source");
    std::fs::write(source.join("file"), "one\n").unwrap();
    store.create("web", &source);
    // Bind the whole host to another directory.
    let root = store.scratch().make("root");
    let cowl = store.command(["mount", "web"]);
    let line = format!("{cowl:?}").replace('"', "'");
    let script = format!(
        "mount --rbind / {0}; mount --make-rprivate {0}; chroot {0} sh -euc \"{line}; cd /; {1}\"",
        root.display(),
        line.replace("'mount'", "'umount'"),
    );
    run("unshare", [PRIVATE, &["sh", "-euc", &script]].concat()).ok();
    // In a directory that is not a mount, and removed together with its namespace.
    let plain = store.scratch().make("plain");
    let alone = format!(
        "mkdir {0}/l {0}/m {0}/proc {0}/dev; mount --rbind /proc {0}/proc; mount --rbind /dev {0}/dev
         for dir in usr lib lib64 bin; do [ -e /$dir ] || continue
         mkdir {0}/$dir; mount --bind $(readlink -f /$dir) {0}/$dir; done
         cp {1} {0}/cowlfs; chroot {0} /cowlfs -o lowerdir=/l,fsname={2} /m
         mountpoint -q {0}/m; pgrep -f '^/cowlfs -o lowerdir=/l,fsname={2}'",
        plain.display(),
        programs::cowlfs().display(),
        store.scratch().file_name().unwrap().display(),
    );
    let output = run("unshare", [PRIVATE, &["sh", "-euc", &alone]].concat()).ok();
    wait_for_end(output.out().lines().next().unwrap().parse().unwrap());
}

/// The daemon runs in a namespace of its own, and does not hold the one that it was started in.
#[test]
fn a_mount_ends_with_the_namespace_that_created_it() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let source = store.scratch().make("source");
    std::fs::write(source.join("file"), "one\n").unwrap();
    store.create("web", &source);
    let cowl = store.command(["mount", "web"]);
    let line = format!("{cowl:?}").replace('"', "'");
    let script = format!(
        "cd \"$({line})\"; echo two > file; {} status web",
        line.rsplit_once(" 'mount'").unwrap().0
    );
    let output = run("unshare", [PRIVATE, &["sh", "-euc", &script]].concat()).ok();
    assert!(output.out().contains("mounted"), "{}", output.report());
    wait_until("the container is unmounted", || {
        store
            .cowl(["status", "web"])
            .ok()
            .out()
            .contains("not mounted")
    });
    assert_eq!(store.cowl(["cat", "web:file"]).ok().out(), "two");

    let dir = Scratch::new("namespace-end-alone");
    for name in ["l", "u", "w", "m"] {
        drop(dir.make(name));
    }
    let alone = format!(
        "cd {}; {} -o lowerdir=l,upperdir=u,workdir=w,control=sock m; echo x > m/new; \
         python3 -c 'import socket, struct\ns = socket.socket(socket.AF_UNIX)\ns.connect(\"sock\")\n\
         print(struct.unpack(\"3i\", s.getsockopt(1, 17, 12))[0])'",
        dir.display(),
        programs::cowlfs().display()
    );
    let output = run("unshare", [PRIVATE, &["sh", "-euc", &alone]].concat()).ok();
    wait_for_end(output.out().trim().parse().unwrap());
    assert_eq!(std::fs::read(dir.join("u/new")).unwrap(), b"x\n");
}

/// A daemon holds none of the mounts that existed when it was started.
#[test]
fn a_daemon_holds_no_other_mount() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let first = changed(&store);
    let other = store.scratch().make("other");
    run("mount", ["-t", "tmpfs", "none", other.to_str().unwrap()]).ok();
    store.cowl(["clone", "web", "second"]).ok();
    store.cowl(["mount", "second"]).ok();
    for name in ["web", "second"] {
        let pid = store.pid(name);
        for thread in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let table = thread.unwrap().path().join("mountinfo");
            let table = std::fs::read_to_string(table).unwrap();
            assert!(!table.contains("fuse.cowlfs"), "{name}: {table}");
            assert!(!table.contains(other.to_str().unwrap()), "{name}: {table}");
        }
    }
    // A plain umount ends the first, although the second was started after it.
    let daemon = store.pid("web");
    mount::unmount_free(&first);
    wait_for_end(daemon);
    mount::unmount_free(&other);
}

/// Commands from a namespace other than that of the mount.
#[test]
fn commands_follow_a_mount_to_its_namespace() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let source = store.scratch().make("source");
    std::fs::write(source.join("file"), "one\n").unwrap();
    store.create("web", &source);
    let mounts = |store: &Store| {
        let cowl = store.command(["mount", "web"]);
        let line = format!("{cowl:?}").replace('"', "'");
        Holder::in_namespace(PRIVATE, &format!("P=$({line}); exec 3> $P/new; exec 3>&-"))
    };
    let mut holder = mounts(&store);
    let status = store.cowl(["status", "web", "--json"]).ok().json();
    assert_eq!(status["state"], "mounted-elsewhere");
    store
        .cowl(["mount", "web"])
        .fails(4, &["another mount namespace", "cowl umount web"]);
    // It is still mounted there.
    store.cowl(["snapshot", "web"]).ok();
    store.cowl(["umount", "web"]).ok();
    holder.lives();
    drop(holder);
    assert!(store.mount("web").join("new").try_exists().unwrap());
    store.cowl(["umount", "web"]).ok();
    // A copy in use there is refused.
    let cowl = store.command(["mount", "web"]);
    let line = format!("{cowl:?}").replace('"', "'");
    let user = Holder::in_namespace(PRIVATE, &format!("cd $({line})"));
    let pid = format!("pid {}", user.id());
    store
        .cowl(["umount", "web"])
        .fails(4, &[&pid, "working directory"]);
    drop(user);
}

/// cowlfs alone, unmounted with umount(8), frees its layers for the next mount.
#[test]
fn an_unmounted_overlay_releases_its_layers() {
    if !can(NEEDS) {
        return;
    }
    let dir = Scratch::new("namespace-layers");
    let stack = Stack {
        lowers: vec![dir.make("l")],
        upper: Some((dir.make("u"), dir.make("w"))),
    };
    let mount_point = dir.make("m");
    for kind in [PRIVATE, USER] {
        let first = Overlay::cowlfs(&stack, &mount_point, "");
        let mut holder = Holder::in_namespace(kind, "");
        mount::plain_unmount(&mount_point).unwrap();
        let again = Overlay::cowlfs(&stack, &mount_point, "");
        wait_for_end(first.pid().unwrap());
        again.unmount();
        holder.lives();
    }
    // A copy in use holds them.
    let first = Overlay::cowlfs(&stack, &mount_point, "");
    let user = Holder::in_namespace(PRIVATE, &format!("cd {}", mount_point.display()));
    mount::plain_unmount(&mount_point).unwrap();
    let mut refused = Command::new(programs::cowlfs());
    refused.arg("-o").arg(stack.options("")).arg(&mount_point);
    run_command(refused, b"").fails(4, &["in use by another mount"]);
    drop(user);
    drop(first);
}

/// A signal to the daemon of a mount that is still attached ends nothing.
#[test]
fn a_check_of_a_mount_in_use_changes_nothing() {
    if !can(NEEDS) {
        return;
    }
    let dir = Scratch::new("namespace-check");
    let stack = Stack::of(&[&dir.make("l")]);
    let overlay = Overlay::cowlfs(&stack, &dir.make("m"), "");
    let mut holder = Holder::in_namespace(PRIVATE, "");
    command::run("kill", ["-USR2", &overlay.pid().unwrap().to_string()]).ok();
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(std::fs::read_dir(overlay.path()).is_ok());
    let copy = std::fs::read_to_string(format!("/proc/{}/mountinfo", holder.id())).unwrap();
    assert!(copy.contains(overlay.path().to_str().unwrap()));
    holder.lives();
    drop(holder);
    overlay.unmount();
}
