"""Programs that write by passthrough while snapshots are taken, and the check of what the snapshots contain.

write DIR PAUSE: one program writes numbered records to several files in turn, so a snapshot with record N must
have all records before N. It ends after a line on the standard input. PAUSE is the average pause after each record in
milliseconds.
check DIR: prints the number of records in a copy, or fails.
step DIR: writes to files of several kinds, once before and once after a line on the standard input.
stuck DIR: begins a write, which ends after a line on the standard input.
late DIR STORE: the same, but the write begins when the file has been linked into a second layer of the store.
"""
import ctypes, fcntl, glob, mmap, os, random, select, struct, sys, threading, time

RECORD = 5000
BLOCK = 4096
SLOTS = 1 << 18
# The record N goes to the file N % 4, but of the records for DIRECT, only each 16th; the others go to MORE. The daemon
# serves writes to DIRECT, so the program waits for a snapshot there, and writes to the other files during it.
LOG, DATA, DIRECT, MAPPED = "log", "dir/data", "dir/direct", "mapped"
MORE = "dir/more"


# The exit code if the content is not that of one moment.
WRONG = 3


def wrong(problem):
    print(problem, file=sys.stderr)
    sys.exit(WRONG)


def record(number, length):
    return (b"%012d" % number * (length // 12 + 1))[:length]


def write(top, pause):
    os.chdir(top)
    os.makedirs("dir", exist_ok=True)
    log = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    os.link(LOG, "dir/log-too")
    data = os.open(DATA, os.O_RDWR | os.O_CREAT, 0o644)
    direct = os.open(DIRECT, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
    more = os.open(MORE, os.O_RDWR | os.O_CREAT, 0o644)
    aligned = mmap.mmap(-1, BLOCK)
    opened = os.open(MAPPED, os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(opened, SLOTS * 8)
    mapped = mmap.mmap(opened, SLOTS * 8)
    # The mapping outlives the descriptor.
    os.close(opened)
    numbers = {name: os.stat(name).st_ino for name in (LOG, DATA, DIRECT, MAPPED, MORE)}
    print("ready", flush=True)
    number = 0
    is_stopped = lambda: number % 64 == 0 and select.select([sys.stdin], [], [], 0)[0]
    while number // 4 < SLOTS - 1 and not is_stopped():
        at = number // 4
        if number % 4 == 0:
            assert os.write(log, record(number, RECORD)) == RECORD
        elif number % 4 == 1:
            assert os.pwrite(data, record(number, RECORD), at * RECORD) == RECORD
        elif number % 4 == 2 and number % 64 != 2:
            assert os.pwrite(more, record(number, RECORD), at * RECORD) == RECORD
        elif number % 4 == 2:
            aligned[:] = record(number, BLOCK)
            assert os.pwritev(direct, [aligned], at * BLOCK) == BLOCK
        else:
            struct.pack_into("<Q", mapped, at * 8, number)
        number += 1
        if pause:
            time.sleep(random.random() * pause * 0.002)
        elif random.random() < 0.3:
            time.sleep(random.random() * 0.012)
    for name in numbers:
        assert os.stat(name).st_ino == numbers[name], name
    assert os.fstat(log).st_ino == os.stat("dir/log-too").st_ino
    assert os.fstat(log).st_nlink == 2 and os.fstat(log).st_mode & 0o777 == 0o640
    print(number, flush=True)


def numbered(content, length):
    """The numbers of the complete records in a file."""
    found = []
    for at in range(0, len(content), length):
        part = content[at : at + length]
        if not part.strip(b"\0"):
            continue
        number = int(part[:12]) if part[:12].isdigit() else -1
        if part != record(number, length):
            wrong(f"record {number} at {at} is torn")
        found.append(number)
    return found


def check(top):
    os.chdir(top)
    read = lambda name: open(name, "rb").read()
    found = numbered(read(LOG), RECORD) + numbered(read(DATA), RECORD) + numbered(read(DIRECT), BLOCK)
    found += numbered(read(MORE), RECORD)
    slots = read(MAPPED)
    found += [number for (number,) in struct.iter_unpack("<Q", slots) if number]
    found.sort()
    if found != list(range(len(found))):
        missing = next(at for at, number in enumerate(found) if at != number)
        wrong(f"record {missing} of {len(found)} is missing, but there is {found[-1]}")
    assert os.stat(LOG).st_ino == os.stat("dir/log-too").st_ino
    assert os.stat(LOG).st_nlink == 2
    print(len(found))


def step(top):
    os.chdir(top)
    os.makedirs("deep/er", exist_ok=True)
    files = [os.open(name, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600) for name in ("one", "deep/er/two", "gone")]
    os.link("one", "deep/link")
    os.unlink("gone")
    opened = os.open("deep/mapped", os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(opened, BLOCK)
    mapped = mmap.mmap(opened, BLOCK)
    os.close(opened)
    reader = os.open("one", os.O_RDONLY)
    state = lambda: [(os.fstat(f).st_ino, os.fstat(f).st_nlink) for f in files] + [os.stat("deep/mapped").st_ino]
    before = state()
    for content in (b"first\n", b"second\n"):
        for file in files:
            assert os.write(file, content) == len(content)
        mapped[: len(content)] = content
        print("wrote", flush=True)
        if not sys.stdin.readline():
            return
    after = state()
    assert after == before, (before, after)
    assert os.stat("deep/link").st_ino == os.stat("one").st_ino == before[0][0]
    for file in files:
        assert os.pread(file, 100, 0) == b"first\nsecond\n"
    assert os.pread(reader, 100, 0) == b"first\nsecond\n"
    print("done", flush=True)
    sys.stdin.readline()


def cold(top, seconds):
    """Writes from a mapping whose pages the daemon of the mount must read during the write."""
    os.chdir(top)
    source = os.open("cold", os.O_RDONLY)
    size = os.fstat(source).st_size
    mapped = mmap.mmap(source, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    copy = os.open("copy", os.O_RDWR | os.O_CREAT)
    print("ready", flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        mapped.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(source, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pwrite(copy, mapped, 0) == size
        time.sleep(random.random() * 0.02)
    assert os.pread(copy, size, 0) == mapped[:]
    print("done", flush=True)


def rename(top, seconds):
    """Renames one of two names of an open file between directories."""
    os.chdir(top)
    for name in ("a", "b", "c"):
        os.mkdir(name)
    file = os.open("a/kept", os.O_RDWR | os.O_CREAT)
    os.link("a/kept", "b/moved")
    print("ready", flush=True)
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        os.rename("b/moved", "c/moved")
        os.rename("c/moved", "b/moved")
        number += 1
        os.pwrite(file, b"%d" % number, 0)
    assert os.fstat(file).st_nlink == 2
    print("done", flush=True)


def stuck(top, store=None):
    """Writes from memory that userfaultfd(2) provides only after a line of input: the write holds the file's lock."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
    faults = libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
    assert faults >= 0, os.strerror(ctypes.get_errno())
    fcntl.ioctl(faults, 0xC018AA3F, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
    memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(faults, 0xC020AA00, bytearray(struct.pack("QQQQ", start, 4096, 1, 0)))
    file = os.open(os.path.join(top, "stuck"), os.O_RDWR | os.O_CREAT)
    os.write(file, b"first\n")
    if store:
        print("ready", flush=True)
        in_layers = glob.glob(f"{store}/layers/*/tree/deep/stuck")
        while os.stat(in_layers[0]).st_nlink == 1:
            pass
    thread = threading.Thread(target=lambda: libc.write(file, ctypes.c_void_p(start), 4096))
    thread.start()
    print("ready", flush=True)
    sys.stdin.readline()
    os.close(faults)
    thread.join()
    assert os.fstat(file).st_size == 4102
    print("done", flush=True)
    sys.stdin.readline()


if sys.argv[1] in ("stuck", "late"):
    stuck(*sys.argv[2:])
elif sys.argv[1] in ("cold", "rename"):
    {"cold": cold, "rename": rename}[sys.argv[1]](sys.argv[2], float(sys.argv[3]))
elif sys.argv[1] == "write":
    write(sys.argv[2], float(sys.argv[3]))
elif sys.argv[1] == "check":
    check(sys.argv[2])
else:
    step(sys.argv[2])
