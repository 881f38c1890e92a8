"""Makes every kind of change, step by step, and checks that each is made exactly once. The result does not depend on
time. It prints a line and waits for another one where the caller is to do something."""
import ctypes, errno, fcntl, mmap, os, stat, sys

CAPABILITY = bytes.fromhex("0000000200040000000000000000000000000000")
libc = ctypes.CDLL(None, use_errno=True)
os.chdir(sys.argv[1])
os.umask(0o022)


def call_outside(what):
    print(what, flush=True)
    assert sys.stdin.readline() == "done\n"


def rename2(old, new, flags):
    if libc.renameat2(-100, old.encode(), -100, new.encode(), flags) != 0:
        raise OSError(ctypes.get_errno(), f"renameat2 {old} {new} {flags}")


def write(name, content, flags=os.O_CREAT | os.O_EXCL):
    fd = os.open(name, os.O_RDWR | flags)
    assert os.write(fd, content) == len(content)
    return fd


def read(name):
    with open(name, "rb") as file:
        return file.read()


def refused(error, call, *args, **named):
    try:
        call(*args, **named)
    except OSError as failed:
        assert failed.errno == error, failed
        return
    raise AssertionError((call, args))


def change(base, lower):
    os.mkdir(base)
    fd = write(f"{base}/file", b"content")
    os.link(f"{base}/file", f"{base}/link")
    assert os.fstat(fd).st_nlink == 2
    os.setxattr(fd, "user.mark", b"1", os.XATTR_CREATE)
    refused(errno.EEXIST, os.setxattr, fd, "user.mark", b"1", os.XATTR_CREATE)
    os.removexattr(f"{base}/file", "user.mark")
    refused(errno.ENODATA, os.removexattr, f"{base}/file", "user.mark")
    os.setxattr(fd, "user.mark", b"2", os.XATTR_CREATE)
    os.setxattr(fd, "user.mark", b"3", os.XATTR_REPLACE)
    assert os.getxattr(fd, "user.mark") == b"3"
    os.fchmod(fd, 0o640)
    os.fchown(fd, 5, 6)
    os.utime(fd, ns=(10**18, 10**18))
    assert (os.fstat(fd).st_mode & 0o7777, os.fstat(fd).st_uid) == (0o640, 5)
    os.ftruncate(fd, 3)
    os.posix_fallocate(fd, 0, 8192)
    appender = os.open(f"{base}/file", os.O_WRONLY | os.O_APPEND)
    for number in range(5):
        assert os.write(appender, b"%d" % number) == 1
    os.fsync(appender)
    os.close(appender)
    assert read(f"{base}/file") == b"con" + bytes(8189) + b"01234"
    target = write(f"{base}/copy", b"")
    assert os.copy_file_range(fd, target, 3, 0, 0) == 3
    os.ftruncate(target, 8192)
    mapping = mmap.mmap(target, 8192)
    mapping[5000] = 65
    os.setxattr(target, "security.capability", CAPABILITY)
    mapping.flush()
    mapping.close()
    assert os.getxattr(target, "security.capability") == CAPABILITY
    assert os.pread(target, 1, 5000) == b"A" and os.pread(target, 3, 0) == b"con"
    os.close(target)
    os.close(fd)
    os.symlink("somewhere", f"{base}/symlink")
    os.mkfifo(f"{base}/fifo")
    os.mknod(f"{base}/node", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    refused(errno.EEXIST, os.mkdir, f"{base}/fifo")
    refused(errno.EEXIST, os.open, f"{base}/copy", os.O_CREAT | os.O_EXCL)
    os.rename(f"{base}/file", f"{base}/renamed")
    refused(errno.ENOENT, os.stat, f"{base}/file")
    rename2(f"{base}/renamed", f"{base}/again", 1)
    refused(errno.EEXIST, rename2, f"{base}/again", f"{base}/copy", 1)
    rename2(f"{base}/again", f"{base}/symlink", 2)
    assert os.readlink(f"{base}/again") == "somewhere"
    os.rename(f"{base}/copy", f"{base}/link")
    with open(f"{base}/symlink", "r+b", buffering=0) as file:
        assert os.fstat(file.fileno()).st_nlink == 1
    with open(f"{base}/link", "wb") as file:
        file.write(b"truncated")
    # Objects of a lower layer.
    for number, path in enumerate((lower, f"{lower}/dir", ".")):
        os.utime(path, ns=(10**18 + number, 2 * 10**18 + number))
    before = [os.stat(path).st_mtime_ns for path in (lower, ".")], os.stat(lower).st_ctime_ns
    os.chmod(f"{lower}/copied", 0o600)
    os.close(os.open(f"{lower}/dir/inner", os.O_RDWR))
    after = [os.stat(path).st_mtime_ns for path in (lower, ".")], os.stat(lower).st_ctime_ns
    assert after == before, (after, before)
    with open(f"{lower}/file", "ab") as file:
        file.write(b" and more")
    os.chmod(f"{lower}/attributes", 0o600)
    os.rename(f"{lower}/file", f"{base}/moved")
    refused(errno.ENOENT, os.stat, f"{lower}/file")
    os.rename(f"{lower}/dir", f"{base}/dir")
    assert read(f"{base}/dir/inner") == b"inner"
    os.mkdir(f"{lower}/dir")
    write(f"{lower}/dir/new", b"new")
    os.unlink(f"{lower}/dir/new")
    os.rmdir(f"{lower}/dir")
    refused(errno.ENOENT, os.rmdir, f"{lower}/dir")
    write(f"{base}/dir/added", b"added")
    rename2(f"{lower}/one", f"{lower}/two", 2)
    assert (read(f"{lower}/one"), read(f"{lower}/two")) == (b"two", b"one")
    os.link(f"{lower}/unchanged", f"{lower}/linked")
    with open(f"{lower}/linked1", "ab") as file:
        file.write(b"+")
    assert read(f"{lower}/linked2") == b"linked+"
    with open(f"{lower}/large", "r+b", buffering=0) as file:
        file.seek(9 << 20)
        file.write(b"L")
    content = read(f"{lower}/large")
    assert (len(content), content.count(b"l"), content[9 << 20]) == (20 << 20, (20 << 20) - 1, 76)
    os.rename(f"{lower}/replacing", f"{lower}/replaced")
    with open(f"{lower}/truncated", "wb") as file:
        file.write(b"new")
    # Objects without a name.
    paths = [os.open(f"{lower}/{name}", os.O_PATH | os.O_NOFOLLOW) for name in ("gone", "gone-link")]
    kept = os.open(f"{lower}/gone-open", os.O_RDWR)
    directory = os.open(f"{lower}/empty", os.O_RDONLY)
    numbers = [os.fstat(fd).st_ino for fd in (*paths, kept, directory)]
    for name in ("gone", "gone-link", "gone-open"):
        os.unlink(f"{lower}/{name}")
        refused(errno.ENOENT, os.unlink, f"{lower}/{name}")
    os.rmdir(f"{lower}/empty")
    assert os.pwrite(kept, b"X", 0) == 1
    assert os.pread(kept, 4, 0) == b"Xone"
    assert [os.fstat(fd).st_ino for fd in (*paths, kept, directory)] == numbers
    assert [os.fstat(fd).st_nlink for fd in (*paths, kept)] == [0, 0, 0]
    fd = os.open(f"/proc/self/fd/{paths[0]}", os.O_RDONLY)
    assert os.read(fd, 9) == b"gone"
    for fd in (fd, *paths, kept, directory):
        os.close(fd)
    for name in ("fifo", "node"):
        os.unlink(f"{base}/{name}")
        refused(errno.ENOENT, os.unlink, f"{base}/{name}")
    assert sorted(os.listdir(base)) == ["again", "dir", "link", "moved", "symlink"]
    assert sorted(os.listdir(f"{base}/dir")) == ["added", "inner"]


held = os.open("held", os.O_RDWR)
path_of = os.open("held-path", os.O_PATH)
number = os.fstat(path_of).st_ino
removed = os.open("removed", os.O_RDWR)
os.unlink("removed")
change("first", "lower1")
call_outside("snapshot")
change("second", "lower2")
os.pwrite(held, b"2", 0)
call_outside("snapshot")
call_outside("upgrade")
call_outside("flatten")
os.pwrite(held, b"3", 1)
os.pwrite(removed, b"3", 1)
assert os.pread(removed, 4, 0) == b"r3mo", os.pread(removed, 4, 0)
assert os.fstat(path_of).st_ino == number
change("third", "lower3")
os.rename("first", "third/first")
call_outside("upgrade")
call_outside("end")
assert read("held") == b"23ld" and os.pread(held, 4, 0) == b"23ld"
print("complete", flush=True)
