//! Small new files that the daemon writes although the mount uses passthrough: the choice of these files, and their
//! coherence with other descriptors and mappings.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use cowl_tests::beside::{Beside, Content, MATRIX, NEEDS};
use cowl_tests::conditions::can;
use cowl_tests::mount::Stack;
use cowl_tests::requests::{Counted, Counts};
use cowl_tests::scratch::Scratch;

/// Creates files of these sizes.
fn create(dir: &Path, kind: &str, sizes: &[usize]) {
    for (number, size) in sizes.iter().enumerate() {
        // File::create_new opens it for reading, too.
        let mut file = File::create(dir.join(format!("{kind}{number}"))).unwrap();
        file.write_all(&vec![b'x'; *size]).unwrap();
    }
}

fn count(counts: &Counts, kind: &str) -> u64 {
    counts.get(kind).copied().unwrap_or(0)
}

#[test]
fn the_daemon_writes_small_files_of_a_program_that_creates_many() {
    if !can(&NEEDS) {
        return;
    }
    let scratch = Scratch::for_test();
    let stack = Stack {
        lowers: vec![scratch.make("lower")],
        upper: Some((scratch.make("upper"), scratch.make("work"))),
    };
    let mount = Counted::mount(&stack, &scratch.make("mount"), "passthrough=auto");
    let dir = mount.overlay().path();
    let counts = mount.during(|| create(dir, "large", &[100_000; 50]));
    assert_eq!(count(&counts, "write"), 0, "{counts:?}");
    let counts = mount.during(|| create(dir, "small", &[100; 100]));
    let (written, asked) = (count(&counts, "write"), count(&counts, "getxattr"));
    assert!(
        written >= 80,
        "small files used passthrough after the first ones: {counts:?}"
    );
    assert_eq!(
        written + asked,
        100,
        "a file has one of these requests: {counts:?}"
    );
    // RELEASE is asynchronous, so the files after the first large one may be expected to be small, too.
    let counts = mount.during(|| create(dir, "mixed", &[100_000; 50]));
    assert!(
        count(&counts, "write") <= 40,
        "large files must use passthrough again: {counts:?}"
    );
    mount.unmount();
}

/// Defines `new`, which opens a new file that the daemon writes.
const NEW: &str = r#"
def new(path, flags=0, mode=0o644):
    # More than the small files that the daemon waits for after a mistake.
    for i in range(80):
        os.close(os.open("trained", os.O_WRONLY | os.O_CREAT | os.O_EXCL)); os.unlink("trained")
    time.sleep(0.05)
    for i in range(10):
        os.close(os.open("trained", os.O_WRONLY | os.O_CREAT | os.O_EXCL)); os.unlink("trained")
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, mode)
"#;

#[track_caller]
fn same(script: &str) {
    if !can(&NEEDS) {
        return;
    }
    for options in ["passthrough=auto", "passthrough=all,threaded=0"] {
        eprintln!("{options}");
        let beside = Beside::with(Content::Upper, "os.chmod('.', 0o777)", options);
        beside.same(&format!("{NEW}{script}"));
        beside.mount.unmount();
    }
}

#[test]
fn all_descriptors_and_mappings_show_the_same_data() {
    same(
        r#"
random.seed(11)
size = 65536
writer = new("file"); os.write(writer, bytes(size)); model = bytearray(size)
both, reader = os.open("file", os.O_RDWR), os.open("file", os.O_RDONLY)
direct = os.open("file", os.O_RDONLY | os.O_DIRECT)
stored, shown = mmap.mmap(both, size), mmap.mmap(reader, size, prot=mmap.PROT_READ)
room = mmap.mmap(-1, size)
for step in range(300):
    at = random.randrange(0, size - 5000); data = random.randbytes(random.randrange(1, 5000))
    how = random.choice(("writer", "writer", "vector", "both", "stored", "punch", "zero", "splice", "sendfile", "copied"))
    if how == "writer": assert os.pwrite(writer, data, at) == len(data)
    elif how == "vector": assert os.pwritev(writer, [data[i:i + 7] for i in range(0, len(data), 7)][:1000], at) == min(len(data), 7000)
    elif how == "both": os.pwrite(both, data, at)
    elif how == "stored": stored[at:at + len(data)] = data
    elif how in ("punch", "zero"):
        fallocate(writer, (PUNCH_HOLE if how == "punch" else ZERO) | KEEP_SIZE, at, len(data)); data = bytes(len(data))
    else:
        os.lseek(writer, at, 0)
        if how == "splice":
            out, into = os.pipe(); os.write(into, data); assert os.splice(out, writer, len(data)) == len(data); os.close(out); os.close(into)
        else:
            other = random.randrange(0, size - 5000); data = bytes(model[other:other + len(data)])
            if abs(other - at) < 5000: continue
            if how == "sendfile": os.sendfile(writer, reader, other, len(data))
            else: os.copy_file_range(reader, writer, len(data), other, at)
    model[at:at + len(data)] = data
    for name, got in (("stored", stored[:]), ("shown", shown[:]), ("reader", os.pread(reader, size + 1, 0)), ("both", os.pread(both, size + 1, 0))):
        assert got == model, f"{name} after step {step}, {how}"
    assert os.preadv(direct, [room], 0) == size and room[:] == model, f"direct after step {step}, {how}"
print(of("file"), of(writer))
# Sizes, positions and times.
before = os.stat("file").st_mtime_ns; time.sleep(0.012); os.pwrite(writer, b"end", size + 10)
print(of("file"), os.pread(reader, 20, size), os.stat("file").st_mtime_ns > before)
os.ftruncate(both, 5); print(of(writer), os.lseek(writer, 0, os.SEEK_END), os.write(writer, b"abc"), os.pread(reader, 20, 0))
os.truncate("file", 2); print(of(writer), os.write(writer, b"d"), os.pread(reader, 20, 0))
print(err(os.read, writer, 1), err(mmap.mmap, writer, 1), os.fsync(writer), os.fdatasync(writer))
append = os.open("file", os.O_WRONLY | os.O_APPEND); os.write(append, b"e"); os.lseek(writer, 0, os.SEEK_END)
os.write(writer, b"f"); os.write(append, b"g"); print(os.pread(reader, 20, 0), of("file"))
fcntl.fcntl(writer, fcntl.F_SETFL, os.O_APPEND); os.lseek(writer, 0, 0); os.write(append, b"h"); os.write(writer, b"i")
print(os.pread(reader, 20, 0), of("file"))
"#,
    );
}

#[test]
fn concurrent_writes_appends_and_stores_lose_no_data() {
    same(
        r#"
def run(work):
    pid = os.fork()
    if pid == 0:
        try: work(); os._exit(0)
        finally: os._exit(1)
    return pid
# Stores next to writes in the same page.
for turn in range(20):
    writer = new(f"page{turn}"); os.write(writer, bytes(4096))
    def store():
        mapping = mmap.mmap(os.open(f"page{turn}", os.O_RDWR), 4096)
        for value in range(1, 200):
            for at in range(1, 4096, 512): mapping[at] = value
    pid = run(store)
    for value in range(1, 200):
        for at in range(0, 4096, 1024): os.pwrite(writer, bytes([value]), at)
    assert os.waitpid(pid, 0)[1] == 0
    data = read(f"page{turn}"); os.close(writer)
    assert {data[at] for at in range(0, 4096, 1024)} | {data[at] for at in range(1, 4096, 512)} == {199}, "a store or a write is lost"
# Records of four processes, one of which inherits a descriptor that the daemon writes.
first = new("log"); fcntl.fcntl(first, fcntl.F_SETFL, os.O_APPEND)
def append(tag):
    fd = first if tag == "a" else os.open("log", os.O_WRONLY | os.O_APPEND)
    for i in range(300): assert os.write(fd, f"{tag} {i:05d} {'x' * (i % 90)}\n".encode()) > 0
pids = [run(lambda: append(tag)) for tag in "abcd"]
for pid in pids: assert os.waitpid(pid, 0)[1] == 0
lines = read("log").decode().splitlines(); print(len(lines), len(set(lines)), os.path.getsize("log"))
for tag in "abcd": assert [l.split()[1] for l in lines if l.startswith(tag)] == [f"{i:05d}" for i in range(300)]
"#,
    );
}

#[test]
fn limits_and_privileges_apply_to_writes_by_the_daemon() {
    let script = r#"
import resource
def limited():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    fd = new("limited"); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    print(os.write(fd, b"x" * 1500), err(os.write, fd, b"y"), of("limited"))
child(limited)
bad = new("bad"); page = mmap.mmap(-1, 8192); address = ctypes.addressof(ctypes.c_char.from_buffer(page))
libc.mprotect(ctypes.c_void_p(address + 4096), 4096, 0)
ctypes.set_errno(0); print(libc.write(bad, ctypes.c_void_p(address + 4096), 10), errno.errorcode[ctypes.get_errno()], of("bad"))
# Bits and capabilities that are set while the descriptor is open.
def written(fd, uid, run): child(lambda: run(fd), uid=uid, gid=uid)
for number, (uid, hold) in enumerate(((1001, "bits"), (1001, "capability"), (0, "capability"))):
    for name, run in (
        ("write", lambda fd: os.write(fd, b"x")),
        ("allocate", lambda fd: fallocate(fd, 0, 0, 10)),
        ("truncate", lambda fd: os.ftruncate(fd, 1)),
    ):
        path = f"{name}{number}"; fd = new(path, mode=0o777); os.write(fd, b"abc")
        if hold == "bits": os.chmod(path, 0o6777)
        else: os.setxattr(path, "security.capability", CAPABILITY)
        os.stat(path); reader = os.open(path, os.O_RDONLY)
        written(fd, uid, run)
        # A full stat(2) would refresh the mode.
        print(name, uid, hold, oct(field(path, "mode")), of(path), of(reader), "security.capability" in os.listxattr(path))
# The daemon's cached mode and the one on disk agree after an execve, too.
fd = new("program", mode=0o777); os.write(fd, b'#!/bin/sh\n'); os.chmod("program", 0o4777); os.stat("program")
print(err(os.execv, "./program", ["program"]))
written(fd, 1001, lambda fd: os.write(fd, b"exit 0\n")); print(of("program")); os.close(fd)
# execve uses the cached mode.
content = open("/bin/cat", "rb").read()
for name, uid in (("cat1", 1001), ("cat2", 0)):
    fd = new(name, mode=0o777); assert os.write(fd, content) == len(content)
    os.chmod(name, 0o6777); os.setxattr(name, "security.capability", CAPABILITY); os.stat(name)
    written(fd, uid, lambda fd: os.pwrite(fd, content[:1], 0)); os.close(fd)
    print(name, unless_busy(runs_as)(f"./{name}"), oct(field(name, "mode")))
"#;
    same(&format!("{MATRIX}{script}"));
}
