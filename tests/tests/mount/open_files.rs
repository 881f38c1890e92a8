//! Open files: content, attributes and lifetime, compared with a plain directory.

use cowl_tests::beside::{Beside, Content, NEEDS, beside, beside_lower, python};
use cowl_tests::conditions::can;

#[test]
fn an_unlinked_file_is_usable_until_it_is_closed() {
    beside(
        r#"
for name in ("unlinked", "over", "under", "read", "both", "dir-file"): write(name, b"content of " + name.encode())
os.link("both", "both2"); os.makedirs("dir/sub"); write("exchanged")
"#,
        r#"
for name, how in (("unlinked", os.O_RDWR), ("under", os.O_RDWR), ("read", os.O_RDONLY)):
    fd = os.open(name, how)
    os.rename("over", "under") if name == "under" else os.unlink(name)
    print(name, of(fd), os.pread(fd, 100, 0)); assert os.fstat(fd).st_nlink == 0
    if how == os.O_RDWR:
        print(os.pwrite(fd, b"more", 5), os.pread(fd, 100, 0), of(fd))
        os.ftruncate(fd, 3); os.fsync(fd); print(of(fd), os.pread(fd, 100, 0))
        fallocate(fd, 0, 0, 5000); print(of(fd))
    os.fchmod(fd, 0o4711); os.fchown(fd, 3, 4); print(of(fd))
    os.setxattr(fd, "user.a", b"b"); print(os.getxattr(fd, "user.a"), os.listxattr(fd))
    os.utime(fd, ns=(5, 6)); print(os.fstat(fd).st_mtime_ns, of(fd)); assert os.fstat(fd).st_nlink == 0
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY); print(os.pread(again, 100, 0) == os.pread(fd, 100, 0)); os.close(again)
    print(err(os.link, f"/proc/self/fd/{fd}", "back", follow_symlinks=True))
    os.close(fd)
fd = os.open("both", os.O_RDWR); os.unlink("both"); print(of(fd)); os.write(fd, b"x"); print(of(fd), read("both2"))
os.unlink("both2"); print(of(fd)); os.close(fd)
print(read("under"), err(read, "unlinked"), sorted(os.listdir(".")))
# Directories behave alike.
fd = os.open("dir/sub", os.O_RDONLY); os.rmdir("dir/sub")
print(os.fstat(fd).st_nlink, os.listdir(fd), err(os.open, "x", os.O_CREAT | os.O_RDWR, dir_fd=fd), err(os.mkdir, "x", dir_fd=fd))
os.fchmod(fd, 0o700); print(of(fd))
"#,
    );
}

/// Verifies that every operation that docs/semantics.md lists as unsupported fails with the documented error and
/// changes nothing.
#[test]
fn operations_without_a_fuse_request_are_refused() {
    if !can(&NEEDS) {
        return;
    }
    let build = "os.mkdir('dir'); write('file', b'x' * 16384); write('other')";
    let beside = Beside::new(Content::Lower, build);
    python(
        beside.mount.path(),
        r#"
assert err(os.open, "dir", os.O_TMPFILE | os.O_RDWR) == "ENOTSUP" and os.listdir("dir") == []
# Programs with a fallback for O_TMPFILE work.
import tempfile
with tempfile.TemporaryFile(dir="dir") as file: file.write(b"x"); file.seek(0); assert file.read() == b"x"
assert os.listdir("dir") == []
fd, other = os.open("file", os.O_RDWR), os.open("other", os.O_RDONLY)
for mode in (COLLAPSE, INSERT): assert err(fallocate, fd, mode, 0, 4096) == "ENOTSUP"
FICLONE, FICLONERANGE, FIEMAP = 0x40049409, 0x4020940D, 0xC020660B
assert err(fcntl.ioctl, fd, FICLONE, other) == "ENOTSUP", err(fcntl.ioctl, fd, FICLONE, other)
assert err(fcntl.ioctl, fd, FIEMAP, bytes(32)) in ("ENOTSUP", "ENOTTY")
assert os.pread(fd, 20000, 0) == b"x" * 16384
# Birth time: statx does not claim to know it.
buffer = ctypes.create_string_buffer(256)
assert libc.statx(AT_FDCWD, b"file", 0, 0xFFF, buffer) == 0
mask = struct.unpack_from("I", buffer)[0]; assert mask & 0x7FF == 0x7FF and not mask & 0x800, hex(mask)
"#,
    )
    .ok();
    beside.mount.unmount();
}

#[test]
fn direct_and_buffered_reads_agree() {
    beside(
        "write('file', bytes(range(256)) * 256)",
        r#"
random.seed(7)
size = 65536
model = bytearray(bytes(range(256)) * 256)
buffered = os.open("file", os.O_RDWR); direct = os.open("file", os.O_RDWR | os.O_DIRECT)
other = os.open("file", os.O_RDONLY | os.O_DIRECT)
mapped = mmap.mmap(buffered, size)
room = mmap.mmap(-1, size)
def check_all(step):
    assert os.pread(buffered, size, 0) == model, f"buffered read after step {step}"
    for fd in (direct, other):
        got = os.preadv(fd, [room], 0); assert got == size and room[:] == model, f"direct read after step {step}"
    assert mapped[:] == model, f"mapped after step {step}"
check_all(-1)
for step in range(150):
    at, length = random.randrange(0, 15) * 4096, 4096
    data = random.randbytes(length)
    how = random.choice(("buffered", "direct", "mapped", "punch"))
    if how == "buffered": os.pwrite(buffered, data, at)
    elif how == "direct": assert os.pwritev(direct, [aligned(data)], at) == length
    elif how == "mapped": mapped[at:at + length] = data; mapped.flush()
    else: fallocate(buffered, PUNCH_HOLE | KEEP_SIZE, at, length); data = bytes(length)
    model[at:at + length] = data
    check_all((step, how))
# Beyond the end, at it, and across it.
os.ftruncate(buffered, 5000)
print(os.preadv(direct, [room], 4096), room[:904] == model[4096:5000], os.preadv(direct, [room], 8192), of(direct))
print(os.pwritev(direct, [aligned(b"z" * 4096)], 8192), of("file"), os.pread(buffered, 10, 5000), os.pread(buffered, 3, 8192))
"#,
    );
}

#[test]
fn concurrent_appends_lose_no_data() {
    beside(
        "write('log', b'start\\n')",
        r#"
def append(tag):
    fd = os.open("log", os.O_WRONLY | os.O_APPEND)
    for i in range(300): assert os.write(fd, f"{tag} {i:05d} {'x' * 50}\n".encode()) > 0
    os._exit(0)
pids = []
for tag in "abc":
    pid = os.fork()
    if pid == 0: append(tag)
    pids.append(pid)
for pid in pids: assert os.waitpid(pid, 0)[1] == 0
lines = read("log").decode().splitlines()
print(len(lines), lines[0], len(set(lines)))
for tag in "abc": assert [l.split()[1] for l in lines if l.startswith(tag)] == [f"{i:05d}" for i in range(300)]
# An offset means nothing to a descriptor that appends, as Linux has it.
fd = os.open("log", os.O_RDWR | os.O_APPEND); os.pwrite(fd, b"end\n", 0); print(read("log")[:6], read("log")[-4:])
"#,
    );
}

#[test]
fn sparse_files_remain_sparse_and_holes_are_reported() {
    beside(
        r#"
for name in ("sparse", "data", "other"):
    fd = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(fd, 300 << 20); os.pwrite(fd, b"a" * 65536, 10 << 20); os.pwrite(fd, b"b" * 4096, 299 << 20); os.fsync(fd); os.close(fd)
"#,
        r#"
def ends(fd):
    found, at = [], 0
    while True:
        at = err(os.lseek, fd, at, os.SEEK_DATA)
        if isinstance(at, str): return found, at
        end = os.lseek(fd, at, os.SEEK_HOLE); found.append((at, end)); at = end
fd = os.open("sparse", os.O_RDWR)
print(ends(fd), os.fstat(fd).st_blocks)
assert os.fstat(fd).st_blocks < 1000, os.fstat(fd).st_blocks
print([err(os.lseek, fd, at, how) for at in (0, 11 << 20, 300 << 20, 301 << 20, -1) for how in (os.SEEK_DATA, os.SEEK_HOLE)])
os.chmod("other", 0o600); assert os.stat("other").st_blocks < 1000; print(os.stat("other").st_blocks)
fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 10 << 20, 65536); os.pwrite(fd, b"c", 150 << 20); os.fsync(fd); print(ends(fd))
fallocate(fd, ZERO, 0, 4096); os.fsync(fd); print(of(fd), os.pread(fd, 4, 0))
fallocate(fd, 0, 300 << 20, 4096); print(of(fd)); fallocate(fd, KEEP_SIZE, 301 << 20, 8192); print(of(fd))
print([err(fallocate, fd, mode, at, length) for mode, at, length in ((0, 0, 0), (0, -1, 5), (PUNCH_HOLE, 0, 4096), (0, 1 << 62, 1 << 62), (KEEP_SIZE | 1024, 0, 5))])
ro = os.open("sparse", os.O_RDONLY); print(err(fallocate, ro, 0, 0, 4096), err(os.ftruncate, ro, 5))
# Copies below the mount; offsets of the descriptors move as they should.
src, dst = os.open("data", os.O_RDONLY), os.open("copy", os.O_RDWR | os.O_CREAT, 0o644)
left, copied = 12 << 20, 0
while left: n = os.copy_file_range(src, dst, left); assert n > 0; left -= n; copied += n
print(copied, os.lseek(src, 0, os.SEEK_CUR), os.lseek(dst, 0, os.SEEK_CUR), of(dst))
assert read("copy") == os.pread(src, 12 << 20, 0)
print(err(os.copy_file_range, src, src, 10, 0, 5), err(os.copy_file_range, src, ro, 10), os.copy_file_range(src, dst, 10, 400 << 20, 0))
print(err(os.copy_file_range, dst, dst, 10, 0, 5), os.copy_file_range(dst, dst, 4096, 0, 8192))
"#,
    );
}

#[test]
fn old_descriptors_and_mappings_see_later_writes() {
    beside_lower(
        "for n in ('file', 'cut', 'private'): write(n, b'old' * 3000)
os.link('file', 'alias')",
        r#"
reader = os.open("file", os.O_RDONLY); other = os.open("alias", os.O_RDONLY)
shared = mmap.mmap(reader, 9000, prot=mmap.PROT_READ); private = mmap.mmap(reader, 9000, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
print(shared[:6], private[4096:4099]); private[0:3] = b"own"
writer = os.open("file", os.O_RDWR); os.pwrite(writer, b"NEW", 0); os.pwrite(writer, b"NEW", 5000)
print(shared[:6], shared[5000:5003], os.pread(reader, 6, 0), os.pread(other, 3, 5000), private[:3])
assert shared[:3] == b"NEW" and os.pread(reader, 3, 0) == b"NEW"
both = mmap.mmap(writer, 9000); both[100:103] = b"map"
print(shared[100:103], os.pread(reader, 3, 100), os.pread(other, 3, 100), read("alias")[100:103])
os.ftruncate(writer, 50); print(of(reader), os.pread(reader, 100, 40), len(read("alias")))
os.ftruncate(writer, 9000); print(os.pread(reader, 3, 40), os.pread(reader, 3, 60), shared[60:63])
# A reader whose file is truncated and rewritten meanwhile.
fd = os.open("cut", os.O_RDONLY); print(os.read(fd, 3)); write("cut", b"12"); print(os.read(fd, 3), os.pread(fd, 5, 0), of(fd))
write("cut", b"123456"); print(os.read(fd, 10))
"#,
    );
}

#[test]
fn locks_survive_a_copy_up() {
    beside_lower(
        "write('file'); os.link('file', 'alias'); write('flocked')",
        r#"
def lock(fd, kind, start=0, length=0): return err(fcntl.lockf, fd, kind | fcntl.LOCK_NB, length, start)
def others():
    def look():
        fd = os.open("alias", os.O_RDWR)
        print("another process", lock(fd, fcntl.LOCK_EX, 0, 3), lock(fd, fcntl.LOCK_SH, 0, 3), lock(fd, fcntl.LOCK_EX, 3, 3), lock(fd, fcntl.LOCK_EX, 50, 1))
        f = os.open("flocked", os.O_RDONLY)
        print(err(fcntl.flock, f, fcntl.LOCK_EX | fcntl.LOCK_NB), err(fcntl.flock, f, fcntl.LOCK_SH | fcntl.LOCK_NB))
    child(look)
reader = os.open("file", os.O_RDONLY); print(lock(reader, fcntl.LOCK_SH, 0, 3))
flocked = os.open("flocked", os.O_RDONLY); print(err(fcntl.flock, flocked, fcntl.LOCK_EX))
writer = os.open("file", os.O_RDWR); os.write(writer, b"copied up"); print(lock(writer, fcntl.LOCK_EX, 50, 1))
os.chmod("flocked", 0o600); write("flocked", b"now"); others()
# Open file description locks: held by the description, not by the process.
OFD_SETLK = 37
ofd = lambda fd, kind: err(fcntl.fcntl, fd, OFD_SETLK, struct.pack("hhqqi4x", kind, 0, 200, 10, 0))
one, two = os.open("file", os.O_RDWR), os.open("alias", os.O_RDWR)
print(isinstance(ofd(one, fcntl.F_WRLCK), bytes), ofd(two, fcntl.F_WRLCK)); os.close(one); print(isinstance(ofd(two, fcntl.F_WRLCK), bytes))
fcntl.flock(flocked, fcntl.LOCK_UN); fcntl.lockf(reader, fcntl.LOCK_UN); others()
# A lease is granted if no other descriptor conflicts, and broken by an open that conflicts.
lease = lambda fd, kind: err(fcntl.fcntl, fd, fcntl.F_SETLEASE, kind)
write("leased"); a = os.open("leased", os.O_RDONLY); print(lease(a, fcntl.F_RDLCK), lease(a, fcntl.F_UNLCK))
b = os.open("leased", os.O_RDWR); print(lease(a, fcntl.F_RDLCK), lease(b, fcntl.F_WRLCK)); os.close(b)
broken = []; signal.signal(signal.SIGIO, lambda *_: broken.append(1)); print(lease(a, fcntl.F_RDLCK))
print(err(os.open, "leased", os.O_WRONLY | os.O_NONBLOCK), broken, lease(a, fcntl.F_UNLCK))
"#,
    );
}

#[test]
fn a_running_program_cannot_be_written() {
    beside(
        r#"
import shutil
for name in ("program", "other"): shutil.copy("/bin/sleep", name); os.chmod(name, 0o755)
"#,
        r#"
import subprocess
run = subprocess.Popen(["./program", "60"])
while os.readlink(f"/proc/{run.pid}/exe").rsplit("/", 1)[-1] != "program": time.sleep(0.01)
size = os.stat("program").st_size
print([err(os.open, "program", how) for how in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND)])
print(err(os.truncate, "program", 5), os.stat("program").st_size == size)
os.chmod("program", 0o700); os.utime("program"); os.rename("program", "moved"); print(err(os.open, "moved", os.O_RDWR))
print(run.poll()); run.kill(); run.wait()
fd = os.open("moved", os.O_RDWR); print("open for writing:", err(subprocess.call, ["./moved", "0"])); os.close(fd)
print(subprocess.call(["./moved", "0"]), subprocess.call(["./other", "0"]))
fd = os.open("other", os.O_RDWR); os.close(fd); print(subprocess.call(["./other", "0"]))
"#,
    );
}
