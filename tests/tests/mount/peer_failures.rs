//! Known failures of other overlays in user space: special files in a layer, leftovers, a killed daemon, a base that
//! stays busy.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use cowl_tests::beside::{Beside, Content, NEEDS, beside, python};
use cowl_tests::command::{self, run};
use cowl_tests::conditions::{Need, can};
use cowl_tests::mount::{Overlay, Stack};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare};

/// Opening a FIFO blocks until its other end is open, and opening a device can have any effect. Reading a layer must
/// do neither. The alarm ends a script that hangs.
#[test]
fn a_fifo_or_device_in_a_layer_blocks_no_reader() {
    beside(
        r#"
import socket
for i in range(6): os.mkfifo(f"fifo{i}")
os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3)); os.mknod("tty", stat.S_IFCHR | 0o600, os.makedev(5, 0))
os.mknod("nothing", stat.S_IFBLK | 0o600, os.makedev(259, 77777)); os.mknod("nochar", stat.S_IFCHR | 0o600, os.makedev(511, 1))
s = socket.socket(socket.AF_UNIX); s.bind("socket"); s.close(); os.mkdir("sub"); os.mkfifo("sub/fifo"); os.link("fifo4", "alias")
"#,
        r#"
signal.alarm(60)
import subprocess
# A process that blocks in the open of a FIFO does not block other opens.
waits = os.fork()
if waits == 0: os.open("fifo5", os.O_RDONLY); os._exit(0)
for n in ("fifo0", "null", "tty", "nothing", "nochar", "socket", "sub/fifo", "alias"):
    print(n, of(n), os.lstat(n).st_rdev, sorted(os.listxattr(n, follow_symlinks=False)))
    os.chmod(n, 0o640); os.chown(n, 5, 6); os.utime(n, ns=(7, 8)); os.setxattr(n, "trusted.a", b"b"); os.link(n, n + ".l"); os.rename(n, n + ".r")
    print(of(n + ".r"), of(n + ".l"), os.lstat(n + ".r").st_rdev, times(n + ".l")[:2]); os.unlink(n + ".l")
print(subprocess.call(["cp", "-a", ".", "../copy-" + os.path.basename(os.getcwd())]))
# A FIFO connects two processes before and after its copy-up, also if one opened it before the copy-up.
def through(path):
    pid = os.fork()
    if pid == 0: fd = os.open(path, os.O_WRONLY); os.write(fd, b"through"); os._exit(0)
    fd = os.open(path, os.O_RDONLY); got = os.read(fd, 100); os.waitpid(pid, 0); os.close(fd); return got
print(through("fifo1")); os.chmod("fifo1", 0o600); print(through("fifo1"))
reader = os.open("fifo2", os.O_RDONLY | os.O_NONBLOCK); os.chmod("fifo2", 0o622); os.rename("fifo2", "fifo9")
for i in range(2):
    child(lambda: os.write(os.open("fifo9", os.O_WRONLY), b"w%d" % i), uid=1000 + i)
    print(os.read(reader, 100))
print(err(os.open, "fifo3", os.O_WRONLY | os.O_NONBLOCK), err(os.open, "nochar.r", os.O_RDONLY), err(os.open, "nothing.r", os.O_RDONLY), err(os.open, "socket.r", os.O_RDONLY))
fd = os.open("null.r", os.O_RDWR); print(os.write(fd, b"x"), os.read(fd, 5)); print(err(os.truncate, "fifo3", 0), err(os.truncate, "null.r", 0))
os.unlink("fifo3"); os.mkfifo("fifo3"); print(of("fifo3"), through("fifo3"))
os.kill(waits, signal.SIGKILL); os.waitpid(waits, 0); print(sorted(os.listdir(".")))
"#,
    );
}

#[test]
fn the_work_directory_is_cleaned_and_leftovers_have_no_effect() {
    if !can(&NEEDS) {
        return;
    }
    let build = "for i in range(40): write(f'f{i}', b'old')\nos.mkdir('d')";
    let beside = Beside::new(Content::Lower, build);
    let work = beside.scratch.join("work");
    let leave = "
# Names that a daemon uses, and others: directories, whiteouts, and files without read permission.
for i in range(64):
    n = f'work/#{i:x}'
    (lambda: write(n, b'left'), lambda: (os.makedirs(n + '/a/b'), write(n + '/a/b/c', mode=0)), lambda: os.mknod(n, stat.S_IFCHR, 0), lambda: os.mkfifo(n), lambda: os.symlink('/', n))[i % 5]()
write('work/other'); os.makedirs('work/deep' + '/x' * 100)";
    let Beside { mount, stack, .. } = &beside;
    let (mount_point, stack) = (mount.path().to_owned(), stack.clone());
    let Beside {
        mount,
        scratch,
        plain,
        ..
    } = beside;
    mount.unmount();
    python(&work, leave).ok();
    let mount = Overlay::cowlfs(&stack, &mount_point, "");
    assert_eq!(std::fs::read_dir(work.join("work")).unwrap().count(), 0);
    let change = "
for i in range(40): os.chmod(f'f{i}', 0o600); write(f'f{i}', b'new')
for i in range(20): os.unlink(f'f{i}'); os.mkdir(f'f{i}')";
    for dir in [mount.path(), &plain] {
        python(dir, change).ok();
    }
    let (ours, theirs) = (
        tree::read(&mount_point).unwrap(),
        tree::read(&plain).unwrap(),
    );
    tree::assert_same("over leftovers", &ours, &theirs, Compare::HISTORY);
    mount.unmount();
    assert_eq!(std::fs::read_dir(work.join("work")).unwrap().count(), 0);
    drop(scratch);
}

/// The daemon is killed in the middle of copy-ups, creations, renames and removals, several times. Completed
/// operations persist, others have no effect, and nothing else exists.
#[test]
fn a_killed_daemon_leaves_every_file_old_or_new() {
    if !can(&NEEDS) {
        return;
    }
    let scratch = Scratch::new("killed");
    let stack = Stack {
        lowers: vec![scratch.make("lower")],
        upper: Some((scratch.make("upper"), scratch.make("work"))),
    };
    let build = "
for r in range(6):
    for i in range(200):
        os.makedirs(f'{r}/d{i}'); write(f'{r}/d{i}/f', b'old' * 3000); write(f'{r}/d{i}/gone'); os.link(f'{r}/d{i}/f', f'{r}/d{i}/alias')";
    python(&scratch.join("lower"), build).ok();
    let lower = tree::read(&scratch.join("lower")).unwrap();
    let mount_point = scratch.make("mount");
    for round in 0..6 {
        let mount = Overlay::cowlfs(&stack, &mount_point, "");
        // The script changes one directory after another and prints each when it is complete.
        let mut writer = Command::new("python3")
            .args(["-c", WRITER, &round.to_string()])
            .current_dir(mount.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(writer.stdout.take().unwrap()).lines();
        let mut done = 0;
        while done < 5 + 9 * round {
            assert_eq!(lines.next().unwrap().unwrap(), done.to_string());
            done += 1;
        }
        mount.kill();
        done += lines.map_while(Result::ok).count();
        writer.wait().unwrap();
        assert!(done < 200, "it was not killed in the middle of it");

        let mount = Overlay::cowlfs(&stack, &mount_point, "");
        let check = format!(
            r#"
r, done = {round}, {done}
for i in range(200):
    here = sorted(os.listdir(f"{{r}}/d{{i}}"))
    new = sorted(["alias", "f2", "made"]); old = sorted(["alias", "f", "gone"])
    if i < done: assert here == new, (i, here)
    elif i > done: assert here == old, (i, here)
    else: assert set(here) <= set(new + old) and "alias" in here and ("f" in here) != ("f2" in here), (i, here)
    f = f"{{r}}/d{{i}}/f2" if "f2" in here else f"{{r}}/d{{i}}/f"
    data = read(f); assert data == read(f"{{r}}/d{{i}}/alias") and os.stat(f).st_nlink == 2 and os.path.samefile(f, f"{{r}}/d{{i}}/alias")
    assert data == (b"new" * 3000 if i < done else b"old" * 3000) or i == done and len(data) == 9000, (i, data[:10])
    assert os.stat(f).st_mode & 0o777 == (0o600 if i < done else 0o644) or i == done
"#
        );
        python(mount.path(), &check).ok();
        mount.unmount();
        assert_eq!(
            std::fs::read_dir(scratch.join("work/work"))
                .unwrap()
                .count(),
            0
        );
    }
    let after = tree::read(&scratch.join("lower")).unwrap();
    tree::assert_same("the lower layer", &after, &lower, Compare::IDENTICAL);
}

const WRITER: &str = r#"
import os, sys
for i in range(200):
    d = f"{sys.argv[1]}/d{i}/"
    fd = os.open(d + "f", os.O_RDWR); os.pwrite(fd, b"new" * 3000, 0); os.close(fd)
    os.chmod(d + "f", 0o600); os.rename(d + "f", d + "f2"); os.unlink(d + "gone"); os.mkdir(d + "made")
    print(i, flush=True)
"#;

/// Unmounts the overlay and then immediately the file system of its layers, as a user would.
#[test]
fn unmount_releases_the_layers_immediately() {
    let needs = [&NEEDS[..], &[Need::Program("mkfs.ext4")]].concat();
    if !can(&needs) {
        return;
    }
    let scratch = Scratch::new("base-free");
    let image = scratch.join("image");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    run("mkfs.ext4", [Path::new("-q"), &image]).ok();
    let (base, mount_point) = (scratch.make("base"), scratch.make("mount"));
    for _ in 0..10 {
        run("mount", [Path::new("-oloop"), &image, &base]).ok();
        let stack = Stack {
            lowers: vec![scratch.make("base/lower")],
            upper: Some((scratch.make("base/upper"), scratch.make("base/work"))),
        };
        // In the background, as it is used.
        let mut daemon = Command::new(programs::cowlfs());
        daemon.arg("-o").arg(stack.options("")).arg(&mount_point);
        command::run_command(daemon, b"").ok();
        python(
            &mount_point,
            "for i in range(50): os.makedirs(f'd{i}/e', exist_ok=True); write(f'd{i}/e/f')\nfor i in range(50): read(f'd{i}/e/f')",
        )
        .ok();
        run("umount", [&mount_point]).ok();
        run("umount", [&base]).ok();
    }
}
