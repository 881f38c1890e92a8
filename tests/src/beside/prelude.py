# Shared functions of the scripts of tests/src/beside. A script runs in a mount and in a plain directory, and must print
# the same in both. Its assertions must hold in both.
import ctypes, errno, fcntl, glob, mmap, os, random, signal, stat, struct, sys, threading, time

sys.stdout.reconfigure(line_buffering=True)
libc = ctypes.CDLL(None, use_errno=True)

AT_FDCWD = -100
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO, INSERT = 1, 2, 8, 16, 32
NOREPLACE, EXCHANGE = 1, 2


def check(result):
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def err(call, *args, **named):
    """Returns the result of a call, or the name of its error."""
    try:
        return call(*args, **named)
    except OSError as error:
        return errno.errorcode.get(error.errno, error.errno)


def write(path, data=b"content", mode=None):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        assert os.write(fd, data) == len(data)
    finally:
        os.close(fd)
    if mode is not None:
        os.chmod(path, mode)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def of(what):
    """Returns type, mode, owner, link count and size of a path or a descriptor."""
    s = os.stat(what, follow_symlinks=False) if isinstance(what, (str, bytes)) else os.fstat(what)
    size = s.st_size if not stat.S_ISDIR(s.st_mode) else "-"
    links = s.st_nlink if not stat.S_ISDIR(s.st_mode) else "-"
    return f"{s.st_mode:o} {s.st_uid}:{s.st_gid} links {links} size {size}"


def hold_only(numbers):
    """Drops all capabilities except those with these numbers."""
    bits = sum(1 << n for n in numbers)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    header = struct.pack("<Ii", 0x20080522, 0)
    check(libc.capset(header, struct.pack("<6I", low, low, 0, high, high, 0)))


def child(run, uid=0, gid=0, groups=(), umask=0o022, hold=None):
    """Runs `run` in a child process with the given credentials, and raises an error if it fails.

    `hold`: numbers of the capabilities of the child, unless those of its user apply."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.umask(umask)
            os.setgroups(list(groups))
            os.setresgid(gid, gid, gid)
            if hold is not None:
                check(libc.prctl(8, 1, 0, 0, 0))  # PR_SET_KEEPCAPS
            os.setresuid(uid, uid, uid)
            if hold is not None:
                hold_only(hold)
            run()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"a child failed: {status}"


def fallocate(fd, mode, at, length):
    return check(libc.fallocate(fd, mode, ctypes.c_long(at), ctypes.c_long(length)))


def renameat2(old, new, flags):
    return check(libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))


def aligned(data):
    """Returns a page-aligned buffer with `data`, as O_DIRECT requires."""
    buffer = mmap.mmap(-1, max(len(data), 1))
    buffer[: len(data)] = data
    return buffer


def times(path):
    s = os.stat(path, follow_symlinks=False)
    return s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns


def moved(path, change):
    """Returns the names of the times that `change` updates. File timestamps have a granularity of milliseconds."""
    before = times(path)
    time.sleep(0.012)
    change()
    after = times(path)
    return " ".join(n for n, a, b in zip(("atime", "mtime", "ctime"), before, after) if a != b)


def acl(*entries):
    """Returns the value of a POSIX ACL xattr from tuples (tag, permissions, id)."""
    tags = {"u": 1, "user": 2, "g": 4, "group": 8, "mask": 16, "o": 32}
    value = struct.pack("<I", 2)
    for tag, bits, who in sorted(entries, key=lambda e: (tags[e[0]], e[2])):
        value += struct.pack("<HHI", tags[tag], bits, who if who >= 0 else 0xFFFFFFFF)
    return value


ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
# cap_net_bind_service+ep, version 2.
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
