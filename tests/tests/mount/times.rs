//! The three times: their range, their nanoseconds, and the operations that change them, compared with a plain
//! directory.

use cowl_tests::beside::{Beside, Content, NEEDS, beside, beside_lower};
use cowl_tests::conditions::can;

const STAMPS: &str = r#"
G = 1_000_000_000
# ext4 stores times from 1901 to 2446. It clamps times outside this range; cowlfs does not.
STAMPS = (0, 1, -1, -G, -G - 1, -G + 1, -1_500_000_001, -(1 << 31) * G, -(1 << 31) * G + 5, (1 << 31) * G - 1,
          (1 << 31) * G, (1 << 32) * G + 999_999_999, 4_102_444_800 * G + 123_456_789,
          15_032_385_535 * G, 16_000_000_000 * G, -3_000_000_000 * G, 1_700_000_000 * G + 7)
def stamp(path, at): os.utime(path, ns=(at, STAMPS[0] - at if abs(at) < 2 * G else at), follow_symlinks=False)
def fill():
    for i, at in enumerate(STAMPS):
        write(f"f{i}"); os.mkdir(f"d{i}"); os.symlink("x", f"l{i}"); os.mkfifo(f"p{i}")
        for kind in "fdlp": stamp(f"{kind}{i}", at)
def show():
    for i in range(len(STAMPS)):
        for kind in "fdlp": print(kind, STAMPS[i], times(f"{kind}{i}")[:2])
"#;

#[test]
fn times_before_1970_and_after_2038_retain_nanoseconds() {
    if !can(&NEEDS) {
        return;
    }
    for content in [Content::Lower, Content::Upper] {
        let beside = Beside::new(content, &format!("{STAMPS}fill()"));
        let before = beside.same(&format!("{STAMPS}show()"));
        // A change of something else copies up; the times come along.
        let changed = beside.same(&format!(
            "{STAMPS}
for i in range(len(STAMPS)):
    for kind in 'fdlp': os.chown(f'{{kind}}{{i}}', 1, 1, follow_symlinks=False)
show()"
        ));
        assert_eq!(before, changed);
        beside.same(&format!(
            "{STAMPS}
for i in range(len(STAMPS)):
    for kind in 'fdlp': stamp(f'{{kind}}{{i}}', STAMPS[-1 - i])
show()"
        ));
        let before = beside.same(&format!("{STAMPS}show()"));
        let again = beside.remounted();
        assert_eq!(again.same(&format!("{STAMPS}show()")), before);
    }
}

#[test]
fn the_first_and_last_representable_times_work() {
    beside(
        "for name in 'abcdefgh': write(name)",
        r#"
ends = [-2**63, -2**63 + 1, 2**63 - 1, -2**62]
for name, (seconds, part) in zip("abcdefgh", [(s, p) for s in ends for p in (0, 999_999_999)]):
    print(name, err(lambda: os.utime(name, ns=(seconds * 10**9 + part, seconds * 10**9 + part))))
    seen = os.stat(name); print(seen.st_atime_ns, seen.st_mtime_ns)
"#,
    );
}

#[test]
fn each_operation_updates_the_correct_times() {
    beside(
        r#"
for name in ("file", "two", "gone"): write(name)
os.link("two", "three"); os.mkdir("dir"); os.mkdir("dir/sub"); write("dir/file"); os.symlink("x", "link"); os.mkfifo("fifo")
os.setxattr("file", "user.gone", b"x")
os.mkdir("other"); write("over"); write("under")
# Later than everything else: reading moves no access time.
late = time.time_ns() + 3600 * 1_000_000_000
for name in os.listdir("."): os.utime(name, ns=(late, 5), follow_symlinks=False)
"#,
        r#"
def show(what, path, change): print(what, path, moved(path, change))
def opened(path, use):
    fd = os.open(path, os.O_RDWR)
    try: use(fd)
    finally: os.close(fd)
show("stat", "file", lambda: os.stat("file"))
show("open", "file", lambda: opened("file", lambda fd: None))
for path in ("file", "dir"):
    show("chmod", path, lambda: os.chmod(path, 0o711)); show("chmod same", path, lambda: os.chmod(path, 0o711))
    show("chown", path, lambda: os.chown(path, 1, 1)); show("chown none", path, lambda: os.chown(path, -1, -1))
    show("setxattr", path, lambda: os.setxattr(path, "user.a", b"1"))
    show("setxattr again", path, lambda: os.setxattr(path, "user.a", b"1"))
    show("removexattr", path, lambda: os.removexattr(path, "user.a"))
    show("setfacl", path, lambda: os.setxattr(path, ACCESS, acl(("u", 7, -1), ("user", 1, 1), ("g", 1, -1), ("mask", 1, -1), ("o", 2, -1))))
    show("no such attribute", path, lambda: err(os.removexattr, path, "user.none"))
    show("utime", path, lambda: os.utime(path, ns=(5, 5))); show("touch", path, lambda: os.utime(path))
show("chown", "link", lambda: os.chown("link", 1, 1, follow_symlinks=False))
show("utime", "link", lambda: os.utime("link", ns=(5, 5), follow_symlinks=False))
show("chmod", "fifo", lambda: os.chmod("fifo", 0o600))
show("write", "file", lambda: opened("file", lambda fd: os.write(fd, b"x")))
show("write nothing", "file", lambda: opened("file", lambda fd: os.write(fd, b"")))
show("truncate", "file", lambda: os.truncate("file", 3)); show("truncate same", "file", lambda: os.truncate("file", 3))
show("ftruncate same", "file", lambda: opened("file", lambda fd: os.ftruncate(fd, 3)))
show("allocate", "file", lambda: opened("file", lambda fd: fallocate(fd, 0, 0, 9000)))
show("punch", "file", lambda: opened("file", lambda fd: fallocate(fd, 3, 0, 4096)))
show("open for cutting", "file", lambda: os.close(os.open("file", os.O_WRONLY | os.O_TRUNC)))
show("link", "two", lambda: os.link("two", "four")); show("link", ".", lambda: os.link("two", "five"))
show("unlink of one name", "two", lambda: os.unlink("three")); show("unlink", ".", lambda: os.unlink("five"))
show("rename", "four", lambda: (os.rename("two", "six"), os.rename("six", "two")))
show("rename into", "dir", lambda: os.rename("two", "dir/two"))
show("rename out of", "dir", lambda: os.rename("dir/two", "two"))
show("rename over", "under", lambda: os.rename("over", "under"))
def renamed(path):
    before = times(path); time.sleep(0.012); os.rename(path, path + "2")
    print("rename", path, [a != b for a, b in zip(before, times(path + "2"))])
renamed("dir"); os.rename("dir2", "dir"); renamed("link"); renamed("fifo")
show("create", "dir", lambda: write("dir/new")); show("overwrite", "dir", lambda: write("dir/new"))
show("mkdir", "dir", lambda: os.mkdir("dir/newdir")); show("rmdir", "dir", lambda: os.rmdir("dir/newdir"))
show("symlink", "dir", lambda: os.symlink("x", "dir/l")); show("mkfifo", "dir", lambda: os.mkfifo("dir/p"))
show("change inside", "dir", lambda: os.chmod("dir/file", 0o600))
show("change deeper inside", ".", lambda: os.chmod("dir/sub", 0o700))
show("failed mkdir", "dir", lambda: err(os.mkdir, "dir/sub")); show("failed rmdir", ".", lambda: err(os.rmdir, "dir"))
show("failed create", "dir", lambda: err(os.open, "dir/file", os.O_CREAT | os.O_EXCL))
fd = os.open("gone", os.O_RDWR)
before = os.fstat(fd).st_ctime_ns; time.sleep(0.012); os.unlink("gone")
print("unlink of an open file", os.fstat(fd).st_ctime_ns > before)
print(moved("file", lambda: err(os.setxattr, "file", "user.a", b"", os.XATTR_REPLACE)))
"#,
    );
}

#[test]
fn a_store_through_a_mapping_updates_mtime_and_ctime() {
    beside(
        "write('file', b'x' * 8192); write('old', b'x' * 8192); os.utime('old', ns=(5, 5))",
        r#"
for path in ("file", "old"):
    fd = os.open(path, os.O_RDWR)
    os.utime(path, ns=(time.time_ns() + 3600 * 1_000_000_000, 5))
    with mmap.mmap(fd, 8192) as m:
        def store(): m[5000:5001] = b"y"; m.flush()
        os.fstat(fd)
        names = moved(path, store); print(names); assert "mtime" in names and "ctime" in names
        assert read(path)[5000:5001] == b"y"
        names = moved(path, store); print(names); assert "mtime" in names
        os.close(fd)
        # The mapping outlives its descriptor.
        names = moved(path, store); print(names); assert "mtime" in names and "ctime" in names
    print(of(path))
"#,
    );
}

#[test]
fn access_times_of_upper_files_change_as_on_the_base() {
    if !can(&NEEDS) {
        return;
    }
    let build = "write('file', b'x' * 100); os.mkdir('dir'); write('dir/a')";
    let beside = Beside::new(Content::Upper, build);
    beside.same(
        r#"
G = 1_000_000_000
now = int(time.time()) * G
# relatime: a read updates an atime that is not later than mtime, or older than a day.
for name, change in (("file", lambda: read("file")), ("dir", lambda: os.listdir("dir"))):
    for atime, mtime in ((now - 100 * G, now - 50 * G), (now - 50 * G, now - 100 * G), (now - 90000 * G, now - 100000 * G)):
        os.utime(name, ns=(atime, mtime), follow_symlinks=False)
        # Drop the page cache: the kernel serves cached pages without a request.
        fd = os.open("file", os.O_RDONLY); os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED); os.close(fd)
        before = os.stat(name, follow_symlinks=False).st_atime_ns
        change()
        after = os.stat(name, follow_symlinks=False).st_atime_ns
        print(name, atime < mtime, before != after)
fd = os.open("file", os.O_RDONLY | os.O_NOATIME)
os.utime("file", ns=(5, now)); os.read(fd, 10); print(os.fstat(fd).st_atime_ns)
"#,
    );
    beside.mount.unmount();
}

#[test]
fn a_copy_up_changes_no_time_of_its_directory() {
    beside_lower(
        "os.makedirs('a/b'); write('a/b/c'); os.link('a/b/c', 'a/d')
for p in ('a', 'a/b'): os.utime(p, ns=(7, 7))",
        r#"
fd = os.open("a/b/c", os.O_RDWR)
print([times(p)[1] for p in ("a", "a/b")])
print(moved("a", lambda: os.chmod("a/b/c", 0o600)), moved("a/b", lambda: os.write(fd, b"x")))
"#,
    );
}
