//! Many layers, many files, many descriptors: the use of resources is bounded. The measurements are printed (`cargo
//! test --test mount scale -- --nocapture`); no time is asserted.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use cowl_tests::beside::{NEEDS, python};
use cowl_tests::command::run;
use cowl_tests::conditions::can;
use cowl_tests::mount::{Overlay, Stack, wait_until};
use cowl_tests::process;
use cowl_tests::scratch::Scratch;

const LAYERS: usize = 500;
/// Files of the walk; `COWL_SCALE_FILES=1000000` for the whole million.
const FILES: usize = 300_000;
const FILES_IN_A_DIR: usize = 1000;
/// The number of inodes that inotify watches hold, to measure the memory of one. A user may have this many watches on
/// a machine with 8 GiB.
const HELD: usize = 50_000;
/// The maximum memory of the daemon for an inode that the kernel knows, and the maximum that may be left after the
/// kernel has forgotten it.
const BYTES_PER_INODE: usize = 300;
const BYTES_LEFT: usize = 150;
/// After a walk, with the listings that are kept: 400 MiB for a million.
const BYTES_PER_FILE: usize = (400 << 20) / 1_000_000;

fn resident(mount: &Overlay) -> usize {
    process::resident(mount.pid().unwrap())
}

fn descriptors(mount: &Overlay) -> usize {
    process::descriptors(mount.pid().unwrap())
}

/// Makes the kernel forget inodes that no process uses.
fn forget(mount_point: &Path) {
    run("sync", ["-f".as_ref(), mount_point.as_os_str()]).ok();
    std::fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
}

#[test]
fn five_hundred_layers_are_one_tree() {
    if !can(&NEEDS) {
        return;
    }
    let scratch = Scratch::new("scale-layers");
    let build = format!(
        r#"
for i in range({LAYERS}):
    top = f"{{i}}"; os.makedirs(top + "/shared/deep"); os.mkdir(f"{{top}}/only{{i}}")
    write(top + "/all", b"%d" % i); write(f"{{top}}/own{{i}}", b"%d" % i); write(f"{{top}}/shared/own{{i}}", b"%d" % i)
    write(top + "/shared/deep/all", b"%d" % i); write(f"{{top}}/shared/gone{{i}}"); write(f"{{top}}/only{{i}}/in")
    # The layer above hides one name of this one.
    if i: os.mknod(f"{{top}}/shared/gone{{i - 1}}", stat.S_IFCHR, 0)
"#
    );
    python(&scratch.make("layers"), &build).ok();
    let stack = Stack {
        // The layer that was created last is on top.
        lowers: (0..LAYERS)
            .rev()
            .map(|i| scratch.join(format!("layers/{i}")))
            .collect(),
        upper: Some((scratch.make("upper"), scratch.make("work"))),
    };
    let start = Instant::now();
    let mount = Overlay::cowlfs(&stack, &scratch.make("mount"), "");
    let mounted = start.elapsed();
    let look = format!(
        r#"
N = {LAYERS}
names = os.listdir("."); assert len(names) == len(set(names)) == 2 * N + 2, len(names)
assert read("all") == read("shared/deep/all") == b"%d" % (N - 1)
inside = os.listdir("shared"); assert len(inside) == N + 2, len(inside)
assert [n for n in inside if n.startswith("gone")] == [f"gone{{N - 1}}"]
for i in range(N):
    assert read(f"own{{i}}") == read(f"shared/own{{i}}") == b"%d" % i and os.listdir(f"only{{i}}") == ["in"]
    assert err(os.stat, f"shared/none{{i}}") == "ENOENT" and (i == N - 1 or err(os.stat, f"shared/gone{{i}}") == "ENOENT")
"#
    );
    python(mount.path(), &look).ok();
    let looked = start.elapsed() - mounted;
    let change = format!(
        r#"
N = {LAYERS}
for i in range(0, N, 7):
    with open(f"shared/own{{i}}", "ab") as f: f.write(b" more")
    os.chmod(f"own{{i}}", 0o600); os.unlink(f"only{{i}}/in"); os.rmdir(f"only{{i}}")
    assert read(f"shared/own{{i}}") == b"%d more" % i
os.rename("shared", "moved"); write("all", b"new")
"#
    );
    python(mount.path(), &change).ok();
    mount.unmount();
    let mount = Overlay::cowlfs(&stack, &scratch.make("mount"), "");
    let again = format!(
        r#"
N = {LAYERS}
assert len(os.listdir("moved")) == N + 2 and read("moved/deep/all") == b"%d" % (N - 1) and read("all") == b"new"
for i in range(N):
    assert read(f"moved/own{{i}}") == (b"%d more" % i if i % 7 == 0 else b"%d" % i) and os.path.exists(f"only{{i}}") == (i % 7 != 0)
"#
    );
    python(mount.path(), &again).ok();
    println!(
        "{LAYERS} layers: mounted in {mounted:?}, everything looked at in {looked:?}, {} descriptors, {} KiB",
        descriptors(&mount),
        resident(&mount) / 1024
    );
    mount.unmount();
}

#[test]
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
fn a_walk_over_many_files_uses_bounded_memory_and_releases_it() {
    if !can(&NEEDS) {
        return;
    }
    let files: usize = match std::env::var("COWL_SCALE_FILES") {
        Ok(number) => number.parse().unwrap(),
        Err(_) => FILES,
    };
    let dirs = files.div_ceil(FILES_IN_A_DIR);
    let scratch = Scratch::new("scale-files");
    // In memory: nothing is measured but the mount.
    let base = scratch.make("base");
    let size = format!("-osize={}m,nr_inodes=0", 256 + 2 * files / 1000);
    run(
        "mount",
        [
            "-ttmpfs".as_ref(),
            size.as_ref(),
            "cowl-scale".as_ref(),
            base.as_os_str(),
        ],
    )
    .ok();
    let build = format!(
        "for i in range({dirs}):
    os.mkdir(f'{{i}}'); d = os.open(f'{{i}}', os.O_RDONLY)
    for j in range({FILES_IN_A_DIR}): os.mknod(f'file-{{i}}-{{j}}', dir_fd=d)
    os.close(d)"
    );
    python(&scratch.make("base/lower"), &build).ok();
    let stack = Stack {
        lowers: vec![scratch.join("base/lower")],
        upper: Some((scratch.make("base/upper"), scratch.make("base/work"))),
    };
    let mount = Overlay::cowlfs(&stack, &scratch.make("mount"), "");
    // A small first walk, so that one-time allocations do not count.
    python(mount.path(), "for e in os.scandir('0'): e.stat()").ok();
    let before = resident(&mount);
    // An inotify watch holds its inode, so that no other process on the machine can make the kernel forget it.
    let mut holder = Command::new("python3")
        .args(["-c", HOLDER, &HELD.to_string(), &FILES_IN_A_DIR.to_string()])
        .current_dir(mount.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut text = String::new();
    BufReader::new(holder.stdout.take().unwrap())
        .read_line(&mut text)
        .unwrap();
    assert_eq!(text.trim(), HELD.to_string());
    let held = resident(&mount);
    let each = held.saturating_sub(before) / HELD;
    drop(holder.stdin.take());
    assert!(holder.wait().unwrap().success());
    forget(mount.path());
    wait_until("the daemon to give memory back", || {
        resident(&mount) < before + HELD * BYTES_LEFT
    });
    let forgotten = resident(&mount);

    let walk = format!(
        "seen = 0
for i in range({dirs}):
    for e in os.scandir(f'{i}'): assert e.stat(follow_symlinks=False).st_size == 0; seen += 1
print(seen)",
        i = "{i}"
    );
    let start = Instant::now();
    let seen: usize = python(mount.path(), &walk).ok().out().parse().unwrap();
    let took = start.elapsed();
    assert_eq!(seen, dirs * FILES_IN_A_DIR);
    let walked = resident(&mount);
    println!(
        "KiB resident: {} at first; {} with {HELD} inodes known ({each} bytes each); {} when they are forgotten; \
         {} after a walk over {files} files, which took {took:?}; {} descriptors",
        before / 1024,
        held / 1024,
        forgotten / 1024,
        walked / 1024,
        descriptors(&mount)
    );
    assert!(each <= BYTES_PER_INODE, "{each} bytes an inode");
    assert!(
        walked < before + files * BYTES_PER_FILE,
        "{} bytes after a walk over {files} files",
        walked
    );
    assert!(descriptors(&mount) < 3000, "{}", descriptors(&mount));
    mount.unmount();
}

const HOLDER: &str = r#"
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
held, per_dir, fd = int(sys.argv[1]), int(sys.argv[2]), libc.inotify_init1(0)
for n in range(held):
    i, j = divmod(n, per_dir)
    if libc.inotify_add_watch(fd, b"%d/file-%d-%d" % (i, i, j), 0x400) < 0: sys.exit(os.strerror(ctypes.get_errno()))
print(held, flush=True)
sys.stdin.read()
"#;

#[test]
fn descriptors_are_bounded() {
    if !can(&NEEDS) {
        return;
    }
    const OPEN: usize = 10_000;
    let scratch = Scratch::new("scale-descriptors");
    let stack = Stack {
        lowers: vec![scratch.make("lower")],
        upper: Some((scratch.make("upper"), scratch.make("work"))),
    };
    let build = format!(
        "for i in range({OPEN}):
    os.makedirs(f'{{i % 5000}}/{{i}}'); write(f'{{i % 5000}}/{{i}}/f', b'%d' % i)"
    );
    python(&scratch.join("lower"), &build).ok();
    let mount = Overlay::cowlfs(&stack, &scratch.make("mount"), "");
    let count = format!("len(os.listdir('/proc/{}/fd'))", mount.pid().unwrap());
    let script = format!(
        r#"
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE); resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
assert hard >= {OPEN} + 100, hard
# Known, but not open: 25,000 objects.
for i in range({OPEN}): assert os.stat(f"{{i % 5000}}/{{i}}/f").st_size
known = {count}
# Open, every other one for writing, which copies it up.
fds = [os.open(f"{{i % 5000}}/{{i}}/f", os.O_RDWR if i % 2 else os.O_RDONLY) for i in range({OPEN})]
opened = {count}
for i, fd in enumerate(fds): assert os.pread(fd, 10, 0) == b"%d" % i
# An evicted descriptor is reopened, also for a write, and for a file whose name was removed or moved.
for i in range(1, {OPEN}, 2): assert os.pwrite(fds[i], b"written", 0) == 7
for i in range(1, {OPEN}, 100): os.unlink(f"{{i % 5000}}/{{i}}/f")
for i in range(1, {OPEN}, 100): assert os.pwrite(fds[i], b"again", 2) == 5 and os.fstat(fds[i]).st_nlink == 0
for i in range(3, {OPEN}, 100): os.rename(f"{{i % 5000}}/{{i}}/f", f"{{i}}.moved")
for i, fd in enumerate(fds): assert not i % 2 or os.pread(fd, 10, 0) == (b"wragain" if i % 100 == 1 else b"written")
for i, fd in enumerate(fds): os.fstat(fd); os.close(fd)
deadline = time.monotonic() + 20
while {count} > 3000 and time.monotonic() < deadline: time.sleep(0.01)
print("known", known, "open", opened, "closed", {count})
# At most 2048 directories and 4096 contents, and some of the daemon itself.
assert known < 3000 and opened < 6500 and {count} <= 3000
"#
    );
    println!("descriptors: {}", python(mount.path(), &script).ok().out());
    mount.unmount();
}
