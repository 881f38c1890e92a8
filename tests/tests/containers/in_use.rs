//! A layer that belongs to a snapshot is never written again, whichever process still holds the mount.

use std::io::Write;
use std::path::{Path, PathBuf};

use cowl_tests::command;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;

const NEEDS: &[Need] = &[Need::Root, Need::Fuse];

/// A mounted container with one file and one snapshot, and where it is mounted.
fn mounted(store: &Store) -> PathBuf {
    let source = store.scratch().make("source");
    std::fs::write(source.join("file"), "one\n").unwrap();
    store
        .cowl(["create", "web", "--from", source.to_str().unwrap()])
        .ok();
    let mount_point = store.cowl(["mount", "web"]).ok();
    store.cowl(["snapshot", "web"]).ok();
    PathBuf::from(String::from_utf8(mount_point.stdout).unwrap().trim_end())
}

/// Writable descriptors and mappings, an unlinked file and one with two names: the snapshot has all of them as they
/// were and copies nothing, and later writes are visible only in the mount.
#[test]
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
fn a_snapshot_is_taken_while_programs_write() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let mount = mounted(&store);
    let script = r#"
import mmap, os, sys
def ask():
    print("ready", flush=True)
    sys.stdin.readline()
log = open("log", "ab", buffering=0)
log.write(b"one\n")
m = os.open("mapped", os.O_RDWR | os.O_CREAT, 0o644)
os.ftruncate(m, 8192)
mapped = mmap.mmap(m, 8192)
os.close(m)
mapped[0:3] = b"one"
gone = open("gone", "w+b", buffering=0)
gone.write(b"one")
os.unlink("gone")
os.link("log", "alias")
big = open("big", "r+b", buffering=0)
ask()
log.write(b"two\n")
mapped[0:3] = b"two"
mapped[4096:4099] = b"two"
gone.seek(0)
gone.write(b"two")
big.write(b"two")
assert open("alias", "rb").read() == b"one\ntwo\n", open("alias", "rb").read()
assert os.path.samefile("alias", "log")
assert os.stat("log").st_ino == os.fstat(log.fileno()).st_ino
gone.seek(0)
assert gone.read() == b"two"
ask()
mapped.flush()
print(open("mapped", "rb").read(3).decode(), flush=True)
"#;
    std::fs::write(mount.join("big"), vec![b'x'; 4 << 20]).unwrap();
    let mut child = std::process::Command::new("python3")
        .args(["-c", script])
        .current_dir(&mount)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut asks = child.stdin.take().unwrap();
    let mut hear = || {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
        line.trim().to_owned()
    };
    assert_eq!(hear(), "ready");
    let used = store.disk_usage();
    store.cowl(["snapshot", "web", "--name", "busy"]).ok();
    let more = store.disk_usage() - used;
    assert!(more < 256 << 10, "{more} bytes were copied");
    asks.write_all(
        b"
",
    )
    .unwrap();
    assert_eq!(hear(), "ready");
    store.cowl(["snapshot", "web", "--name", "later"]).ok();
    asks.write_all(
        b"
",
    )
    .unwrap();
    assert_eq!(hear(), "two");
    assert!(child.wait().unwrap().success());

    for (snapshot, log, mapped, big) in [
        ("busy", "one\n", "one", "xxx"),
        ("later", "one\ntwo\n", "two", "two"),
    ] {
        store.restore("web", snapshot);
        let read = |name: &str| std::fs::read(mount.join(name)).unwrap();
        assert_eq!(read("log"), log.as_bytes(), "{snapshot}");
        assert_eq!(read("alias"), log.as_bytes(), "{snapshot}");
        assert_eq!(&read("mapped")[..3], mapped.as_bytes(), "{snapshot}");
        assert_eq!(&read("big")[..3], big.as_bytes(), "{snapshot}");
        assert!(mount.join("gone").symlink_metadata().is_err(), "{snapshot}");
    }
}

/// A head to which nothing was written but through a mapping is not untouched.
/// Also in a directory of package managers: what was frozen while it was mounted is read by the daemon.
#[test]
fn a_program_that_follows_a_file_sees_what_is_written_after_snapshots() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let mount = mounted(&store);
    let out = store.scratch().join("out");
    let script = r#"
mkdir -p var/log usr/share; echo one > var/log/log; echo one > usr/share/log
tail -q -n +1 -f var/log/log usr/share/log > "$OUT" &
for line in two three; do
    "$COWL" --store "$STORE" snapshot web; cat usr/share/log > /dev/null
    echo $line | tee -a var/log/log >> usr/share/log
done
for attempt in $(seq 100); do [ $(wc -l < "$OUT") -lt 6 ] || break; sleep 0.05; done
kill $!; sort "$OUT" | uniq -c | awk '{ printf "%s %s ", $1, $2 }'"#;
    let mut shell = std::process::Command::new("sh");
    shell
        .args(["-ec", script])
        .current_dir(&mount)
        .env("OUT", &out)
        .env("COWL", cowl_tests::programs::cowl())
        .env("STORE", store.path());
    let output = command::run_command(shell, b"").ok().out();
    assert!(output.ends_with("2 one 2 three 2 two"), "{output}");
}

#[test]
fn data_written_through_a_mapping_is_in_the_snapshot() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let mount = mounted(&store);
    let script = r#"
import mmap, os, sys
fd = os.open("file", os.O_RDWR)
mapped = mmap.mmap(fd, 4)
print("ready", flush=True)
sys.stdin.readline()
mapped[0:3] = b"NEW"
print("ready", flush=True)
sys.stdin.readline()
"#;
    let mut child = std::process::Command::new("python3")
        .args(["-c", script])
        .current_dir(&mount)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut hear = || {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
    };
    let mut asks = child.stdin.take().unwrap();
    hear();
    store.cowl(["snapshot", "web", "--name", "before"]).ok();
    asks.write_all(b"\n").unwrap();
    hear();
    store.cowl(["snapshot", "web", "--name", "after"]).ok();
    store.cowl(["clone", "web", "copy"]).ok();
    for (state, content) in [("web@before", "one"), ("web@after", "NEW"), ("copy", "NEW")] {
        assert_eq!(
            store.cowl(["cat", &format!("{state}:file")]).ok().out(),
            content,
            "{state}"
        );
    }
    asks.write_all(b"\n").unwrap();
    child.wait().unwrap();
}

/// The command that mounts is killed before its daemon runs. No other command may treat the container as not mounted
/// and freeze the layer that the daemon is about to write to.
#[test]
fn a_daemon_that_starts_late_writes_to_no_frozen_layer() {
    let needs = [NEEDS, &[Need::Program("strace")]].concat();
    if !can(&needs) {
        return;
    }
    let store = Store::for_test();
    let mount = mounted(&store);
    std::fs::write(mount.join("file"), "two\n").unwrap();
    store.cowl(["umount", "web"]).ok();
    let mut strace = std::process::Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=fsmount"])
        .args(["-e", "inject=fsmount:delay_enter=3000000"])
        .arg(cowl_tests::programs::cowl())
        .arg("--store")
        .arg(store.path())
        .args(["mount", "web"])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1200));
    let children = format!("/proc/{0}/task/{0}/children", strace.id());
    let child = std::fs::read_to_string(children).unwrap();
    command::run("kill", ["-9", child.trim()]).ok();
    // The command waits for the daemon or reports that the container is busy. It must not freeze the layer that the
    // daemon writes.
    let taken = store.cowl(["snapshot", "web", "--name", "late"]);
    cowl_tests::mount::wait_until("the mount is there", || {
        cowl_tests::mount::at(&mount).is_some()
    });
    std::fs::write(mount.join("file"), "three\n").unwrap();
    if taken.code == 0 {
        assert_eq!(store.cowl(["cat", "web@late:file"]).ok().out(), "two");
    } else {
        assert_eq!(taken.code, 4, "{}", taken.report());
    }
    store.cowl(["umount", "web"]).ok();
    strace.wait().unwrap();
}

/// The unmount itself would succeed: the file is open in a copy of the mount that is not visible to any process.
#[test]
fn a_writer_in_a_copy_of_the_mount_stops_a_restore() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let mount = mounted(&store);
    let copy = store.scratch().make("copy");
    let bind = [Path::new("--bind"), &mount, &copy];
    command::run("mount", bind).ok();
    let mut writer = std::fs::OpenOptions::new()
        .append(true)
        .open(copy.join("file"))
        .unwrap();
    command::run("umount", [Path::new("-l"), &copy]).ok();
    let refused = store.cowl(["restore", "web", "snap0"]);
    assert_eq!(refused.code, 4, "{}", refused.report());
    writer.write_all(b"two\n").unwrap();
    drop(writer);
    // No data was lost, and the container is still mounted.
    assert_eq!(std::fs::read(mount.join("file")).unwrap(), b"one\ntwo\n");
    store.cowl(["restore", "web", "snap0"]).ok();
    assert_eq!(std::fs::read(mount.join("file")).unwrap(), b"one\n");
}
