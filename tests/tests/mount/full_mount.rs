//! An upper whose file system is full: errors, and everything that was there stays whole.

use std::path::PathBuf;

use cowl_tests::beside::{NEEDS, python};
use cowl_tests::command::run;
use cowl_tests::conditions::can;
use cowl_tests::mount::{Overlay, Stack};
use cowl_tests::scratch::Scratch;

/// A stack with a setuid program and a file in its lower layer, and where to mount it.
fn stack() -> (Scratch, Stack, PathBuf) {
    let scratch = Scratch::for_test();
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
    let mount_point = scratch.make("mount");
    (scratch, stack, mount_point)
}

#[test]
fn a_full_upper_layer_loses_no_data() {
    if !can(&NEEDS) {
        return;
    }
    let (scratch, stack, mount_point) = stack();
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
    let mount = Overlay::cowlfs(&stack, &mount_point, "");
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
    python(&mount_point, fill).ok();
    mount.unmount();
}
