//! Access to mounts by users of the host: none can execute setuid programs that a container's root created, and LXC
//! reaches the files of a container whose root is another user.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use cowl_tests::command::{self, Output};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::lxc::{self, Lxc};
use cowl_tests::mount::wait_until;

const NEEDS: &[Need] = &[Need::Root, Need::Fuse, Need::Program("setpriv")];

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().mode() & 0o7777
}

/// Runs a shell line as another user. The shell executes the program, because setpriv resolves the path of its
/// program with its original privileges.
fn run_as(user: u32, line: &str) -> Output {
    let id = user.to_string();
    let args = [
        "--reuid",
        &id,
        "--regid",
        &id,
        "--clear-groups",
        "sh",
        "-c",
        line,
    ];
    command::run("setpriv", args)
}

/// Returns the effective uid of a setuid copy of id(1) that another user executes; an error if that user cannot
/// execute it.
fn effective(program: &Path) -> Result<String, String> {
    let output = run_as(65_534, &format!("{} -u", program.display()));
    match output.code {
        0 => Ok(output.out()),
        _ => Err(output.err()),
    }
}

/// Creates a store whose directory all users can search, with the container web, in which `id` is setuid root.
fn world() -> Store {
    let store = Store::for_test();
    set_mode(store.scratch(), 0o755);
    let base = store.scratch().make("base");
    std::fs::copy("/usr/bin/id", base.join("id")).unwrap();
    set_mode(&base.join("id"), 0o4755);
    for dir in ["proc", "dev", "bin", "lib", "lib64"] {
        std::fs::create_dir(base.join(dir)).unwrap();
    }
    std::fs::copy("/bin/busybox", base.join("bin/sh")).unwrap();
    store.create("web", &base);
    store
}

/// Returns the flags of the mount at `mount_point`.
fn flags(mount_point: &Path) -> String {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table.lines().find(|line| {
        line.split(' ')
            .nth(4)
            .is_some_and(|at| Path::new(at) == mount_point)
    });
    line.and_then(|line| line.split(' ').nth(5))
        .map(str::to_owned)
        .unwrap()
}

fn is_nosuid(mount_point: &Path) -> bool {
    let flags = flags(mount_point);
    let has = |flag| flags.split(',').any(|one| one == flag);
    assert_eq!(has("nosuid"), has("nodev"), "{flags}");
    has("nosuid")
}

#[test]
fn other_users_cannot_access_a_container_mounted_in_the_store() {
    if !can(NEEDS) {
        return;
    }
    let store = world();
    let mount_point = store.mount("web");
    assert!(!is_nosuid(&mount_point));
    let daemon = store.daemon("web");
    let denied = |path: PathBuf| {
        let why = effective(&path).expect_err("it must not run");
        assert!(
            why.contains("Permission denied"),
            "{}: {why}",
            path.display()
        );
    };
    denied(mount_point.join("id"));
    for link in ["root", "cwd"] {
        let through = PathBuf::from(format!("/proc/{daemon}/{link}"));
        denied(through.join(mount_point.join("id").strip_prefix("/").unwrap()));
    }
    // Entering it as a working directory is denied as well.
    let inner = run_as(65_534, &format!("cd {}", mount_point.display()));
    assert_ne!(inner.code, 0, "{}", inner.report());
    for layer in std::fs::read_dir(store.path().join("layers")).unwrap() {
        denied(layer.unwrap().path().join("tree/id"));
    }
    // Users inside the container still get the program's privileges.
    assert_eq!(
        store.exec("web", "test -u /id && echo it is").out(),
        "it is"
    );

    // The first command closes a store of an older version, while a container is mounted.
    let mnt = store.path().join("mnt");
    set_mode(&mnt, 0o711);
    assert_eq!(
        effective(&mount_point.join("id")).unwrap(),
        "0",
        "the test shows nothing"
    );
    store.cowl(["list"]).ok();
    assert_eq!(mode(&mnt), 0o700);
    denied(mount_point.join("id"));
}

#[test]
fn a_mount_that_other_users_can_access_is_nosuid() {
    if !can(NEEDS) {
        return;
    }
    let store = world();
    let open = store.scratch().make("open");
    let at = |mount_point: &Path, more: &[&str]| {
        let mount_point = mount_point.to_str().unwrap();
        store.cowl([&["mount", "web", mount_point], more].concat())
    };
    let output = at(&open, &[]).ok();
    assert!(output.err().contains("--suid"), "{}", output.report());
    assert!(is_nosuid(&open));
    assert_eq!(effective(&open.join("id")).unwrap(), "65534");
    // The flags survive a restore, and a command that finds the daemon dead.
    store.cowl(["snapshot", "web"]).ok();
    store.restore("web", "snap0");
    assert!(is_nosuid(&open));
    store.kill_daemon("web");
    store.cowl(["list", "web"]).ok();
    store.cowl(["snapshot", "web"]).ok();
    assert!(is_nosuid(&open));
    // A command in the container has a mount of its own, which no other process can reach.
    let own = store.exec(
        "web",
        "while read -r line; do echo \"$line\"; done </proc/self/mountinfo",
    );
    let root = own.out();
    let root = root.lines().find(|line| line.contains(" / / ")).unwrap();
    assert!(
        !root.contains("nosuid") && !root.contains("nodev"),
        "{root}"
    );
    // A mount without `--suid` is not reported as one with it.
    at(&open, &["--suid"]).fails(4, &["already", "cowl umount web"]);
    store.cowl(["umount", "web"]).ok();

    at(&open, &["--suid"]).ok();
    assert_eq!(effective(&open.join("id")).unwrap(), "0");
    store.cowl(["umount", "web"]).ok();

    // A single private directory above is sufficient.
    let closed = store.scratch().make("closed/place");
    set_mode(closed.parent().unwrap(), 0o700);
    let output = at(&closed, &[]).ok();
    assert!(!output.err().contains("--suid"), "{}", output.report());
    assert!(!is_nosuid(&closed));
    store.cowl(["umount", "web"]).ok();
}

#[test]
fn a_mounted_snapshot_has_no_setuid_programs_and_no_devices() {
    if !can(NEEDS) {
        return;
    }
    let store = world();
    store.cowl(["snapshot", "web"]).ok();
    let mount_point = PathBuf::from(store.cowl(["mount", "web@snap0"]).ok().out());
    assert!(is_nosuid(&mount_point));
    assert!(effective(&mount_point.join("id")).is_err());
    let open = store.scratch().make("open");
    store
        .cowl(["mount", "web@snap0", open.to_str().unwrap()])
        .ok();
    assert!(is_nosuid(&open));
    assert_eq!(effective(&open.join("id")).unwrap(), "65534");
    store
        .cowl(["mount", "web@snap0", open.to_str().unwrap(), "--suid"])
        .fails(2, &["snapshot", "--suid"]);
    store.cowl(["umount", "web@snap0"]).ok();
}

/// Starts c1, whose root is uid 100000, and returns its uid 0 and host name as seen inside.
fn run_mapped(lxc: &Lxc) -> String {
    lxc.run_mapped("c1", "id -u; cat /etc/hostname")
}

#[test]
fn only_the_mapped_root_can_access_a_container_with_an_id_map() {
    let needs = [lxc::NEEDS, NEEDS, &[Need::Program("newuidmap")]].concat();
    if !can(&needs) {
        return;
    }
    let lxc = Lxc::for_test();
    set_mode(lxc.scratch(), 0o755);
    lxc.create("c1");
    set_mode(&lxc.dir("c1"), 0o755);
    let config = lxc.dir("c1").join("config");
    let plain = lxc.config("c1");
    let map = "lxc.idmap = u 0 100000 65536\nlxc.idmap = g 0 100000 65536\n\
               lxc.mount.auto = cgroup:mixed proc:mixed sys:mixed\n";
    let rootfs = lxc.dir("c1").join("rootfs");
    command::run("chown", ["-R", "100000:100000", rootfs.to_str().unwrap()]).ok();
    // Adopted before it had an id map: its config names the directory that all containers share.
    lxc.adopt("c1").ok();
    let store = lxc.store().path();
    let mnt = store.join("mnt");
    let adopted = lxc.config("c1");
    assert!(
        adopted.contains(&format!("dir:{}/", mnt.display())),
        "{adopted}"
    );
    assert!(!plain.contains("lxc.idmap"));
    std::fs::write(&config, format!("{map}{adopted}")).unwrap();
    assert_eq!(run_mapped(&lxc), "0\nc1");
    // The first start used the shared directory. From now on the container has its own, and the shared one has mode 0700.
    let moved = lxc.config("c1");
    let mapped = store.join("mapped");
    assert!(
        moved.contains(&format!("dir:{}/", mapped.display())),
        "{moved}"
    );
    assert_eq!(mode(&mnt), 0o700);
    assert_eq!(run_mapped(&lxc), "0\nc1");
    assert_eq!(mode(&mnt), 0o700);

    // Only the mapped root can enter, not even the root of another container.
    let mount_point = lxc.store().mount("c1");
    assert!(
        mount_point.starts_with(&mapped),
        "{}",
        mount_point.display()
    );
    let look = format!("test -d {}/etc", mount_point.display());
    assert_eq!(run_as(100_000, &look).code, 0);
    for other in [65_534, 200_000, 100_001] {
        assert_ne!(
            run_as(other, &look).code,
            0,
            "{other} reaches {}",
            mount_point.display()
        );
    }
    lxc.store().cowl(["umount", "c1"]).ok();
    lxc.store().cowl(["destroy", "c1", "--yes"]).ok();
    assert_eq!(std::fs::read_dir(&mapped).unwrap().count(), 0);
}

/// The user who owns a directory above the mount point replaces it while nothing is mounted, or while a command enters it.
#[test]
fn a_replaced_directory_leads_to_no_other_mount_point() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let base = store.scratch().make("base");
    std::fs::write(base.join("file"), "").unwrap();
    store.create("web", &base);
    let (above, victim) = (
        store.scratch().make("above"),
        store.scratch().make("victim"),
    );
    std::fs::create_dir(victim.join("at")).unwrap();
    std::fs::create_dir_all(above.join("dir/at")).unwrap();
    let at = above.join("dir/at");
    let mut mount = store.command(["mount", "web", at.to_str().unwrap()]);
    mount.env("COWL_KEEPER", "off");
    command::run_command(mount, b"").ok();
    store.ok(["snapshot", "web"]);
    command::run("kill", ["-9", &store.pid("web").to_string()]).ok();
    wait_until("the daemon ends", || {
        std::fs::metadata(at.join("file")).is_err()
    });
    command::run("umount", ["-l", at.to_str().unwrap()]);
    std::fs::rename(above.join("dir"), above.join("moved")).unwrap();
    std::os::unix::fs::symlink(&victim, above.join("dir")).unwrap();
    let output = store.cowl(["snapshot", "web"]);
    assert!(
        !output.err().contains("mounted again"),
        "{}",
        output.report()
    );
    assert_eq!(std::fs::read_dir(victim.join("at")).unwrap().count(), 0);
    store.ok(["mount", "web"]);
    store.ok(["umount", "web"]);
}

/// Root would open, lock and write files in it that the other user can replace at any time.
#[test]
fn a_store_of_another_user_is_refused() {
    if !can(&[Need::Root]) {
        return;
    }
    let store = Store::for_test();
    let tar = cowl_tests::rootfs::busybox_tar().expect("the busybox tar");
    let tar = tar.to_str().unwrap();
    store.cowl(["create", "web", "--from", tar]).ok();
    std::os::unix::fs::chown(store.path(), Some(1000), None).unwrap();
    for line in [&["list"][..], &["gc"], &["create", "new", "--from", tar]] {
        let refused = store.cowl(line.iter().copied());
        refused.fails(2, &["belongs to the user 1000", "sudo -u '#1000'"]);
    }
    // A store cannot be created in a directory of another user either.
    let dir = store.scratch().make("empty");
    std::os::unix::fs::chown(&dir, Some(1000), None).unwrap();
    let cowl = cowl_tests::programs::cowl();
    let create = [
        "--store",
        dir.to_str().unwrap(),
        "create",
        "new",
        "--from",
        tar,
    ];
    command::run(cowl, create).fails(2, &["belongs to the user 1000"]);
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
}
