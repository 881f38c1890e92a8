"""Uses everything that a program can hold open in a mount, and checks it each time that a line arrives."""
import ctypes, errno, fcntl, mmap, os, struct, subprocess, sys

libc = ctypes.CDLL(None, use_errno=True)
os.chdir(sys.argv[1])

reader = open("lines")
next_line = 0
appender = os.open("appended", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
appended = b""
direct = os.open("blocks", os.O_RDONLY | os.O_DIRECT)
aligned = mmap.mmap(-1, 4096)
shared_file = os.open("shared", os.O_RDWR | os.O_CREAT)
os.ftruncate(shared_file, 8192)
shared = mmap.mmap(shared_file, 8192)
os.close(shared_file)
private = mmap.mmap(os.open("blocks", os.O_RDONLY), 8192, mmap.MAP_PRIVATE, mmap.PROT_READ)
gone = os.open("gone", os.O_RDWR)
os.write(gone, b"kept")
os.unlink("gone")
gone_lower = os.open("gone-lower", os.O_RDONLY)
os.unlink("gone-lower")
new_gone = os.open("new-gone", os.O_RDWR | os.O_CREAT)
os.unlink("new-gone")
replaced = os.open("replaced", os.O_RDONLY)
os.rename("replacement", "replaced")
listing = os.scandir("many")
listed = [next(listing).name for _ in range(700)]
locked = os.open("locked", os.O_RDWR | os.O_CREAT)
fcntl.flock(locked, fcntl.LOCK_EX)
posix = os.open("posix", os.O_RDWR | os.O_CREAT)
fcntl.lockf(posix, fcntl.LOCK_EX, 10)
watch = libc.inotify_init1(os.O_NONBLOCK)
os.mkdir("watched")
assert libc.inotify_add_watch(watch, b"watched", 0x100) >= 0  # IN_CREATE
running = subprocess.Popen(["./program", "1000"])
running_file = os.stat("program").st_ino
removed = os.open("removed", os.O_RDONLY | os.O_DIRECTORY)
os.rmdir("removed")
# Objects that a process refers to without an open file, and that lose their names.
executed = subprocess.Popen(["./executed", "1000"])
os.mkfifo("fifo")
os.symlink("target", "new-symlink")
open("path-new", "w").write("new content")
PATHS = ("path-lower", "path-copied", "path-new", "symlink-lower", "new-symlink", "fifo", "path-linked")
os.chmod("path-copied", 0o640)
os.link("path-linked", "path-linked2")
paths = {name: os.open(name, os.O_PATH | os.O_NOFOLLOW) for name in PATHS}
before = {name: os.fstat(fd) for name, fd in paths.items()}
executed_file = os.stat("executed").st_ino
for name in PATHS + ("executed", "path-linked2"):
    os.unlink(name)
numbers = {name: os.stat(name).st_ino for name in ("lines", "blocks", "locked", "many", "shared", "appended")}
inside = os.open("many", os.O_RDONLY | os.O_DIRECTORY)
# After many small new files, the daemon writes to the next one itself (docs/decisions/0040).
for number in range(20):
    os.close(os.open(f"small{number}", os.O_WRONLY | os.O_CREAT))
small = os.open("small", os.O_WRONLY | os.O_CREAT)
os.ftruncate(small, 4096)
small_file = os.open("small", os.O_RDWR)
small_map = mmap.mmap(small_file, 4096)


def excluded(name, how):
    child = os.fork()
    if child == 0:
        try:
            how(os.open(name, os.O_RDWR))
        except BlockingIOError:
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def check(round):
    global next_line, appended
    assert reader.readline() == f"{next_line}\n"
    next_line += 1
    added = b"round %d\n" % round
    assert os.write(appender, added) == len(added)
    appended += added
    assert open("appended", "rb").read() == appended
    small_map[2 * round] = round + 1
    assert os.pwrite(small, bytes([round + 1]), 2 * round + 1) == 1
    assert small_map[2 * round : 2 * round + 2] == os.pread(small_file, 2, 2 * round) == bytes([round + 1] * 2)
    assert os.preadv(direct, [aligned], 4096) == 4096 and aligned[:4] == b"bbbb"
    shared[4096 + round] = 65 + round
    shared.flush()
    assert open("shared", "rb").read()[4096 + round] == 65 + round
    assert private[4096] == ord("b")
    assert os.pread(gone, 4, 0) == b"kept"
    os.pwrite(gone, b"%d" % (round % 10), 5)
    assert os.pread(gone, 1, 5) == b"%d" % (round % 10)
    assert os.fstat(gone).st_nlink == 0
    assert os.pread(gone_lower, 100, 0) == b"lower content" and os.fstat(gone_lower).st_nlink == 0
    os.pwrite(new_gone, b"new", round)
    assert os.pread(new_gone, 3, round) == b"new"
    assert os.pread(replaced, 100, 0) == b"old"
    assert open("replaced").read() == "new"
    assert excluded("locked", lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
    assert excluded("posix", lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10))
    open(f"watched/{round}", "w").close()
    event = os.read(watch, 4096)
    assert struct.unpack("iIII", event[:16])[1] == 0x100 and str(round).encode() in event
    assert running.poll() is None
    assert os.stat(f"/proc/{running.pid}/exe").st_ino == running_file
    assert os.listdir(removed) == [] and os.fstat(removed).st_nlink == 0
    try:
        os.open("new", os.O_CREAT | os.O_RDWR, dir_fd=removed)
        raise AssertionError("created in a removed directory")
    except FileNotFoundError:
        pass
    for name, number in numbers.items():
        assert os.stat(name).st_ino == number, name
    assert os.stat("00042", dir_fd=inside).st_size == 0
    assert executed.poll() is None
    assert os.stat(f"/proc/{executed.pid}/exe").st_ino == executed_file
    check_paths(round)


def check_paths(round):
    for name, fd in paths.items():
        now, was = os.fstat(fd), before[name]
        assert now.st_nlink == 0, name
        same = ("st_ino", "st_mode", "st_size", "st_uid", "st_mtime_ns")
        assert all(getattr(now, key) == getattr(was, key) for key in same), (name, now, was)
    assert read_link(paths["symlink-lower"]) == b"lower target"
    assert read_link(paths["new-symlink"]) == b"target"
    contents = {"path-lower": b"a", "path-copied": b"b", "path-new": b"new content", "path-linked": b"c"}
    for name, content in contents.items():
        fd = os.open(f"/proc/self/fd/{paths[name]}", os.O_RDONLY)
        assert os.read(fd, 100) == content, name
        os.close(fd)
    if round == 4:
        fd = os.open(f"/proc/self/fd/{paths['path-lower']}", os.O_RDWR)
        os.pwrite(fd, b"A", 0)
        assert os.pread(fd, 9, 0) == b"A"
        os.pwrite(fd, b"a", 0)
        os.close(fd)
        before["path-lower"] = os.fstat(paths["path-lower"])


def read_link(fd):
    buffer = ctypes.create_string_buffer(100)
    length = libc.readlinkat(fd, b"", buffer, 100)
    assert length >= 0, ctypes.get_errno()
    return buffer.raw[:length]


print("ready", flush=True)
for round, line in enumerate(sys.stdin):
    if line == "end\n":
        break
    check(round)
    print("checked", flush=True)
listed += [entry.name for entry in listing]
places = {name: place for place, name in enumerate(os.listdir("many"))}
missing = sorted(places[name] for name in places.keys() - set(listed))
assert len(listed) == len(set(listed)) == len(places) == 3000, (len(listed), len(set(listed)), missing)
for program in (running, executed):
    program.kill()
    program.wait()
print("done", flush=True)
