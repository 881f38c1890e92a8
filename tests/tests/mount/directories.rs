//! Names, depths, listings and concurrent changes of directories, compared with a plain directory.

use cowl_tests::beside::{Beside, Content, NEEDS, beside, beside_lower, python};
use cowl_tests::conditions::can;
use cowl_tests::mount::{Overlay, Stack};
use cowl_tests::tree::{self, Compare};

#[test]
fn names_up_to_255_bytes_work_and_longer_ones_are_refused_by_every_call() {
    let names = "names = [c * n for n in range(250, 256) for c in ('f', 'd')] + ['\\u00e9' * 127, b'\\xff\\xfe' * 127, b'\\n \\x01\\\\:,\"\\'#' * 28]\n";
    beside(
        &format!(
            "{names}{}",
            "for i, n in enumerate(names): os.mkdir(n) if i % 2 else write(n)
os.symlink(names[0], 'link'); write('short'); os.mkdir('dir')"
        ),
        &format!(
            "{names}{}",
            r#"
for i, n in enumerate(names):
    print(of(n)); os.chmod(n, 0o700); assert os.fsencode(n) in os.listdir(b".")
    new = os.fsencode(n)[:-1] + b"!"
    os.rename(n, new); print(of(new), err(os.stat, n)); os.rename(new, n)
    if i % 2: os.rmdir(n); os.mkdir(n); write(os.fsencode(n) + b"/" + os.fsencode(n)); print(os.listdir(os.fsencode(n)))
    else: write(n, b"again"); os.unlink(n); write(n); os.setxattr(n, "user.a", b"b")
for length in (256, 257, 300, 1023, 1024, 1025, 4094):
    n = "x" * length
    for label, call in {"stat": lambda: os.stat(n), "lstat": lambda: os.lstat(n), "open": lambda: os.open(n, os.O_RDONLY),
        "create": lambda: os.open(n, os.O_CREAT | os.O_RDWR), "mkdir": lambda: os.mkdir(n), "mknod": lambda: os.mknod(n),
        "mkfifo": lambda: os.mkfifo(n), "unlink": lambda: os.unlink(n), "rmdir": lambda: os.rmdir(n), "symlink": lambda: os.symlink("x", n),
        "link": lambda: os.link("short", n), "rename": lambda: os.rename("short", n), "rename from": lambda: os.rename(n, "short"),
        "rename dir": lambda: os.rename("dir", n), "getxattr": lambda: os.getxattr(n, "user.a"), "chmod": lambda: os.chmod(n, 0),
        "truncate": lambda: os.truncate(n, 0), "inside": lambda: os.stat("dir/" + n), "inside nothing": lambda: os.stat("none/" + n)}.items():
        got = err(call); print(length, label, got)
        if label != "inside nothing": assert got == "ENAMETOOLONG", (length, label, got)
print(err(os.symlink, "t" * 4095, "longest"), os.readlink("longest") == "t" * 4095, err(os.symlink, "t" * 4096, "longer"))
print(sorted(os.listdir(b".")))
"#
        ),
    );
}

/// Paths are far longer than PATH_MAX: every access goes through directory descriptors, never through a whole path.
#[test]
fn trees_deeper_than_path_max_work() {
    if !can(&NEEDS) {
        return;
    }
    let build = r#"
top = os.getcwd()
for i in range(60): os.mkdir(f"{i:0150d}"); write("file", b"%d" % i); os.chdir(f"{i:0150d}")
write("deepest", b"deep"); os.symlink("deepest", "link"); os.mkdir("sub"); write("sub/file"); os.link("deepest", "alias"); os.chdir(top)
os.chdir(top)
"#;
    let go = "names = [f'{i:0150d}' for i in range(60)]\nfor n in names: os.chdir(n)\n";
    let change = r#"
print(sorted(os.listdir(".")), read("deepest"), of("sub"))
fd = os.open("deepest", os.O_RDWR); os.pwrite(fd, b"DEEP", 0); print(read("alias"), read("link"), of("alias"))
os.chmod("sub/file", 0o600); os.rename("sub/file", "moved"); write("sub/second"); os.mkdir("new"); write("new/x"); os.link("moved", "new/linked")
os.rename("sub", "renamed"); os.rename("renamed", "again"); print(sorted(os.listdir(".")), of("new/linked"))
os.setxattr("moved", "user.a", b"b"); os.unlink("link"); os.symlink("x", "link"); os.mkfifo("fifo")
"#;
    let look = r#"
for n in sorted(os.listdir(".")): print(n, of(n))
print(read("moved"), read("new/linked"), os.listdir("again"), os.getxattr("moved", "user.a"), err(os.stat, "sub"), err(os.stat, "renamed"))
for i in range(59): os.chdir(".."); print(read("file") if os.path.exists("file") else "none", end=" ")
# A path just as long as one may be, and one that is too long.
os.chdir(".."); path = "/".join(names[:26]); path += "/" + "./" * ((4095 - len(path) - 5) // 2)
path = path + "file" if len(path) == 4091 else path + "/file"
print(len(path), of(path), err(os.stat, "./" + path)); assert len(path) == 4095, len(path)
os.chmod(path, 0o640); write(path, b"x"); print(of(path))
"#;
    for content in [Content::Lower, Content::Upper] {
        let beside = Beside::new(content, build);
        beside.same(&format!("{go}{change}"));
        beside.same(&format!("{go}{look}"));
        let beside = beside.remounted();
        beside.same(&format!("{go}{look}"));
        beside.same("import shutil\nfor n in os.listdir('.'): shutil.rmtree(n) if os.path.isdir(n) else os.unlink(n)\nprint(os.listdir('.'))");
        beside.mount.unmount();
    }
}

const LISTING: &str = r#"
class Dirent(ctypes.Structure):
    _fields_ = [("ino", ctypes.c_uint64), ("off", ctypes.c_int64), ("len", ctypes.c_uint16), ("type", ctypes.c_uint8), ("name", ctypes.c_char * 256)]
libc.opendir.restype = ctypes.c_void_p; libc.readdir.restype = ctypes.POINTER(Dirent); libc.telldir.restype = ctypes.c_long
class Listing:
    def __init__(self, path): self.dir = ctypes.c_void_p(libc.opendir(os.fsencode(path)))
    def next(self):
        entry = libc.readdir(self.dir)
        return entry.contents.name.decode() if entry else None
    def rest(self): return list(iter(self.next, None))
    def tell(self): return libc.telldir(self.dir)
    def seek(self, at): libc.seekdir(self.dir, ctypes.c_long(at))
    def rewind(self): libc.rewinddir(self.dir)
    def close(self): libc.closedir(self.dir)
"#;

#[test]
fn a_listing_can_be_rewound_and_sought() {
    beside(
        "os.mkdir('d')
for i in range(500): write(f'd/f{i}')",
        &format!(
            "{LISTING}{}",
            r#"
d = Listing("d")
all = d.rest(); print(sorted(all)); assert len(all) == len(set(all)) == 502
d.rewind(); assert d.rest() == all
# Every position that telldir returned can be sought.
d.rewind(); positions = []
for i in range(502): positions.append(d.tell()); d.next()
for i in random.Random(3).sample(range(502), 60):
    d.seek(positions[i]); assert d.rest() == all[i:], i
# Rewinding after the end shows later additions and removals.
write("d/new"); os.unlink("d/f7"); os.rename("d/f8", "d/renamed"); os.mkdir("d/dir")
d.rewind(); now = d.rest(); print(sorted(set(now) - set(all)), sorted(set(all) - set(now)))
d.rewind(); d.next(); write("d/newer"); d.rewind(); assert "newer" in d.rest()
d.close()
# The type and the inode number in a listing equal those of stat.
for e in os.scandir("d"): assert e.inode() == e.stat(follow_symlinks=False).st_ino and e.is_dir() == (e.name == "dir")
"#
        ),
    );
}

#[test]
fn a_listing_during_changes_has_each_permanent_entry_once() {
    beside(
        "os.mkdir('d')
for i in range(1200): write(f'd/stays{i:05d}')
for i in range(300): write(f'd/goes{i:05d}')",
        &format!(
            "{LISTING}{}",
            r#"
def busy(which):
    for i in range(which, 300, 2):
        os.unlink(f"d/goes{i:05d}"); write(f"d/comes{i:05d}"); os.rename(f"d/comes{i:05d}", f"d/came{i:05d}")
        if i % 5 == 0: os.unlink(f"d/came{i:05d}")
    os._exit(0)
pids = []
for which in (0, 1):
    pid = os.fork()
    if pid == 0: busy(which)
    pids.append(pid)
stays = {f"stays{i:05d}" for i in range(1200)}
rounds, left = 0, len(pids)
while left or rounds < 3:
    while left and os.waitpid(-1, os.WNOHANG)[0]: left -= 1
    d = Listing("d"); seen = d.rest(); d.close(); rounds += 1
    assert len(seen) == len(set(seen)), f"twice: {[n for n in seen if seen.count(n) > 1][:5]}"
    assert stays <= set(seen), f"lost: {sorted(stays - set(seen))[:5]}"
print(sorted(os.listdir("d")))
"#
        ),
    );
}

/// The kernel caches listings, and finds the position of a reader in its cache. An entry that another process has
/// removed must not end the listing of a process that is still reading.
#[test]
fn two_readers_of_a_directory_miss_no_entry_during_removals() {
    beside(
        "os.mkdir('d')
for i in range(3000): write(f'd/f{i:05d}')",
        r#"
def parts(fd, size):
    buffer = ctypes.create_string_buffer(size)
    while True:
        got = libc.syscall(217, fd, buffer, size)
        assert got >= 0
        if got == 0: return
        names, at = [], 0
        while at < got:
            length = int.from_bytes(buffer.raw[at + 16:at + 18], "little")
            names.append(buffer.raw[at + 19:at + length].split(b"\0")[0].decode()); at += length
        yield names
names = {f"f{i:05d}" for i in range(3000)}
os.listdir("d"); os.listdir("d")
for turn in range(16):
    fd = os.open("d", os.O_RDONLY); whole = sum(parts(fd, 1 << 16), []); os.close(fd)
    fd = os.open("d", os.O_RDONLY); reader = parts(fd, 300 + 97 * turn); seen = []
    for _ in range(1 + turn % 5): seen += reader.__next__()
    # The one goes that comes next, its neighbours, and some others.
    next = whole.index(seen[-1]) + 1
    going = set(whole[next - 2:next + 2] + random.Random(turn).sample(sorted(names), 30)) & names; names -= going
    for name in going: os.unlink(f"d/{name}")
    # Others list it to the end, so that the kernel has it all.
    for _ in range(2): assert set(os.listdir("d")) == names
    for more in reader: seen += more
    os.close(fd)
    assert names <= set(seen), (turn, len(names - set(seen)))
    assert len(seen) == len(set(seen)), turn
# One process removes entries while it reads on, and lists the directory in between.
fd = os.open("d", os.O_RDONLY)
for some in parts(fd, 512):
    for name in some:
        if name not in (".", ".."): os.unlink(f"d/{name}")
    os.listdir("d")
os.close(fd); print(os.listdir("d")); os.rmdir("d")
"#,
    );
}

/// The kernel checks for changes of the directory itself, and `..` is not changed by any of them.
#[test]
fn a_moved_directory_has_its_new_parent_in_its_listing() {
    beside(
        "for n in ('a/moved/in', 'b', 'c/swapped/in'): os.makedirs(n)",
        &format!(
            "{LISTING}{}",
            r#"
def above(path):
    d = Listing(path); found = {}
    while True:
        entry = libc.readdir(d.dir)
        if not entry: break
        found[entry.contents.name.decode()] = entry.contents.ino
    d.close()
    assert found["."] == os.stat(path).st_ino
    return found[".."]
for _ in range(3): assert above("a/moved") == os.stat("a").st_ino and above("c/swapped") == os.stat("c").st_ino
os.rename("a/moved", "b/moved")
for _ in range(3): assert above("b/moved") == os.stat("b").st_ino
exchange = 2
assert libc.renameat2(-100, b"b/moved", -100, b"c/swapped", exchange) == 0
for _ in range(3): assert above("c/swapped") == os.stat("c").st_ino and above("b/moved") == os.stat("b").st_ino
print(os.listdir("b/moved"), os.listdir("c/swapped"))
"#
        ),
    );
}

#[test]
fn a_directory_with_100000_names_is_listed_completely() {
    if !can(&NEEDS) {
        return;
    }
    let beside = Beside::new(
        Content::Lower,
        "os.mkdir('big')
for i in range(60000): os.mknod(f'big/l{i}')",
    );
    // The rest is created in the upper layer while it is not mounted.
    let Beside {
        mount,
        stack,
        plain,
        scratch,
    } = beside;
    let mount_point = mount.path().to_owned();
    mount.unmount();
    let rest = "import os\nfor i in range(40000): os.mknod(f'big/u{i}')\nfor i in range(0, 60000, 1000): os.path.exists(f'big/l{i}') and os.unlink(f'big/l{i}')";
    python(&scratch.join("upper"), &format!("os.mkdir('big')\n{rest}\nfor i in range(0, 60000, 1000): os.mknod(f'big/l{{i}}', stat.S_IFCHR, 0)")).ok();
    python(&plain, rest).ok();
    let beside = Beside {
        mount: Overlay::cowlfs(&stack, &mount_point, ""),
        stack,
        plain,
        scratch,
    };
    let output = beside.same(
        r#"
names = os.listdir("big"); print(len(names), len(set(names)))
print(sum(e.stat(follow_symlinks=False).st_size for e in os.scandir("big")))
os.chmod("big/l59999", 0o600); os.unlink("big/l1"); write("big/l1000"); os.rename("big/u1", "big/u100000"); os.rename("big/l2", "big/l100000")
print([err(of, f"big/{n}") for n in ("l0", "l1", "l2", "l1000", "l59999", "u1", "u100000", "l100000", "none")])
import hashlib
print(hashlib.sha256("\n".join(sorted(os.listdir("big"))).encode()).hexdigest())
import shutil
os.rename("big", "moved"); print(len(os.listdir("moved")))
"#,
    );
    assert!(output.starts_with("99940 99940"), "{output}");
    beside.mount.unmount();
}

#[test]
fn a_name_can_change_between_file_and_directory_across_layers() {
    if !can(&NEEDS) {
        return;
    }
    let build = "write('a', b'file'); os.makedirs('b/sub'); write('b/sub/x'); os.symlink('a', 'c'); os.mkdir('e'); write('e/old'); os.mkfifo('p')";
    let steps = [
        "os.unlink('a'); os.mkdir('a'); write('a/in'); os.unlink('b/sub/x'); os.rmdir('b/sub'); os.rmdir('b'); write('b', b'now a file')
os.unlink('c'); os.mkdir('c'); os.unlink('e/old'); os.rmdir('e'); os.mkdir('e'); os.unlink('p'); write('p')",
        "os.unlink('a/in'); os.rmdir('a'); write('a', b'file again'); os.unlink('b'); os.makedirs('b/sub'); write('b/sub/y')
os.rmdir('c'); os.symlink('b', 'c'); write('e/new'); os.unlink('p'); os.mkdir('p'); write('p/q')",
        "os.unlink('a'); os.mkdir('a'); os.rename('b', 'a/b'); os.mkdir('b'); write('b/z'); os.rename('e', 'f'); os.symlink('f', 'e')
os.rename('p/q', 'q'); os.rmdir('p'); os.rename('q', 'p')",
        "import shutil; shutil.rmtree('a'); shutil.rmtree('b'); os.rename('f', 'a'); os.unlink('e'); os.mkdir('e'); os.mkdir('b'); os.unlink('p'); os.mkfifo('p')",
    ];
    let Beside {
        mount,
        mut stack,
        plain,
        scratch,
    } = Beside::new(Content::Lower, build);
    let mount_point = mount.path().to_owned();
    mount.unmount();
    for (turn, step) in steps.into_iter().enumerate() {
        let mount = Overlay::cowlfs(&stack, &mount_point, "");
        // The same name is made and removed many times as well.
        let again = "
for i in range(30):
    write('same', b'%d' % i); os.unlink('same'); os.mkdir('same'); write('same/in'); os.unlink('same/in'); os.rmdir('same')
    os.symlink('x', 'same'); os.unlink('same')";
        for dir in [mount.path(), &plain] {
            python(dir, &format!("{step}{again}")).ok();
        }
        for again in [false, true] {
            let (ours, theirs) = (
                tree::read(&mount_point).unwrap(),
                tree::read(&plain).unwrap(),
            );
            tree::assert_same(
                &format!("step {turn}, {again}"),
                &ours,
                &theirs,
                Compare::HISTORY,
            );
        }
        mount.unmount();
        // The upper layer becomes a lower one from here on.
        let upper = scratch.join(format!("upper{turn}"));
        std::fs::rename(scratch.join("upper"), &upper).unwrap();
        stack = Stack {
            lowers: std::iter::once(upper).chain(stack.lowers).collect(),
            upper: Some((scratch.make("upper"), scratch.join("work"))),
        };
        let mount = Overlay::cowlfs(&stack, &mount_point, "");
        let (ours, theirs) = (
            tree::read(&mount_point).unwrap(),
            tree::read(&plain).unwrap(),
        );
        tree::assert_same(
            &format!("mounted anew after step {turn}"),
            &ours,
            &theirs,
            Compare::HISTORY,
        );
        mount.unmount();
    }
}

#[test]
fn concurrent_changes_lose_no_names_and_leave_no_directories() {
    beside_lower(
        r#"
for f in ("one", "two", "three"):
    os.mkdir(f)
    for i in range(6):
        for j in range(40): write(f"{f}/{i}-{j}"); os.mkdir(f"{f}/d{i}-{j}"); write(f"{f}/d{i}-{j}/in")
os.mkdir("shared")
"#,
        r#"
DIRS = ("one", "two", "three")
def own(i):
    """Changes names of its own in shared directories. No other process may affect them."""
    dice = random.Random(i)
    files = {f"{f}/{i}-{j}" for f in DIRS for j in range(40)}
    dirs = {f"{f}/d{i}-{j}" for f in DIRS for j in range(40)}
    for step in range(400):
        action, to = dice.randrange(7), f"{dice.choice(DIRS)}/{i}-n{step}"
        if action == 0: write(to); files.add(to)
        elif action == 1: os.mkdir(to); write(to + "/in"); dirs.add(to)
        elif action == 2 and files: n = dice.choice(sorted(files)); os.unlink(n); files.remove(n)
        elif action == 3 and dirs: n = dice.choice(sorted(dirs)); os.unlink(n + "/in"); os.rmdir(n); dirs.remove(n)
        elif action == 4 and files: n = dice.choice(sorted(files)); os.rename(n, to); files.remove(n); files.add(to)
        elif action == 5 and dirs: n = dice.choice(sorted(dirs)); os.rename(n, to); dirs.remove(n); dirs.add(to)
        elif files: n = dice.choice(sorted(files)); os.link(n, to); files.add(to)
    for n in sorted(files): assert stat.S_ISREG(os.lstat(n).st_mode), n
    for n in sorted(dirs): assert os.listdir(n) == ["in"], n
    # All processes compete for these names: only these results are possible.
    for step in range(300):
        n, m = f"shared/{dice.randrange(5)}", f"shared/{dice.randrange(5)}"
        call = dice.choice((lambda: os.mkdir(n), lambda: os.rmdir(n), lambda: os.rename(n, m), lambda: write(n), lambda: os.unlink(n),
                            lambda: os.listdir(n), lambda: os.mkdir(n + "/in"), lambda: os.rmdir(n + "/in")))
        got = err(call)
        assert not isinstance(got, str) or got in ("EEXIST", "ENOENT", "ENOTEMPTY", "EISDIR", "ENOTDIR", "EINVAL", "ETXTBSY"), got
    listed = {f"{f}/{n}" for f in DIRS for n in os.listdir(f) if n.startswith((f"{i}-", f"d{i}-"))}
    assert listed == files | dirs, listed ^ (files | dirs)
    os._exit(0)
pids = []
for i in range(6):
    pid = os.fork()
    if pid == 0:
        try: own(i)
        except BaseException:
            import traceback
            traceback.print_exc(); os._exit(1)
    pids.append(pid)
failed = [pid for pid in pids if os.waitpid(pid, 0)[1] != 0]
assert not failed, failed
print([sorted(os.listdir(f)) for f in DIRS])
for n in os.listdir("shared"): assert os.lstat("shared/" + n)
import shutil
for f in DIRS + ("shared",): shutil.rmtree(f)
print(os.listdir("."))
"#,
    );
}
