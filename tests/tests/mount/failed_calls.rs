//! Calls that fail or change nothing leave every attribute and the layers as they are.

use std::path::Path;

use cowl_tests::beside::{Beside, Content, NEEDS};
use cowl_tests::conditions::can;

const BUILD: &str = r#"
os.mkdir("d"); write("d/file", b"x" * 5000); os.symlink("file", "d/link"); os.mkfifo("d/fifo", 0o644)
write("d/two"); os.link("d/two", "d/three"); os.mkdir("d/sub"); write("d/sub/inside"); os.mkdir("d/empty")
os.mkdir("d/empty/er"); write("d/other", mode=0o600)
os.mkdir("e"); write("e/file"); os.mkdir("e/full"); write("e/full/inside")
os.mkdir("sticky"); write("sticky/file"); os.chmod("sticky", 0o1777); os.chmod("sticky/file", 0o666)
import shutil
shutil.copy("/bin/sleep", "d/program"); os.chmod("d/program", 0o755)
os.setxattr("d/file", "user.there", b"v"); os.setxattr("d", "user.there", b"v")
os.setxattr("d/sub", DEFAULT, acl(("u", 7, -1), ("g", 5, -1), ("o", 5, -1)))
"#;

/// Each call prints its result and the objects with a changed attribute; on a plain directory there are none.
const CALLS: &str = r#"
def attributes():
    found = {}
    for top, dirs, files in os.walk("."):
        for path in [top] + [os.path.join(top, name) for name in files]:
            s = os.lstat(path)
            found[path] = (s.st_ino, s.st_mode, s.st_nlink, s.st_uid, s.st_gid, s.st_size, s.st_blocks, s.st_mtime_ns, s.st_ctime_ns)
    return found
before = attributes()
def refused(call, *args, **named):
    global before
    time.sleep(0.012)
    result = err(call, *args, **named)
    after = attributes()
    print(call.__name__, [a for a in args if not isinstance(a, bytes)], result, [path for path in after if before.get(path) != after[path]])
    before = after
CREATE, REPLACE = os.XATTR_CREATE, os.XATTR_REPLACE
BAD_ACL = acl(("u", 7, -1), ("user", 7, 5), ("g", 7, -1), ("o", 7, -1))
LONG = "n" * 256
def xattrs(path):
    refused(os.setxattr, path, "user.none", b"1", REPLACE)
    refused(os.removexattr, path, "user.none"); refused(os.removexattr, path, ACCESS)
    refused(os.removexattr, path, "trusted.none"); refused(os.removexattr, path, "security.capability")
    refused(os.setxattr, path, "system.none", b"1"); refused(os.setxattr, path, "nothing.none", b"1")
    refused(os.setxattr, path, "user.", b"1"); refused(os.setxattr, path, "user." + LONG, b"1")
    refused(os.setxattr, path, "user.big", bytes(65537)); refused(os.setxattr, path, ACCESS, BAD_ACL)
    refused(os.setxattr, path, ACCESS, b"short"); refused(os.setxattr, path, "security.capability", b"short")
for path in ("d/file", "d", "d/sub"): xattrs(path)
for path in ("d/file", "d"): refused(os.setxattr, path, "user.there", b"1", CREATE)
for path in ("d/link", "d/fifo"):
    for name in ("user.a", ACCESS, DEFAULT):
        refused(os.setxattr, path, name, b"1", follow_symlinks=False); refused(os.removexattr, path, name, follow_symlinks=False)
refused(os.setxattr, "d/file", DEFAULT, acl(("u", 7, -1), ("g", 5, -1), ("o", 5, -1)))
refused(os.removexattr, "d/file", DEFAULT); refused(os.removexattr, "d/empty", DEFAULT)

def chmod_of_a_link(): check(libc.fchmodat(os.open("d", os.O_RDONLY), b"link", 0o600, 0x100))
refused(chmod_of_a_link)
refused(os.truncate, "d/file", -1); refused(os.truncate, "d/sub", 1); refused(os.truncate, "d/fifo", 1)
refused(os.truncate, "d/file", 2**63 - 1)
refused(os.open, "d", os.O_RDWR); refused(os.open, "d/link", os.O_WRONLY | os.O_NOFOLLOW | os.O_TRUNC)
refused(os.open, "d/file", os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_TRUNC)
refused(os.open, "d/file", os.O_DIRECTORY | os.O_TRUNC | os.O_WRONLY)
refused(os.open, "d/fifo", os.O_WRONLY | os.O_NONBLOCK)
def running():
    import subprocess
    with subprocess.Popen(["d/program", "60"]) as program:
        try:
            for flags in (os.O_WRONLY, os.O_RDWR | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC): refused(os.open, "d/program", flags)
            refused(os.truncate, "d/program", 1)
        finally: program.kill()
running()

for name in ("file", "link", "sub", "fifo"):
    refused(os.mkdir, f"d/{name}"); refused(os.mkfifo, f"d/{name}"); refused(os.symlink, "x", f"d/{name}")
    refused(os.link, "e/file", f"d/{name}")
for name in (LONG, "none/x", "file/x"):
    refused(os.mkdir, f"d/{name}"); refused(os.symlink, "x", f"d/{name}"); refused(os.link, "e/file", f"d/{name}")
    refused(os.rename, "e/file", f"d/{name}"); refused(os.open, f"d/{name}", os.O_CREAT | os.O_WRONLY)
refused(os.symlink, "", "d/new"); refused(os.symlink, "x" * 4096, "d/new")
refused(os.link, "d/sub", "e/new"); refused(os.link, "d/none", "e/new"); refused(os.link, "d/two", "d/three")

refused(os.unlink, "d/none"); refused(os.unlink, "d/sub"); refused(os.unlink, "d/file/x")
refused(os.rmdir, "d/none"); refused(os.rmdir, "d/sub"); refused(os.rmdir, "d/file"); refused(os.rmdir, "d"); refused(os.rmdir, "d/empty")

refused(os.rename, "d/none", "e/new"); refused(os.rename, "d", "d/sub/new"); refused(os.rename, "d/sub", "d/file")
refused(os.rename, "d/file", "d/sub"); refused(os.rename, "d/sub", "e/full"); refused(os.rename, "d/empty", "d/sub")
refused(os.rename, "d/two", "d/three"); refused(os.rename, "d/file", "d/file"); refused(os.rename, "d", "d")
refused(renameat2, "d/file", "e/file", NOREPLACE); refused(renameat2, "d/file", "e/none", EXCHANGE)
refused(renameat2, "d/none", "e/file", EXCHANGE); refused(renameat2, "d", "d/sub", EXCHANGE); refused(renameat2, "d/sub", "d", EXCHANGE)
refused(renameat2, "d/file", "e/file", NOREPLACE | EXCHANGE); refused(renameat2, "d/file", "e/new", 1 << 8)
refused(renameat2, "d/two", "d/three", EXCHANGE)

def unprivileged():
    global before
    before = attributes()
    for path in ("d/file", "d"):
        refused(os.chmod, path, 0o777); refused(os.chown, path, 7, -1); refused(os.chown, path, -1, 7); refused(os.utime, path, ns=(1, 1))
        refused(os.utime, path); refused(os.setxattr, path, "user.a", b"1"); refused(os.removexattr, path, "user.there")
        refused(os.setxattr, path, "trusted.a", b"1"); refused(os.setxattr, path, ACCESS, acl(("u", 7, -1), ("g", 7, -1), ("o", 7, -1)))
        refused(os.setxattr, path, "security.a", b"1")
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_CREAT): refused(os.open, "d/file", flags)
    refused(os.open, "d/other", os.O_RDONLY); refused(os.truncate, "d/file", 1)
    refused(os.open, "d/new", os.O_CREAT | os.O_WRONLY); refused(os.mkdir, "d/new"); refused(os.symlink, "x", "d/new"); refused(os.mkfifo, "d/new")
    refused(os.unlink, "d/file"); refused(os.rmdir, "d/empty/er"); refused(os.rename, "d/file", "d/new"); refused(os.rename, "d/file", "e/file")
    refused(os.link, "d/file", "sticky/new"); refused(os.link, "d/other", "sticky/new"); refused(os.mknod, "sticky/new", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    refused(os.unlink, "sticky/file"); refused(os.rename, "sticky/file", "sticky/new"); refused(os.rename, "sticky/file", "d/new")
child(unprivileged, uid=1000, gid=1000)
"#;

/// Lists the objects in `dir`.
fn names(dir: &Path) -> Vec<String> {
    let mut found: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().display().to_string())
        .collect();
    found.sort();
    found
}

#[test]
fn failed_calls_copy_nothing_up_and_change_no_attribute() {
    if !can(&NEEDS) {
        return;
    }
    let beside = Beside::new(Content::Lower, BUILD);
    let output = beside.same(CALLS);
    assert!(output.lines().count() > 150, "too little was tried");
    for line in output.lines() {
        assert!(line.ends_with(" []"), "{line}");
    }
    let upper = beside.scratch.join("upper");
    assert_eq!(names(&upper), [""; 0]);
    beside.mount.unmount();
}

#[test]
fn failed_calls_change_no_attribute_of_upper_files() {
    if !can(&NEEDS) {
        return;
    }
    let beside = Beside::new(Content::Upper, BUILD);
    beside.same(CALLS);
    beside.mount.unmount();
}
