"""Performs the same random system calls in a mount and in a plain directory, and compares results call by call.

Arguments: the mount, the plain directory, a seed, the number of calls, "passthrough" or "daemon" for the way in
which the mount writes files, and optionally how many differences of each kind to print. Without it, the first difference ends the run. A
difference is one that EXPECTED does not list. Exits with 1 if there is one. Prints how often each row of EXPECTED
applied; with the argument "rows" alone, prints the rows.
"""
import collections, ctypes, errno, fcntl, os, random, re, resource, signal, stat, struct, sys

libc = ctypes.CDLL(None, use_errno=True)
I32, I64, U64, MAX = 2**31, 2**63 - 1, 2**64 - 1, 2**44
PAGE, MIB = 4096, 1 << 20
AT_FDCWD, AT_NOFOLLOW, AT_REMOVEDIR, AT_FOLLOW, AT_EMPTY = -100, 0x100, 0x200, 0x400, 0x1000
GETDENTS = {"x86_64": 217}.get(os.uname().machine, 61)
OPENAT2, FCHMODAT2 = 437, 452
SLOTS = 12


class Fd:
    """A descriptor by its slot: each tree has its own."""
    def __init__(self, slot): self.slot = slot
    def of(self, side): return side.slots[self.slot]
    def __repr__(self): return f"fd{self.slot}"


class Out:
    """A buffer for results of `size` bytes; `read` extracts the comparable part from it and the return value."""
    def __init__(self, size, read=lambda data, count: data[:max(count, 0)], start=b""):
        self.size, self.read, self.start = size, read, start
    def of(self, side):
        self.buffer = ctypes.create_string_buffer(self.start, max(self.size, len(self.start)) or 1)
        return self.buffer
    def __repr__(self): return f"buffer[{self.size}]"


class In(bytes):
    """A buffer of input."""
    def __repr__(self): return f"{bytes(self[:40])!r}{f' ({len(self)} bytes)' if len(self) > 40 else ''}"


class Number(int):
    """A 64-bit argument, such as an offset."""


class Side:
    """One of the two trees."""
    def __init__(self, root):
        self.top = b"/" + os.path.basename(os.fsencode(root))
        self.root = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        self.slots = [-1] * SLOTS

    def perform(self, name, arguments):
        values, outs = [], []
        for argument in arguments:
            if isinstance(argument, (Fd, Out)):
                value = argument.of(self)
                if isinstance(argument, Out): outs.append((argument, value))
            elif argument is ROOT: value = self.root
            else: value = argument
            if isinstance(argument, Number): value = ctypes.c_longlong(argument)
            elif isinstance(value, int): value = ctypes.c_long(value)
            elif isinstance(value, bytes): value = ctypes.create_string_buffer(value, len(value) + 1)
            values.append(value)
        ctypes.set_errno(0)
        result = getattr(libc, name)(*values)
        if result == -1: return -1, errno.errorcode.get(ctypes.get_errno(), "?"), []
        return result, "", [out.read(bytes(buffer)[:out.size], result) for out, buffer in outs]


ROOT = "ROOT"
for name in ("lseek64", "copy_file_range", "splice", "tee", "sendfile", "pread", "pwrite", "preadv2", "pwritev2", "read",
             "write", "getxattr", "lgetxattr", "fgetxattr", "listxattr", "llistxattr", "flistxattr", "readlinkat", "mmap",
             "readv", "writev"):
    getattr(libc, name).restype = ctypes.c_ssize_t


def read_statx(mask):
    """Returns a function that extracts the requested fields of a struct statx."""
    def read(data, _):
        found, _, _, nlink, uid, gid, mode, _, _, size, _, _ = struct.unpack_from("IIQIIIHHQQQQ", data)
        seconds, nanoseconds = struct.unpack_from("qI", data, 112)
        kind = stat.S_IFMT(mode)
        # Link counts and sizes of directories depend on the file system, and times of the run differ between the trees.
        # FUSE maintains no times of FIFOs (docs/semantics.md).
        fields = (1, kind), (2, stat.S_IMODE(mode)), (4, kind != stat.S_IFDIR and nlink), (8, uid), (16, gid), (
            64, None if kind == stat.S_IFIFO else "now" if START - 10 < seconds < START + 10000 else (seconds, nanoseconds)), (512, kind != stat.S_IFDIR and size)
        wanted = mask & found
        return found & mask & 0x7df, *(value for bit, value in fields if wanted & bit), data[128:136]
    return read


def read_names(data, count):
    return sorted(name for name in data[:max(count, 0)].split(b"\0") if name)


def entries(data):
    """Returns names with their types and positions from a buffer of getdents64."""
    at, found = 0, []
    while at < len(data):
        _, position, length, kind = struct.unpack_from("QqHB", data, at)
        found.append((data[at + 19:at + length].split(b"\0")[0], kind, position))
        at += length
    return found


class Difference:
    """A difference that FUSE imposes: a call (a regular expression), the kinds of its descriptors (one each), the
    results in the mount and in the plain directory (one each: an error, or the returned number), and the reason.
    docs/semantics.md describes those that a program can notice. `rare` ones occur in long runs only.
    """
    def __init__(self, reason, call, kinds, mount, plain, rare=False):
        self.call, self.kinds, self.mount, self.plain, self.reason, self.rare = call, kinds, mount, plain, reason, rare

    def covers(self, text, results):
        kinds = ",".join(re.findall(r"\[fd\d+: ([^\]]*)\]", text))
        found = (re.match(self.call, text, re.S), re.fullmatch(self.kinds, kinds),
                 re.fullmatch(self.mount, results[0]), re.fullmatch(self.plain, results[1]))
        if not all(found): return False
        numbers = [match["beyond"] for match in found if "beyond" in match.groupdict()]
        return all(number is None or int(number) >= LARGEST for number in numbers)


def one_of(*numbers): return "|".join(map(str, numbers))

# Kinds of descriptors, with any flags.
FILE, DIRECTORY = r"file 0x[0-9a-f]+", r"directory 0x[0-9a-f]+"
ANY = r"(file|directory|fifo|special) 0x[0-9a-f]+"
DIRECT = r"file 0x[0-9a-f]*[4567cdef][0-9a-f]{3}"  # O_DIRECT
# A position or an offset at or beyond the size of the largest file in the plain directory.
BEYOND, LARGEST = r"(?P<beyond>\d+)", MAX - PAGE
# FS_IOC_GETFLAGS, FS_IOC_GETVERSION, FS_IOC_FSGETXATTR, FS_IOC_GETFSLABEL; FS_IOC_GETFSUUID; FS_IOC_FIEMAP.
ATTRIBUTES, UUID, FIEMAP = one_of(0x80086601, 0x80087601, 0x801C581F, 0x81009431), 0x80111500, 0xC020660B
# Requests that no file system knows, with the size of an argument in their number.
UNKNOWN = one_of(0xDEADBEEF, 0xFFFFFFFF, 0x40046600, 0x41009430)

EXPECTED = [
    Difference("cowlfs has no ioctls of files",
               rf"ioctl\(fd\d+, ({ATTRIBUTES}), ", f"{FILE}|{DIRECTORY}", "ENOTTY", "0|EFAULT"),
    Difference("a mount has no UUID", rf"ioctl\(fd\d+, {UUID}, ", ANY, "ENOTTY", "0|EFAULT"),
    Difference("FUSE has no FIEMAP", rf"ioctl\(fd\d+, {FIEMAP}, ", f"{FILE}|{DIRECTORY}", "ENOTSUP", "EINVAL|EFAULT"),
    Difference("FUSE copies the argument of an ioctl first",
               rf"ioctl\(fd\d+, ({UNKNOWN}), [01]\)", f"{FILE}|{DIRECTORY}", "EFAULT", "ENOTTY"),
    Difference("FUSE has no RWF_DONTCACHE",
               r"preadv2\(.*flags=0x[0-9a-f]*[89a-f][0-7]\) ", FILE, "ENOTSUP", r"\d+|EINVAL"),
    Difference("FUSE has no RWF_NOWAIT",
               r"preadv2\(.*flags=0x[0-9a-f]*[89a-f]\) ", FILE, "ENOTSUP", r"\d+|EAGAIN|EINVAL"),
    Difference("FUSE rejects other modes of fallocate first",
               r"fallocate\(fd\d+, \d+, .*OTHER_MODE", FILE, "ENOTSUP", "EFBIG", rare=True),
    Difference("FUSE_TMPFILE is not implemented", r"(openat|syscall)\(.*O_TMPFILE", "|" + DIRECTORY, "ENOTSUP", "0"),
    Difference("a directory on FUSE has no data and holes",
               r"lseek64\(fd\d+, -?\d+, [34]\)", DIRECTORY, r"ENXIO|\d+", r"\d+"),
    Difference("the last position of a directory differs",
               r"lseek64\(fd\d+, -?\d+, 2\)", DIRECTORY, r"\d+|EINVAL", r"\d+|EINVAL"),
    Difference("a position beyond 16 TiB", r"lseek64\(fd\d+, -?\d+, [012]\)", FILE, BEYOND, "EINVAL"),
    Difference("a copy to beyond 16 TiB",
               rf"copy_file_range\(fd\d+ at \S+ to fd\d+ at ({BEYOND}|None), ", f"{FILE},{FILE}", "0|EINVAL", "EFBIG",
               rare=True),
    Difference("sendfile from beyond 16 TiB",
               r"sendfile\(", f"({ANY}|pipe),{ANY}", "0|EPIPE|EINVAL", "EOVERFLOW", rare=True),
    Difference("FUSE without DAX has no MAP_SYNC",
               r"mmap\(\d+, \d+, 0x80003, fd\d+, \d+\) ", FILE, "ENOTSUP", "EACCES"),
    Difference("O_DIRECT needs no alignment", r"(read|pread|preadv2)\(", DIRECT, r"\d+", "EINVAL", rare=True),
]


class Run:
    """Random calls on two trees."""

    def __init__(self, mount, plain, seed):
        self.sides = Side(mount), Side(plain)
        self.rng = random.Random(seed)
        self.pipes = set()
        # Whether the run allocates blocks; otherwise it has SEEK_DATA and SEEK_HOLE. On ext4, their results for
        # blocks that were allocated and not written depend on the page cache.
        self.allocates = self.chance(50)
        self.known = [b"."]
        self.dirs = [b"."]
        self.as_user, self.who = False, ""
        self.log = collections.deque(maxlen=int(os.environ.get("COWL_LOG", 12)))
        self.found = collections.Counter()
        self.expected = collections.Counter()
        self.calls = collections.Counter()

    # Random arguments.

    def pick(self, *values): return self.rng.choice(values)
    def chance(self, percent): return self.rng.random() * 100 < percent

    def bits(self, *values, most=3):
        """Returns a random combination of `values`."""
        number = 0
        for _ in range(self.rng.randint(0, most)): number |= self.rng.choice(values)
        return number

    def fd(self): return Fd(self.rng.randrange(SLOTS))

    def file(self):
        """Returns a descriptor, which is open in most cases."""
        live = [slot for slot in range(SLOTS) if self.sides[1].slots[slot] >= 0]
        return Fd(self.rng.choice(live)) if live and self.chance(90) else self.fd()

    def source(self):
        """Returns a descriptor to copy from. With O_DIRECT, an unaligned copy works in the mount only."""
        fd = self.file()
        one = self.sides[1].slots[fd.slot]
        if one >= 0 and fcntl.fcntl(one, fcntl.F_GETFL) & os.O_DIRECT: self.close(fd.slot)
        return fd

    def at(self):
        """Returns a descriptor to resolve a path from."""
        return ROOT if self.chance(88) else self.file()

    def old(self): return self.rng.choice(self.known) if self.chance(85) else self.new()

    def new(self):
        name = self.pick(b"a", b"b", b"c", b"d", b"e", b"f", b"dir", b"x y", b"\xff\n", b"n" * 255, b"n" * 256, b".", b"")
        parent = self.rng.choice(self.dirs)
        return name if parent == b"." or self.chance(20) else parent + b"/" + name

    def path(self):
        path = self.old() if self.chance(60) else self.new()
        if self.chance(90) or not path: return path
        return self.pick(path + b"/", path + b"//", path + b"/.", b"./" + path, b".//" + path, b"", path + b"/missing",
                         b"./" * 2047 + b"a", b"./" * 2048 + b"a", b"./" * 1000 + path, b"m" * 4095, b"m" * 4096)

    def offset(self):
        # FUSE removes setuid before a write of a user that fails with EFBIG (docs/semantics.md).
        if self.as_user: return self.small_offset()
        return Number(self.pick(
            0, 0, 1, 100, PAGE - 1, PAGE, PAGE + 1, self.rng.randrange(20000), self.rng.randrange(MIB), -1, -PAGE,
            2**31 - 1, 2**32, MAX - PAGE, MAX - PAGE - 1, MAX - 1, MAX, MAX + PAGE, I64 - PAGE, I64 - 1, I64, -I64))

    def small_offset(self): return Number(self.pick(0, 0, 1, PAGE - 1, PAGE, 5000, 3 * PAGE, self.rng.randrange(200000)))

    def count(self): return self.pick(0, 1, 10, PAGE - 1, PAGE, PAGE + 1, self.rng.randrange(70000))

    def data(self): return In(self.rng.randbytes(self.pick(0, 1, 10, 511, PAGE, PAGE + 1, 20000)))

    def mode(self):
        mode = self.pick(0o644, 0o600, 0o755, 0o777, 0, 0o4755, 0o2755, 0o1777, 0o7777, 0o644, 0o170000, 2**31 - 1)
        # With passthrough, the kernel clears these bits when root writes to an open file (docs/semantics.md).
        return mode & ~0o6000 if PASSTHROUGH else mode

    def id(self): return self.pick(-1, -1, 0, 1000, 1001, 65534, 2**31, -2)

    # Calls.

    def call(self, name, *arguments, opens=None, note=""):
        """Performs a call in both trees and compares. `opens` is a slot for the descriptor that it returns; `note`
        makes a property of the arguments visible for EXPECTED."""
        self.calls[name] += 1
        text = f"{name}({', '.join(str(int(a)) if isinstance(a, Number) else repr(a) for a in arguments)})"
        if opens is not None: text += f" as {Fd(opens)}"
        text += note
        for argument in arguments:
            # Each slot refers to the same kind of object in both trees, or to none.
            if isinstance(argument, Fd): text += f" [{argument}: {self.kind(argument)}]"
        results = []
        for side in self.sides:
            result = side.perform(name, arguments)
            if opens is not None and result[0] >= 0:
                results.append((result, result[0]))
            else: results.append((result, None))
        (ours, our_fd), (theirs, their_fd) = results
        if opens is not None:
            if our_fd is not None and their_fd is not None:
                self.close(opens)
                self.sides[0].slots[opens], self.sides[1].slots[opens] = our_fd, their_fd
            else:
                for fd in (our_fd, their_fd):
                    if fd is not None: os.close(fd)
            ours, theirs = (0 if ours[0] >= 0 else -1, *ours[1:]), (0 if theirs[0] >= 0 else -1, *theirs[1:])
        self.note(text, ours, theirs)
        if theirs[1] == "EFBIG":
            self.drop_capabilities("fremovexattr", *(argument for argument in arguments if isinstance(argument, Fd)))
        return theirs

    def drop_capabilities(self, call, *files):
        """Removes the capabilities of files after an EFBIG: FUSE has removed them already (docs/semantics.md)."""
        for side in self.sides:
            for file in files: side.perform(call, (file, b"security.capability"))

    def note(self, text, ours, theirs):
        brief = f"{text}{self.who} = {theirs if theirs[0] != -1 else theirs[1]}"
        self.log.append(brief[:400])
        if ours == theirs: return False
        for difference in EXPECTED:
            if difference.covers(text, [result[1] or str(result[0]) for result in (ours, theirs)]):
                self.expected[difference.reason] += 1
                # One of the trees may have moved the position: return to a common one.
                for side in self.sides:
                    for slot in map(int, re.findall(r"\bfd(\d+)\b", text)): side.perform("lseek64", [Fd(slot), Number(0), 0])
                return True
        key = (text.split("(")[0], ours[1], theirs[1])
        self.found[key] += 1
        if self.found[key] <= LIMIT:
            print(f"{text[:600]}{self.who}\n    mount: {str(ours)[:600]}\n    plain: {str(theirs)[:600]}")
            if not CONTINUE:
                print("after:\n    " + "\n    ".join(self.log))
        if not CONTINUE: sys.exit(1)

    def kind(self, fd):
        one = self.sides[1].slots[fd.slot]
        if one < 0: return "closed"
        flags = fcntl.fcntl(one, fcntl.F_GETFL)
        mode = os.fstat(one).st_mode
        name = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo"}
        if fd.slot in self.pipes: return "pipe"
        return f"{name.get(stat.S_IFMT(mode), 'special')} {flags:#x}"

    def close(self, slot):
        for side in self.sides:
            if side.slots[slot] >= 0: os.close(side.slots[slot])
            side.slots[slot] = -1
        self.pipes.discard(slot)

    def size(self, fd):
        """Returns the size of a file, or a large number if it has none."""
        one = self.sides[1].slots[fd.slot]
        if one < 0: return 0
        found = os.fstat(one)
        return found.st_size if stat.S_ISREG(found.st_mode) else 0 if not stat.S_ISCHR(found.st_mode) else 1 << 60

    # Kinds of calls.

    def open(self):
        flags = self.pick(os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR, 3) | os.O_NONBLOCK | os.O_NOCTTY
        flags |= self.bits(os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_DIRECTORY, os.O_NOFOLLOW, os.O_PATH,
                           os.O_SYNC, os.O_DSYNC, os.O_NOATIME, os.O_CLOEXEC, os.O_ASYNC, os.O_CREAT,
                           os.O_PATH, os.O_TMPFILE if self.chance(20) else 0)
        # An unaligned direct write works in the mount only, so the trees would differ.
        if flags & 3 == 0 and self.chance(10): flags |= os.O_DIRECT
        slot = self.rng.randrange(SLOTS)
        note = " O_TMPFILE" if flags & os.O_TMPFILE == os.O_TMPFILE else ""
        if self.chance(85):
            return self.call("openat", self.at(), self.path(), flags, self.mode() & 0o7777, opens=slot, note=note)
        if self.chance(50): flags |= self.pick(1 << 30, 1 << 40, 0)
        how = In(struct.pack("QQQ", flags, self.mode() if flags & (os.O_CREAT | os.O_TMPFILE) or self.chance(10) else 0,
                             self.bits(1, 2, 4, 8, 16, 64)))
        self.call("syscall", OPENAT2, self.at(), self.path(), how, self.pick(24, 24, 24, 0, 8, 16), opens=slot, note=note)

    def close_one(self): self.close(self.fd().slot)

    def pipe(self):
        one, two = self.rng.sample(range(SLOTS), 2)
        self.close(one), self.close(two)
        for side in self.sides: side.slots[one], side.slots[two] = os.pipe2(os.O_NONBLOCK)
        self.pipes |= {one, two}

    def duplicate(self):
        fd, slot = self.file(), self.rng.randrange(SLOTS)
        if fd.slot == slot: return
        self.call("fcntl", fd, fcntl.F_DUPFD_CLOEXEC, 3, opens=slot)
        if fd.slot in self.pipes and self.sides[1].slots[slot] >= 0: self.pipes.add(slot)

    def read(self):
        fd, count = self.file(), self.count()
        kind = self.rng.randrange(3)
        if kind == 0: self.call("read", fd, Out(count), count)
        elif kind == 1: self.call("pread", fd, Out(count), count, self.offset())
        else:
            out = Out(count)
            self.vector("preadv2", fd, out, count, self.pick(Number(-1), self.offset()))

    def write(self):
        fd, data = self.file(), self.data()
        kind = self.rng.randrange(3)
        if kind == 0: self.call("write", fd, data, len(data))
        elif kind == 1: self.call("pwrite", fd, data, len(data), self.offset())
        else: self.vector("pwritev2", fd, data, len(data), self.pick(Number(-1), self.offset()))

    def vector(self, name, fd, data, count, offset):
        """Calls preadv2 or pwritev2 with one buffer."""
        # A write that only the plain file system supports (RWF_NOWAIT, RWF_DONTCACHE) would make the trees differ.
        flags = self.bits(1, 2, 4, 16, 64, 256, 1 << 30, *([8, 128] if name == "preadv2" else []),
                          # With passthrough, the kernel ignores RWF_NOAPPEND (docs/semantics.md).
                          *([] if PASSTHROUGH else [32]), most=2)
        results = []
        for side in self.sides:
            buffer = ctypes.create_string_buffer(bytes(data) if isinstance(data, In) else b"", max(count, 1))
            vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), count)
            result = side.perform(name, [fd, vector, 1, offset, flags])
            content = bytes(buffer)[:max(result[0], 0)] if name == "preadv2" else b""
            results.append((result[0], result[1], content))
        if results[1][1] == "EFBIG": self.drop_capabilities("fremovexattr", fd)
        self.calls[name] += 1
        self.note(f"{name}({fd}, {data!r}, {int(offset)}, flags={flags:#x}) [{fd}: {self.kind(fd)}]", *results)

    def seek(self):
        fd = self.file()
        self.call("lseek64", fd, self.offset(), self.pick(0, 1, 2, 5, -1, 100, *([] if self.allocates else [3, 4])))

    def truncate(self):
        self.call("ftruncate", self.file(), self.offset()) if self.chance(70) else self.on_path("truncate", self.offset())

    def on_path(self, name, *rest):
        """Performs a call that has no form relative to a descriptor."""
        path = self.path()
        self.calls[name] += 1
        results = []
        for side in self.sides:
            os.seteuid(0)
            os.fchdir(side.root)
            if self.as_user: os.seteuid(1000)
            fresh = tuple(Out(a.size, a.read) if isinstance(a, Out) else a for a in rest)
            results.append(side.perform(name, (path, *fresh)))
            if results[-1][1] == "EFBIG": side.perform("removexattr", (path, b"security.capability"))
        os.chdir("/")
        self.note(f"{name}({path!r}, {', '.join(str(int(a)) if isinstance(a, Number) else repr(a) for a in rest)})", *results)

    def allocate(self):
        mode = self.pick(0, 0, 1, 2, 3, 8, 16, 17, 32, 64, self.rng.randrange(256), 2**30)
        if not self.allocates: mode = mode & ~16 | 3
        offset, length = self.offset(), self.offset()
        # FUSE has no COLLAPSE_RANGE (8) and INSERT_RANGE (32), with which the trees would differ.
        if mode & 40: length = self.pick(Number(0), Number(-1))
        if length > MIB and not (offset < 0 or offset + length > MAX - PAGE): length = self.small_offset()
        # An allocation up to the maximum size would not fit on the disk, and fail only after filling it.
        if 0 <= offset and 0 < length and offset + length > MIB * 8 and length > MIB and offset + length <= MAX: return
        self.call("fallocate", self.file(), mode, offset, length, note=" OTHER_MODE" if mode & ~19 else "")

    def copy(self):
        one, two = self.source(), self.source()
        length = self.pick(0, 1, PAGE, 10000, self.rng.randrange(MIB), I64, U64, 2**31)
        starts = [self.pick(None, self.offset(), self.small_offset()) for _ in range(2)]
        # The copy of a huge sparse file would take hours.
        if self.size(one) > 4 * MIB or self.size(one) == 0: length = min(length, MIB)
        read = lambda data, _: data
        outs = [Out(8, read, struct.pack("q", start)) if start is not None else 0 for start in starts]
        flags = self.pick(0, 0, 0, 0, 1, 2, -1)
        text = f"{one} at {starts[0]} to {two} at {starts[1]}"
        self.calls["copy_file_range"] += 1
        results = [side.perform("copy_file_range", (one, outs[0], two, outs[1], Number(length if length < 2**63 else -1), flags))
                   for side in self.sides]
        self.note(f"copy_file_range({text}, {length}, {flags}) [{one}: {self.kind(one)}] [{two}: {self.kind(two)}]", *results)

    def pipe_transfer(self):
        one, two = self.source(), self.source()
        count = self.pick(0, 1, PAGE, 10000, 65536, 100000)
        start = self.pick(None, None, self.offset(), self.small_offset())
        offset = Out(8, lambda data, _: data, struct.pack("q", start)) if start is not None else 0
        flags = self.bits(1, 2, 4, 8, 16, 1 << 20, most=2) | 2
        kind = self.rng.randrange(4)
        if kind == 0: self.call("splice", one, offset, two, 0, count, flags)
        elif kind == 1: self.call("splice", one, 0, two, offset, count, flags)
        elif kind == 2: self.call("tee", one, two, count, flags)
        else: self.call("sendfile", one, two, offset, count)
        # The pipe refers to pages of the file, and a later write can change them: read it before that.
        for slot in sorted(self.pipes & {one.slot, two.slot}): self.drain(Fd(slot))

    def drain(self, fd):
        """Reads everything from the pipe that `fd` is an end of."""
        for slot in sorted(self.pipes):
            one, other = os.fstat(self.sides[1].slots[fd.slot]), os.fstat(self.sides[1].slots[slot])
            if one.st_ino != other.st_ino: continue
            while self.call("read", Fd(slot), Out(65536), 65536)[0] > 0: pass

    def control(self):
        fd, pointer = self.file(), self.pick(0, 1, Out(64, lambda *_: b""), In(bytes(64)), In(b"\xff" * 64))
        # No request that freezes, shuts down or resizes the file system of the plain directory.
        number = self.pick(
            0x80086601, 0x801C581F, 0xC020660B, 0x80087601, 0x541B, 0x5421, 0x5451, 0x5450, 0x5452, 2, 1, 0x5401, 0x5413,
            0, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF, 0x80081272, 0x1260, 0x40049409, 0x4020940D, 0xC0189436, 0x40046600,
            0x80111500, 0x81009431, 0x4100942F + 1, 0x5460)
        if number in (0x541B, 0x5421, 0x5452, 2, 1) and isinstance(pointer, int) and pointer: pointer = 0
        if number in (0x5421, 0x5452): pointer = In(struct.pack("i", 1))  # FIONBIO, FIOASYNC
        if number == 0x541B: pointer = Out(4, lambda data, _: data)
        if number == 0x40049409: pointer = self.file()
        self.call("ioctl", fd, number, pointer)

    def status(self):
        mask = self.pick(0x7ff, 0x7ff, 0xfff, 0, 1, 0x200, 0x20, 0xffffffff, 0x80000000, 0x7fffffff, 0x3fff)
        flags = self.bits(AT_NOFOLLOW, AT_EMPTY, AT_EMPTY, 0x800, 0x2000, 0x4000, AT_FOLLOW, 0x8000, 1, most=2)
        # With AT_STATX_DONT_SYNC (0x4000), the result may be stale.
        empty = flags & AT_EMPTY and self.chance(70)
        self.call("statx", self.file() if empty else self.at(), b"" if empty else self.path(), flags, mask,
                  Out(256, read_statx(mask if not flags & 0x4000 else 1)))

    XATTRS = (b"", b"user.", b"user.a", b"user.b", b"user." + b"l" * 250, b"user." + b"l" * 251, b"x" * 255, b"x" * 256,
              b"trusted.a", b"trusted.", b"security.a", b"security.capability", b"system.posix_acl_access",
              b"system.posix_acl_default", b"system.a", b"nonsense", b"user", b"trusted.overlay.opaque", b"user.overlay.opaque",
              b"trusted.overlay.redirect", b"trusted.overlay.overlay.opaque", b"security.selinux", b"\xff", b"user.\xff\n",
              b"user.fuseoverlayfs.opaque", b"user.containers.override_stat", b"trusted.overlay.", b"user.overlay.",
              b"system.sockprotoname", b"system.nfs4_acl", b"com.apple.x", b"os2.a", b"btrfs.compression", b"gfs2.a")

    def value(self):
        entry = lambda tag, bits, number=-1: struct.pack("<HHi", tag, bits, number)
        acl = struct.pack("<I", 2) + entry(1, 7) + entry(2, 5, 1000) + entry(4, 5) + entry(16, 7) + entry(32, 0)
        capability = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
        value = self.pick(b"", b"y", b"n", b"x" * 100, b"x" * 1000, b"x" * 65536, b"x" * 65537, acl, capability, acl,
                          capability, acl[:-8], acl[:-1], acl[:4], b"\x02\0\0\0", b"\x01\0\0\0", capability[:-1],
                          struct.pack("<IIIIII", 0x03000000, 1 << 10, 0, 0, 0, 1000))
        if value and len(value) < 100 and self.chance(15):
            value = bytearray(value); value[self.rng.randrange(len(value))] ^= 1 << self.rng.randrange(8)
        return In(value)

    def xattr(self):
        name = self.rng.choice(self.XATTRS)
        kind, verb = self.pick("", "l", "f"), self.rng.randrange(8)
        def perform(call, *rest):
            if kind == "f": self.call("f" + call, self.file(), *rest)
            else: self.on_path(kind + call, *rest)
        if verb < 3:
            value = self.value()
            perform("setxattr", name, value, len(value), self.pick(0, 0, 0, 1, 2, 3, 4, -1))
        elif verb < 5:
            size = self.pick(0, 1, 4, 300, 65536, 65537, 100000)
            perform("getxattr", name, Out(size, lambda data, count: data[:count]), size)
        elif verb < 6: perform("removexattr", name)
        else:
            size = self.pick(0, 1, 10, 65536, 65537)
            perform("listxattr", Out(size, read_names), size)

    def rename(self):
        flags = self.pick(0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, self.rng.randrange(16), 2**31)
        arguments = self.at(), self.path(), self.at(), self.path()
        # ext4 changes the time of the source's parent also if RENAME_WHITEOUT (4) of a directory fails with ENOTEMPTY.
        if os.path.normpath(arguments[1]) in self.dirs: flags &= ~4
        self.call("renameat2", *arguments, flags)

    def link(self):
        flags = self.bits(AT_EMPTY, AT_FOLLOW, 0x100, 0x200, 1, most=2)
        source = (self.file(), b"") if self.chance(25) else (self.at(), self.path())
        self.call("linkat", *source, self.at(), self.path(), flags)

    def make(self):
        kind = self.rng.randrange(4)
        if kind == 0: self.call("mkdirat", self.at(), self.path(), self.mode())
        elif kind == 1:
            target = self.pick(b"a", b"b", b"dir", b"missing", b"", b"loop", b"t" * 1000, b"t" * 4095, b"t" * 4096, b"dir/a", b"./c")
            self.call("symlinkat", target, self.at(), self.path())
        else:
            # Not S_IFBLK with a device that exists.
            type_ = self.pick(0, stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFDIR,
                              stat.S_IFLNK, 0o130000, 0o170000)
            device = self.pick(0, os.makedev(1, 3), os.makedev(4095, 1), os.makedev(200, 1 << 19)) if type_ != stat.S_IFBLK else os.makedev(4095, 7)
            if type_ == stat.S_IFCHR and device == 0: device = os.makedev(1, 3)
            self.call("mknodat", self.at(), self.path(), type_ | self.mode() & 0o7777, Number(device))

    def remove(self):
        self.call("unlinkat", self.at(), self.path(), self.pick(0, 0, 0, AT_REMOVEDIR, AT_REMOVEDIR, 1, 0x1000, 0xffff))

    def readlink(self):
        size = self.pick(0, 1, 10, 4096, 5000, -1)
        self.call("readlinkat", self.file() if self.chance(20) else self.at(), b"" if self.chance(20) else self.path(),
                  Out(max(size, 0)), size)

    def times(self):
        nanoseconds = lambda: self.pick(0, 999999999, 10**9, -1, 0x3FFFFFFF, 0x3FFFFFFE, 123456789)
        seconds = lambda: self.pick(0, 1, -1, 10**9, 2**31 - 1, 2**31, 2**32, -2**31, -2**31 - 1, 2**34, I64, -I64)
        pair = In(struct.pack("qqqq", seconds(), nanoseconds(), seconds(), nanoseconds())) if self.chance(90) else 0
        flags = self.bits(AT_NOFOLLOW, AT_EMPTY, AT_FOLLOW, 1, most=1)
        kind = self.rng.randrange(3)
        if kind == 0: self.call("utimensat", self.at(), self.path(), pair, flags)
        elif kind == 1: self.call("utimensat", self.file(), b"", pair, flags | AT_EMPTY)
        else: self.call("futimens", self.file(), pair)

    def owner(self):
        flags = self.bits(AT_NOFOLLOW, AT_EMPTY, AT_FOLLOW, 1, most=1)
        kind = self.rng.randrange(6)
        user, group = self.id(), self.id()
        # By a user that has a setuid file open for writing, a chown without changes is as a write (docs/semantics.md).
        if self.as_user and user == group == -1: group = 1000
        if kind == 0: self.call("fchownat", self.at(), self.path(), user, group, flags)
        elif kind == 1: self.call("fchownat", self.file(), b"", user, group, flags | AT_EMPTY)
        elif kind == 2: self.call("fchown", self.file(), user, group)
        elif kind == 3: self.call("fchmod", self.file(), self.mode())
        elif kind == 4: self.call("syscall", FCHMODAT2, self.at(), self.path(), self.mode(), flags)
        else: self.call("faccessat", self.at(), self.path(), self.pick(0, 1, 2, 4, 7, 8, -1), self.bits(AT_NOFOLLOW, AT_EMPTY, 0x200))

    def lock(self):
        fd = self.file()
        if self.chance(30): return self.call("flock", fd, self.pick(1 | 4, 2 | 4, 8, 8 | 4, 0, 3, 32 | 4, 2 | 8, 128 | 4))
        command = self.pick(5, 6, 36, 37, 38 if self.chance(0) else 37, fcntl.F_GETFL, fcntl.F_GETFD, 1034, 1033, 1032, 1035, 1036, 999)
        if command in (5, 6, 36, 37):
            lock = struct.pack("hhxxxxqqixxxx", self.pick(0, 1, 2, 2, 3, -1), self.pick(0, 1, 2, 3),
                               self.offset(), self.offset(), self.pick(0, 0, 0, 1))
            # The process id of the holder in a result is that of this process.
            read = lambda data, _: data[:24] if command in (5, 36) else b""
            return self.call("fcntl", fd, command, Out(32, read, lock))
        if command in (1035, 1036): return self.call("fcntl", fd, command, In(struct.pack("Q", self.pick(0, 1, 5, 6))))
        self.call("fcntl", fd, command, self.pick(0, 1, -1))

    def set_flags(self):
        flags = self.bits(os.O_APPEND, os.O_NOATIME, os.O_ASYNC, os.O_SYNC, os.O_CREAT) | os.O_NONBLOCK
        fd = self.file()
        one = self.sides[1].slots[fd.slot]
        # With passthrough, the kernel appends as long as the file is open with O_APPEND (docs/semantics.md).
        if PASSTHROUGH and one >= 0: flags |= fcntl.fcntl(one, fcntl.F_GETFL) & os.O_APPEND
        self.call("fcntl", fd, fcntl.F_SETFL, flags)

    def sync(self):
        kind = self.rng.randrange(5)
        if kind == 0: self.call("fsync", self.file())
        elif kind == 1: self.call("fdatasync", self.file())
        elif kind == 2: self.call("sync_file_range", self.file(), self.offset(), self.offset(), self.bits(1, 2, 4, 8, most=2))
        elif kind == 3: self.call("posix_fadvise", self.file(), self.offset(), self.offset(), self.pick(0, 1, 2, 3, 4, 5, 6, -1))
        else: self.call("readahead", self.file(), self.offset(), self.count())

    def map(self):
        fd, length = self.file(), self.pick(0, 1, PAGE, 10 * PAGE)
        protection, flags = self.bits(1, 2, 4), self.pick(1, 2, 3, 1, 0, 3 | 0x80000, 1 | 0x4000)
        offset = self.pick(Number(0), Number(PAGE), Number(1), Number(I64 - PAGE + 1), Number(-PAGE))
        results = []
        for side in self.sides:
            result = side.perform("mmap", [0, length, protection, flags, fd, offset])
            if result[0] != -1: libc.munmap(ctypes.c_void_p(result[0]), ctypes.c_size_t(length))
            results.append((0 if result[0] != -1 else -1, result[1]))
        self.calls["mmap"] += 1
        self.note(f"mmap({length}, {protection}, {flags:#x}, {fd}, {int(offset)}) [{fd}: {self.kind(fd)}]", *results)

    def list(self):
        """Lists a directory with a buffer of some size, returns to a position in the middle, and reads the rest."""
        fd = self.file()
        size = self.pick(0, 1, 16, 23, 280, 300, 1024, PAGE, 65536)
        position = self.rng.random()
        results = []
        for side in self.sides:
            found, rest = [], []
            result = side.perform("lseek64", [fd, Number(0), 0])
            while result[0] >= 0:
                buffer = ctypes.create_string_buffer(size or 1)
                result = side.perform("syscall", [GETDENTS, fd, buffer, size])
                if result[0] <= 0: break
                found += entries(bytes(buffer)[:result[0]])
            if result[0] == 0 and found:
                middle = int(position * len(found))
                side.perform("lseek64", [fd, Number(found[middle][2]), 0])
                while True:
                    buffer = ctypes.create_string_buffer(65536)
                    again = side.perform("syscall", [GETDENTS, fd, buffer, 65536])
                    if again[0] <= 0: break
                    rest += entries(bytes(buffer)[:again[0]])
                rest = [name for name, *_ in rest] == [name for name, *_ in found[middle + 1:]] or (rest, found[middle:])
            results.append((result[0], result[1], sorted((name, kind) for name, kind, _ in found), rest))
            side.perform("lseek64", [fd, Number(0), 0])
        self.calls["getdents64"] += 1
        self.note(f"getdents64({fd}, {size}) [{fd}: {self.kind(fd)}]", *results)

    def filesystem(self):
        read = lambda data, _: struct.unpack_from("l", data, 64)  # f_namelen
        if self.chance(50): self.call("fstatfs", self.file(), Out(120, read))
        else: self.on_path("statfs", Out(120, read))

    def seek_data(self): self.call("lseek64", self.file(), self.small_offset(), self.pick(0, 1) if self.allocates else self.pick(3, 4))

    KINDS = {open: 24, close_one: 2, pipe: 1, duplicate: 2, read: 8, write: 10, seek: 5, seek_data: 3, truncate: 4, allocate: 6,
             copy: 6, pipe_transfer: 6, control: 5, status: 6, xattr: 12, rename: 9, link: 5, make: 7, remove: 5,
             readlink: 3, times: 4, owner: 6, lock: 5, set_flags: 2, sync: 4, map: 3, list: 4, filesystem: 1}

    def explore(self):
        """Updates the known paths."""
        self.known, self.dirs = [b"."], [b"."]
        for path, dirs, files in os.walk(self.sides[1].top):
            below = os.path.relpath(path, self.sides[1].top)
            if below.count(b"/") > 3: dirs.clear()
            dirs.sort(), files.sort()
            for name in dirs: self.dirs.append(os.path.normpath(below + b"/" + name))
            self.known += [os.path.normpath(below + b"/" + name) for name in dirs + files]

    def run(self, count):
        kinds, weights = list(self.KINDS), list(self.KINDS.values())
        for step in range(count):
            if step % 40 == 0: self.explore()
            self.as_user = self.chance(12)
            mask = self.pick(0o22, 0o22, 0, 0o77)
            self.who = (" as user 1000" if self.as_user else "") + (f" umask {mask:o}" if mask != 0o22 else "")
            kind = self.rng.choices(kinds, weights)[0]
            os.umask(mask)
            if self.as_user: os.setegid(1000), os.seteuid(1000)
            try: kind(self)
            finally:
                if self.as_user: os.seteuid(0), os.setegid(0)

    def finish(self):
        """Closes all descriptors, truncates huge files, which nothing could read for a comparison, and sets the times
        of FIFOs, which FUSE does not maintain (docs/semantics.md)."""
        for slot in range(SLOTS): self.close(slot)
        for side in self.sides:
            for path, _, files in os.walk(side.top):
                for name in files:
                    full = path + b"/" + name
                    found = os.lstat(full)
                    if stat.S_ISFIFO(found.st_mode): os.utime(full, ns=(0, 0))
                    if stat.S_ISREG(found.st_mode) and found.st_size > 8 * MIB:
                        times = found.st_atime_ns, found.st_mtime_ns
                        os.truncate(full, MIB), os.utime(full, ns=times)


if __name__ == "__main__":
    import time
    if sys.argv[1] == "rows":
        for row in EXPECTED: print("rare:" if row.rare else "common:", row.reason)
        sys.exit(0)
    START = time.time()
    mount, plain, seed, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    PASSTHROUGH, CONTINUE = sys.argv[5] == "passthrough", len(sys.argv) > 6
    LIMIT = int(sys.argv[6]) if CONTINUE else 1
    os.setgroups([])
    for number in (signal.SIGIO, signal.SIGPIPE, signal.SIGXFSZ): signal.signal(number, signal.SIG_IGN)
    run = Run(mount, plain, seed)
    # A path that leaves the trees by mistake reaches only their parent directory.
    assert os.path.dirname(mount) == os.path.dirname(plain)
    os.chroot(os.path.dirname(mount))
    os.chdir("/")
    run.run(count)
    run.finish()
    for reason, times in sorted(run.expected.items()): print(f"expected: {times} x {reason}")
    if CONTINUE:
        for key, times in run.found.most_common(): print(times, *key)
        print(dict(run.calls))
    sys.exit(1 if run.found else 0)
