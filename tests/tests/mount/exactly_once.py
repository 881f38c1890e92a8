"""Makes every kind of change, and checks that each is made exactly once: neither repeated nor refused."""
import ctypes, os, sys, time

libc = ctypes.CDLL(None, use_errno=True)
top, worker, until = sys.argv[1], int(sys.argv[2]), time.monotonic() + float(sys.argv[3])
os.chdir(top)


def rename2(old, new, flags):
    if libc.renameat2(-100, old.encode(), -100, new.encode(), flags) != 0:
        raise OSError(ctypes.get_errno(), f"renameat2 {old} {new} {flags}")


def absent(*names):
    for name in names:
        assert not os.path.lexists(name), name


home = f"worker{worker}"
os.mkdir(home)
log = os.open(f"{home}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
count = 0
while time.monotonic() < until and count < 900:
    lower, base = f"lower/{worker}-{count}", f"{home}/{count}"
    os.mkdir(base)
    fd = os.open(f"{base}/file", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    assert os.write(fd, b"content %d" % count) == len(b"content %d" % count)
    os.link(f"{base}/file", f"{base}/link")
    assert os.fstat(fd).st_nlink == 2
    os.setxattr(fd, "user.mark", b"1", os.XATTR_CREATE)
    os.removexattr(f"{base}/file", "user.mark")
    os.setxattr(fd, "user.mark", b"2", os.XATTR_CREATE)
    os.setxattr(fd, "user.mark", b"3", os.XATTR_REPLACE)
    assert os.getxattr(fd, "user.mark") == b"3"
    os.close(fd)
    os.symlink(str(count), f"{base}/symlink")
    os.mkfifo(f"{base}/fifo")
    os.rename(f"{base}/file", f"{base}/renamed")
    absent(f"{base}/file")
    rename2(f"{base}/renamed", f"{base}/again", 1)
    rename2(f"{base}/again", f"{base}/symlink", 2)
    assert os.readlink(f"{base}/again") == str(count)
    assert open(f"{base}/symlink", "rb").read() == b"content %d" % count
    # Objects of a lower layer.
    with open(lower, "a") as file:
        file.write(" and more")
    os.rename(lower, f"{base}/moved")
    absent(lower)
    os.rename(f"lower/dir{worker}-{count}", f"{base}/dir")
    assert open(f"{base}/dir/inner").read() == "inner"
    os.mkdir(f"lower/dir{worker}-{count}")
    os.rmdir(f"lower/dir{worker}-{count}")
    os.unlink(f"{base}/dir/inner")
    os.rmdir(f"{base}/dir")
    assert open(f"{base}/moved").read() == f"{worker}-{count} and more"
    os.unlink(f"{base}/moved")
    for name in ("link", "again", "symlink", "fifo"):
        os.unlink(f"{base}/{name}")
    os.rmdir(base)
    absent(base)
    line = b"%d\n" % count
    assert os.write(log, line) == len(line)
    count += 1
assert os.listdir(home) == ["log"]
lines = open(f"{home}/log").read().split()
assert lines == [str(number) for number in range(count)], lines[-5:]
for number in range(count):
    absent(f"lower/{worker}-{number}", f"lower/dir{worker}-{number}")
print(count)
