//! What a mount is told with `-o` and later by a remount is what it does.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::path::PathBuf;

use cowl_tests::beside::{NEEDS, python};
use cowl_tests::command::run;
use cowl_tests::conditions::can;
use cowl_tests::mount::{self, Overlay, Stack};
use cowl_tests::scratch::Scratch;

/// A stack with a setuid program, a device and a file in its lower layer, and where to mount it.
fn stack(test: &str) -> (Scratch, Stack, PathBuf) {
    let scratch = Scratch::new(test);
    let build = r#"
import shutil
shutil.copy("/usr/bin/id", "id"); os.chown("id", 0, 0); os.chmod("id", 0o4755)
os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3)); os.chmod("null", 0o666); write("file"); os.mkdir("dir"); write("dir/in")
"#;
    std::fs::set_permissions(
        &*scratch,
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    python(&scratch.make("lower"), build).ok();
    let stack = Stack {
        lowers: vec![scratch.join("lower")],
        upper: Some((scratch.make("upper"), scratch.make("work"))),
    };
    let place = scratch.make("mount");
    (scratch, stack, place)
}

/// What another user gets of the program, the device and the program as such.
const TRIED: &str = r#"
import subprocess
def run():
    got = err(lambda: subprocess.run(["./id", "-u"], capture_output=True).stdout.decode().strip())
    print("runs as", got, "device", err(lambda: os.close(os.open("null", os.O_RDWR))))
child(run, uid=1000, gid=1000)
"#;

#[test]
fn suid_dev_and_exec_are_honoured() {
    if !can("options-suid", &NEEDS) {
        return;
    }
    let (_scratch, stack, place) = stack("options-suid");
    for (options, said) in [
        ("suid,dev", "runs as 0 device None"),
        ("nosuid,dev", "runs as 1000 device None"),
        ("suid,nodev", "runs as 0 device EACCES"),
        ("nosuid,nodev,noexec", "runs as EACCES device EACCES"),
    ] {
        let mount = Overlay::cowlfs(&stack, &place, options);
        assert_eq!(python(mount.path(), TRIED).ok().out(), said, "{options}");
        mount.unmount();
    }
}

#[test]
fn names_of_the_source_and_the_type_are_honoured() {
    if !can("options-names", &NEEDS) {
        return;
    }
    let (_scratch, stack, place) = stack("options-names");
    let mount = Overlay::cowlfs(&stack, &place, "fsname=some-source,subtype=sometype");
    assert_eq!(mount::at(&place).unwrap().kind, "fuse.sometype");
    let source = run(
        "findmnt",
        ["-nro", "SOURCE"]
            .map(std::ffi::OsStr::new)
            .into_iter()
            .chain([place.as_os_str()]),
    )
    .ok();
    assert_eq!(source.out(), "some-source");
    mount.unmount();
}

const CHANGES: &str = r#"
for what, call in {"open": lambda: os.open("file", os.O_RDWR), "create": lambda: os.open("new", os.O_CREAT | os.O_RDWR), "mkdir": lambda: os.mkdir("new"),
    "unlink": lambda: os.unlink("file"), "rmdir": lambda: os.rmdir("dir"), "rename": lambda: os.rename("file", "new"), "link": lambda: os.link("file", "new"),
    "symlink": lambda: os.symlink("x", "new"), "chmod": lambda: os.chmod("file", 0), "chown": lambda: os.chown("file", 1, 1), "utime": lambda: os.utime("file"),
    "truncate": lambda: os.truncate("file", 0), "setxattr": lambda: os.setxattr("file", "user.a", b"b"), "mkfifo": lambda: os.mkfifo("new")}.items():
    assert err(call) == "EROFS", (what, err(call))
assert not os.access("file", os.W_OK) and os.access("file", os.R_OK) and read("file") == b"content"
fd = os.open("null", os.O_RDWR); os.write(fd, b"x")
"#;

#[test]
fn read_only_from_the_start_or_by_a_remount_changes_nothing() {
    if !can("options-ro", &NEEDS) {
        return;
    }
    let (scratch, stack, place) = stack("options-ro");
    for (stack, options) in [(stack.clone(), "ro,dev"), (stack.read_only(), "dev")] {
        let mount = Overlay::cowlfs(&stack, &place, options);
        python(mount.path(), CHANGES).ok();
        mount.unmount();
    }
    let mount = Overlay::cowlfs(&stack, &place, "dev");
    let remount = |how: &str| run("mount", ["-io".as_ref(), how.as_ref(), place.as_os_str()]);
    remount("remount,ro,dev").ok();
    python(mount.path(), CHANGES).ok();
    assert!(
        std::fs::read_dir(scratch.join("upper"))
            .unwrap()
            .next()
            .is_none()
    );
    remount("remount,rw,dev").ok();
    python(
        mount.path(),
        "write('file', b'new'); os.mkdir('new'); assert read('file') == b'new'",
    )
    .ok();
    mount.unmount();
}

#[test]
fn statfs_tells_of_the_file_system_that_is_written() {
    if !can("options-statfs", &NEEDS) {
        return;
    }
    let (scratch, stack, place) = stack("options-statfs");
    let small = scratch.make("small");
    run(
        "mount",
        [
            "-ttmpfs".as_ref(),
            "-osize=8m,nr_inodes=1000".as_ref(),
            "cowl-small".as_ref(),
            small.as_os_str(),
        ],
    )
    .ok();
    let stack = Stack {
        upper: Some((scratch.make("small/upper"), scratch.make("small/work"))),
        ..stack
    };
    let mount = Overlay::cowlfs(&stack, &place, "");
    let told = "s = os.statvfs('.'); print(s.f_bsize, s.f_frsize, s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_namemax)";
    assert_eq!(
        python(&place, told).ok().out(),
        python(&small, told).ok().out()
    );
    // When it is full, it is full, and what is there stays whole.
    let fill = r#"
fd = os.open("big", os.O_CREAT | os.O_WRONLY)
while (got := err(os.write, fd, b"x" * 4096)) == 4096: pass
assert got == "ENOSPC" and os.statvfs(".").f_bavail == 0, got
size = os.stat("id").st_size
assert err(os.open, "id", os.O_RDWR) == "ENOSPC" and (os.stat("id").st_size, os.stat("id").st_mode & 0o7777) == (size, 0o4755)
assert read("file") == b"content"; os.unlink("big"); os.close(fd)
# The kernel does not wait for FUSE's RELEASE, which is what frees the blocks.
deadline = time.monotonic() + 20
while os.statvfs(".").f_bavail < 1000 and time.monotonic() < deadline: time.sleep(0.001)
fd = os.open("id", os.O_RDWR); os.close(fd); assert os.stat("id").st_size == size
"#;
    python(&place, fill).ok();
    mount.unmount();
}
