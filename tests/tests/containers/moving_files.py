"""Programs that write by passthrough while snapshots are taken, and the check of what the snapshots contain.

write DIR SLOTS PAUSE: one program writes numbered records to several files in turn. Each file has SLOTS slots, which
are written again in the same order, so a snapshot with record N must have exactly the newest record up to N in each
slot. It ends after a line on the standard input. PAUSE is the average pause after each record in milliseconds.
check DIR SLOTS: prints the number of records that were written before a copy was made, or fails.
step DIR: writes to files of several kinds, once before and once after a line on the standard input.
stuck DIR: begins a write, which ends after a line on the standard input.
late DIR STORE: the same, but the write begins when the file has been linked into a second layer of the store.
"""
import ctypes, fcntl, glob, mmap, os, random, select, struct, sys, threading, time

RECORD = 5000
BLOCK = 4096
# The distance of the numbers in MAPPED, so that most of them are in different pages.
STRIDE = 1032
# The record N goes to the file N % 4, but of the records for DIRECT, only each 16th; the others go to MORE. The daemon
# serves writes to DIRECT, so the program waits for a snapshot there, and writes to the other files during it.
LOG, DATA, DIRECT, MAPPED = "log", "dir/data", "dir/direct", "mapped"
MORE = "dir/more"
LENGTHS = {LOG: RECORD, DATA: RECORD, DIRECT: BLOCK, MORE: RECORD, MAPPED: STRIDE}

# The exit code if the content is not that of one moment.
WRONG = 3


def wrong(problem):
    print(problem, file=sys.stderr)
    sys.exit(WRONG)


def record(number, length):
    return (b"%012d" % number * (length // 12 + 1))[:length]


def file_of(number):
    return MORE if number % 4 == 2 and number % 64 != 2 else (LOG, DATA, DIRECT, MAPPED)[number % 4]


def write(top, slots, pause):
    os.chdir(top)
    os.makedirs("dir", exist_ok=True)
    log = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    os.link(LOG, "dir/log-too")
    data = os.open(DATA, os.O_RDWR | os.O_CREAT, 0o644)
    direct = os.open(DIRECT, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
    more = os.open(MORE, os.O_RDWR | os.O_CREAT, 0o644)
    aligned = mmap.mmap(-1, BLOCK)
    opened = os.open(MAPPED, os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(opened, slots * STRIDE)
    # The mapping outlives the descriptor. A store of a number is one instruction.
    mapped = memoryview(mmap.mmap(opened, slots * STRIDE)).cast("Q")
    os.close(opened)
    numbers = {name: os.stat(name).st_ino for name in LENGTHS}
    print("ready", flush=True)
    number = 0
    is_stopped = lambda: number % 64 == 0 and select.select([sys.stdin], [], [], 0)[0]
    while not is_stopped():
        name, slot = file_of(number), number // 4 % slots
        if name == LOG:
            if slot == 0:
                os.ftruncate(log, 0)
            assert os.write(log, record(number, RECORD)) == RECORD
        elif name == MAPPED:
            # From 1: zeros are an unused slot.
            mapped[slot * STRIDE // 8] = number + 1
        elif name == DIRECT:
            aligned[:] = record(number, BLOCK)
            assert os.pwritev(direct, [aligned], slot * BLOCK) == BLOCK
        else:
            assert os.pwrite(data if name == DATA else more, record(number, RECORD), slot * RECORD) == RECORD
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


def numbers_in(name):
    """The numbers of the records in a file, by slot."""
    with open(name, "rb") as file:
        content = file.read()
    found, length = {}, LENGTHS[name]
    for slot in range((len(content) + length - 1) // length):
        part = content[slot * length : (slot + 1) * length]
        if not part.strip(b"\0"):
            continue
        if name == MAPPED:
            number = struct.unpack_from("Q", part)[0] - 1
        else:
            number = int(part[:12]) if part[:12].isdigit() else -1
            if part != record(number, length):
                wrong(f"record {number} in slot {slot} of {name} is torn")
        found[slot] = number
    return found


def check(top, slots):
    os.chdir(top)
    found = {name: numbers_in(name) for name in LENGTHS}
    last = max((number for file in found.values() for number in file.values()), default=-1)
    expected = {name: {} for name in LENGTHS}
    # Each slot once, because a slot of DIRECT is never one of MORE.
    assert slots % 16 == 0
    for number in range(max(last + 1 - 4 * slots, 0), last + 1):
        expected[file_of(number)][number // 4 % slots] = number
    # The log is truncated before its first slot is written again.
    newest = last - last % 4
    cycle = newest // 4 // slots * slots * 4
    expected[LOG] = {slot: number for slot, number in expected[LOG].items() if number >= cycle}
    if (last + 1) % (4 * slots) == 0 and not found[LOG]:
        expected[LOG] = {}
    for name in LENGTHS:
        for slot in sorted(expected[name].keys() | found[name].keys()):
            pair = found[name].get(slot), expected[name].get(slot)
            if pair[0] != pair[1]:
                wrong(f"slot {slot} of {name} has record {pair[0]} instead of {pair[1]}, but there is record {last}")
    assert os.stat(LOG).st_ino == os.stat("dir/log-too").st_ino
    assert os.stat(LOG).st_nlink == 2
    print(last + 1)


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
    write(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
elif sys.argv[1] == "check":
    check(sys.argv[2], int(sys.argv[3]))
else:
    step(sys.argv[2])
