//! When setuid, setgid and file capabilities are cleared and when they are preserved, compared with a plain
//! directory.

use cowl_tests::beside::{beside, beside_lower};

/// The changes that are tried, each on a file of its own.
const CHANGES: &str = r#"
def opened(path, flags, use):
    fd = os.open(path, flags)
    try: return use(fd)
    finally: os.close(fd)
def mapped(path):
    def store(fd):
        with mmap.mmap(fd, 4096) as m: m[0:1] = b"m"; m.flush()
    return opened(path, os.O_RDWR, store)
def copied(path):
    return opened("source", os.O_RDONLY, lambda a: opened(path, os.O_RDWR, lambda b: os.copy_file_range(a, b, 10)))
def sent(path):
    return opened("source", os.O_RDONLY, lambda a: opened(path, os.O_RDWR, lambda b: os.sendfile(b, a, 0, 10)))
W = os.O_WRONLY
CHANGES = {
    "write": lambda p: opened(p, W, lambda fd: os.write(fd, b"x")),
    "write-nothing": lambda p: opened(p, W, lambda fd: os.write(fd, b"")),
    "append": lambda p: opened(p, W | os.O_APPEND, lambda fd: os.write(fd, b"x")),
    "pwrite": lambda p: opened(p, os.O_RDWR, lambda fd: os.pwrite(fd, b"x", 100)),
    "direct": lambda p: opened(p, W | os.O_DIRECT, lambda fd: os.writev(fd, [aligned(b"x" * 4096)])),
    "mapping": mapped, "copy_file_range": copied, "sendfile": sent,
    "truncate": lambda p: os.truncate(p, 10),
    "truncate-same": lambda p: os.truncate(p, 8192),
    "ftruncate": lambda p: opened(p, W, lambda fd: os.ftruncate(fd, 10)),
    "trunc": lambda p: opened(p, W | os.O_TRUNC, lambda fd: None),
    "open": lambda p: opened(p, os.O_RDWR, lambda fd: None),
    "allocate": lambda p: opened(p, W, lambda fd: fallocate(fd, 0, 0, 100000)),
    "allocate-keep": lambda p: opened(p, W, lambda fd: fallocate(fd, KEEP_SIZE, 0, 100000)),
    "punch": lambda p: opened(p, W, lambda fd: fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, 4096)),
    "zero": lambda p: opened(p, W, lambda fd: fallocate(fd, ZERO, 0, 4096)),
    "chown": lambda p: os.chown(p, os.getuid(), os.getgid()),
    "chown-same": lambda p: os.chown(p, os.stat(p).st_uid, os.stat(p).st_gid),
    "chown-nothing": lambda p: os.chown(p, -1, -1),
    "chgrp": lambda p: os.chown(p, -1, os.getgid()),
    "chmod-same": lambda p: os.chmod(p, os.stat(p).st_mode & 0o7777),
    "utime": lambda p: os.utime(p, ns=(5, 5)),
    "touch": lambda p: os.utime(p),
    "xattr": lambda p: os.setxattr(p, "user.a", b"b"),
    "link": lambda p: os.link(p, p + ".2"),
    "rename": lambda p: (os.rename(p, p + ".2"), os.rename(p + ".2", p))[0],
}
"#;

#[test]
fn setuid_and_setgid_are_cleared_as_on_a_plain_directory() {
    let modes = r#"
MODES = (0o6777, 0o6767, 0o4766, 0o2767)
# CAP_FSETID is 4: "keeper" is an unprivileged user with it, "bare" is user 0 without it.
USERS = {"root": (0, 0, None), "owner": (1000, 1000, None), "other": (1001, 1001, None), "keeper": (1002, 1002, (4,)), "bare": (0, 0, (0, 1, 2, 3))}
def files():
    for user in USERS:
        for mode in MODES:
            for change in CHANGES: yield user, mode, change, f"d/{user}-{mode:o}-{change}"
"#;
    beside(
        &format!(
            "{CHANGES}{modes}{}",
            r#"
write("source", b"s" * 4096); os.mkdir("d"); os.chmod("d", 0o777)
for user, mode, change, path in files():
    write(path, b"c" * 8192); os.chown(path, 1000, 1000); os.chmod(path, mode)
"#
        ),
        &format!(
            "{CHANGES}{modes}{}",
            r#"
def run(user):
    print(user)
    for one, mode, change, path in files():
        if one != user: continue
        result = err(CHANGES[change], path)
        print(change, user, f"{mode:o}", result if isinstance(result, str) else "", of(path))
for user, (uid, gid, hold) in USERS.items(): child(lambda: run(user), uid=uid, gid=gid, hold=hold)
left = lambda change, user: os.stat(f"d/{user}-6777-{change}").st_mode & 0o6000
assert left("write", "other") == 0 and left("write", "root") == 0o6000 and left("utime", "owner") == 0o6000
assert left("punch", "other") == 0 and left("chown-same", "owner") == 0 and left("truncate", "other") == 0
"#
        ),
    );
}

#[test]
fn only_writes_and_chown_remove_capabilities() {
    beside(
        &format!(
            "{CHANGES}{}",
            r#"
write("source", b"s" * 4096); os.mkdir("d"); os.chmod("d", 0o777)
for user in ("root", "owner"):
    for change in CHANGES:
        path = f"d/{user}-{change}"
        write(path, b"c" * 8192); os.chown(path, 1000, 1000); os.chmod(path, 0o755)
        os.setxattr(path, "security.capability", CAPABILITY)
"#
        ),
        &format!(
            "{CHANGES}{}",
            r#"
def run(user):
    for change in CHANGES:
        path = f"d/{user}-{change}"
        result = err(CHANGES[change], path)
        print(change, user, result if isinstance(result, str) else "", err(lambda: os.getxattr(path, "security.capability").hex()))
run("root"); child(lambda: run("owner"), uid=1000, gid=1000)
has = lambda change: "security.capability" in os.listxattr("d/root-" + change)
assert has("chmod-same") and has("utime") and has("xattr") and has("rename") and has("link")
assert not has("write") and not has("chown") and not has("truncate")
"#
        ),
    );
}

#[test]
fn capabilities_are_copied_up_with_their_file() {
    beside_lower(
        "write('file', b'c' * 100000); os.setxattr('file', 'security.capability', CAPABILITY)
write('two'); os.setxattr('two', 'security.capability', CAPABILITY); os.link('two', 'three')",
        r#"
get = lambda path: os.getxattr(path, "security.capability")
for change in (lambda: os.chmod("file", 0o750), lambda: os.setxattr("file", "user.a", b"b"),
               lambda: os.utime("file", ns=(1, 1)), lambda: os.link("file", "other"),
               lambda: os.close(os.open("file", os.O_RDWR))):
    change(); assert get("file") == CAPABILITY; print(of("file"))
os.chmod("two", 0o711); assert get("two") == get("three") == CAPABILITY
os.setxattr("file", "security.capability", CAPABILITY, os.XATTR_REPLACE)
os.removexattr("file", "security.capability"); print(err(get, "file"))
"#,
    );
}

/// Writeback of several pages at a time must not lose the capabilities that each write removes and restores.
#[test]
fn writeback_of_mappings_preserves_capabilities() {
    beside(
        "write('file', b'c' * (8 << 20)); os.setxattr('file', 'security.capability', CAPABILITY)",
        r#"
import mmap
fd = os.open("file", os.O_RDWR)
def work(number):
    mapping = mmap.mmap(fd, 8 << 20)
    for step in range(20):
        for at in range(number * 4096, 8 << 20, 16384): mapping[at] = step
        mapping.flush()
pids = []
for number in range(4):
    pid = os.fork()
    if pid == 0: work(number); os._exit(0)
    pids.append(pid)
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
assert os.getxattr("file", "security.capability") == CAPABILITY
print(sum(os.pread(fd, 8 << 20, 0)))
"#,
    );
}
