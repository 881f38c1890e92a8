//! Passthrough: files that the kernel reads and writes without requests, the visibility of changes between processes,
//! and the requests that are not sent any more.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use cowl_tests::command::{run, run_command, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::images::Kind;
use cowl_tests::mount::{Overlay, Stack, wait_until};
use cowl_tests::scratch::Scratch;
use rustix::fs::XattrFlags;

/// A mount over a lower with texts in several directories, a program and a library.
struct Mounted {
    scratch: Scratch,
    overlay: Option<Overlay>,
}

impl Mounted {
    fn new(options: &str) -> Option<Self> {
        if !can(&[Need::Root, Need::Fuse]) {
            return None;
        }
        let scratch = Scratch::for_test();
        let lower = scratch.make("lower");
        fs::write(lower.join("text"), "what is below\n").unwrap();
        for dir in ["usr/share", "usr/local/share", "var/usr", "var/protected"] {
            fs::create_dir_all(lower.join(dir)).unwrap();
            // A small file is read by the daemon in every directory.
            let large = "what is below\n".repeat(20_000);
            fs::write(lower.join(dir).join("text"), large).unwrap();
            fs::write(lower.join(dir).join("small"), "what is below\n").unwrap();
        }
        for name in ["text", "small"] {
            let path = lower.join("var/protected").join(name);
            fs::set_permissions(path, PermissionsExt::from_mode(0o444)).unwrap();
        }
        for (name, start) in [("archive", "PK\x03\x04"), ("database", "SQLite format 3\0")] {
            for dir in ["usr/share", "var"] {
                let content = [start, &" ".repeat(300_000)].concat();
                fs::write(lower.join(dir).join(name), content).unwrap();
            }
        }
        fs::write(lower.join("script"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(lower.join("script"), PermissionsExt::from_mode(0o755)).unwrap();
        fs::copy("/bin/true", lower.join("program")).unwrap();
        fs::write(lower.join("lib.so.1"), "a library\n").unwrap();
        let stack = Stack {
            lowers: vec![lower],
            upper: Some((scratch.make("upper"), scratch.make("work"))),
        };
        let log = scratch.join("log");
        let overlay = Overlay::cowlfs_logging(&stack, &scratch.make("m"), options, &log);
        Some(Self {
            scratch,
            overlay: Some(overlay),
        })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.scratch.join("m").join(name)
    }

    fn below(&self, name: &str) -> PathBuf {
        self.scratch.join("lower").join(name)
    }

    /// Returns the number of requests of this kind that the kernel has sent. The daemon logs a request before it
    /// replies.
    fn asked(&self, request: &str) -> usize {
        let log = fs::read_to_string(self.scratch.join("log")).unwrap();
        let word = format!(" {request} ");
        log.lines()
            .filter(|line| line.contains("FUSE(") && line.contains(&word))
            .count()
    }

    fn unmount(mut self) {
        self.overlay.take().unwrap().unmount();
    }
}

fn open(path: &Path) -> File {
    File::open(path).unwrap()
}

fn open_to_write(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

fn text(file: &File) -> String {
    let mut buffer = vec![0; 1 << 16];
    let got = file.read_at(&mut buffer, 0).unwrap();
    buffer.truncate(got);
    buffer.escape_ascii().to_string()
}

#[test]
fn passthrough_io_sends_no_requests() {
    for (options, asked) in [("", 0), ("passthrough=off", 1)] {
        let Some(mounted) = Mounted::new(options) else {
            return;
        };
        fs::write(mounted.at("new"), "x".repeat(10_000)).unwrap();
        let mut file = OpenOptions::new()
            .append(true)
            .open(mounted.at("new"))
            .unwrap();
        file.write_all(b"y").unwrap();
        assert_eq!(fs::read(mounted.at("new")).unwrap().len(), 10_001);
        assert_eq!(fs::read(mounted.at("lib.so.1")).unwrap(), b"a library\n");
        assert!(text(&open(&mounted.at("usr/share/text"))).len() > 60_000);
        sh_in(&mounted.at(""), "./program").ok();
        drop(file);
        assert_eq!(mounted.asked("READ").min(1), asked, "{options}: reads");
        assert_eq!(mounted.asked("WRITE").min(1), asked, "{options}: writes");
        mounted.unmount();
    }
}

#[test]
fn repeated_opens_read_by_passthrough() {
    let Some(mounted) = Mounted::new("") else {
        return;
    };
    for _ in 0..3 {
        assert_eq!(fs::read(mounted.at("lib.so.1")).unwrap(), b"a library\n");
    }
    // Only the open sends a request. The requests for the large file show that others would be counted.
    assert_eq!(mounted.asked("READ"), 0);
    assert!(text(&open(&mounted.at("var/usr/text"))).starts_with("what is below"));
    assert_eq!(mounted.asked("READ").min(1), 1);
    mounted.unmount();
}

#[test]
fn a_write_is_visible_at_once_to_all_processes_and_in_every_attribute() {
    for options in ["", "passthrough=read", "passthrough=off"] {
        let Some(mounted) = Mounted::new(options) else {
            return;
        };
        let path = mounted.at("file");
        fs::write(&path, "one").unwrap();
        let reader = open(&path);
        let writer = open_to_write(&path);
        let before = fs::metadata(&path).unwrap();
        wait_for_clock(&mounted.scratch.join("upper"), before.mtime_nsec());
        writer.write_all_at(b"twoo", 0).unwrap();
        let after = fs::metadata(&path).unwrap();
        assert_eq!(
            (text(&reader).as_str(), after.len()),
            ("twoo", 4),
            "{options}"
        );
        assert!(mtime(&after) > mtime(&before), "{options}");
        assert_eq!(mtime(&after), (after.ctime(), after.ctime_nsec()));

        let mut append = OpenOptions::new().append(true).open(&path).unwrap();
        append.write_all(b"!").unwrap();
        assert_eq!(
            (text(&reader).as_str(), reader.metadata().unwrap().len()),
            ("twoo!", 5)
        );
        writer.set_len(2).unwrap();
        assert_eq!(
            (text(&reader).as_str(), fs::metadata(&path).unwrap().len()),
            ("tw", 2)
        );
        append.write_all(b"three").unwrap();
        assert_eq!(text(&reader), "twthree");
        File::create(&path).unwrap();
        assert_eq!(
            (text(&reader).as_str(), writer.metadata().unwrap().len()),
            ("", 0)
        );
        append.write_all(b"end").unwrap();
        append.sync_all().unwrap();
        assert_eq!(
            fs::read(mounted.scratch.join("upper/file")).unwrap(),
            b"end"
        );
        drop((reader, writer, append));
        mounted.unmount();
    }
}

fn mtime(of: &fs::Metadata) -> (i64, i64) {
    (of.mtime(), of.mtime_nsec())
}

/// Waits until the file system's clock has advanced from `nanos`.
fn wait_for_clock(dir: &Path, nanos: i64) {
    wait_until("the clock", || {
        let probe = dir.with_file_name("clock");
        fs::write(&probe, "").unwrap();
        fs::metadata(&probe).unwrap().mtime_nsec() != nanos
    });
}

#[test]
fn a_store_through_a_mapping_updates_mtime() {
    let Some(mounted) = Mounted::new("") else {
        return;
    };
    let path = mounted.at("file");
    fs::write(&path, vec![b'a'; 4096]).unwrap();
    let writer = open_to_write(&path);
    let before = fs::metadata(&path).unwrap();
    wait_for_clock(&mounted.scratch.join("upper"), before.mtime_nsec());
    let store = "import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
with mmap.mmap(fd, 4096) as m: m[0:1] = b'b'";
    run("python3", ["-c".as_ref(), store.as_ref(), path.as_os_str()]).ok();
    let after = fs::metadata(&path).unwrap();
    assert!(mtime(&after) > mtime(&before), "mtime did not advance");
    assert_eq!(fs::read(&path).unwrap()[0], b'b');
    // Also once it is closed and opened again.
    drop(writer);
    assert_eq!(mtime(&fs::metadata(&path).unwrap()), mtime(&after));
    mounted.unmount();
}

/// The text is read by the daemon until then, so that old descriptors follow it into the upper.
#[test]
fn old_descriptors_of_a_lower_text_file_see_later_writes() {
    let Some(mounted) = Mounted::new("coherence=posix") else {
        return;
    };
    for name in ["text", "script"] {
        let path = mounted.at(name);
        let old = open(&path);
        text(&old);
        fs::write(&path, "what is above").unwrap();
        assert_eq!(text(&old), "what is above", "{name}");
        let new = open_to_write(&path);
        new.write_all_at(b"W", 0).unwrap();
        assert_eq!(text(&old), "What is above", "{name}");
    }
    mounted.unmount();
}

/// The content keeps its mode in the lower layer.
#[test]
fn a_large_file_that_was_made_writable_is_read_by_the_daemon() {
    let Some(mounted) = Mounted::new("") else {
        return;
    };
    let path = mounted.at("var/protected/text");
    fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
    let old = open(&path);
    let new = open_to_write(&path);
    new.write_all_at(b"W", 0).unwrap();
    assert!(text(&old).starts_with('W'));
    drop((old, new));
    mounted.unmount();
}

/// A passthrough open of a lower file continues to refer to it. Every later open sees the new content, and the inode
/// is the same.
#[test]
fn old_passthrough_descriptors_keep_the_old_content() {
    for (options, name, keeps) in [
        ("", "usr/share/text", true),
        ("", "usr/share/small", false),
        ("", "usr/local/share/text", false),
        ("", "var/usr/text", false),
        ("", "var/protected/text", true),
        ("", "var/protected/small", false),
        ("coherence=posix", "var/protected/text", false),
        ("", "var/archive", true),
        ("", "usr/share/database", false),
        ("coherence=posix", "var/archive", false),
        ("", "text", false),
        ("coherence=posix", "usr/share/text", false),
        ("coherence=posix", "program", true),
        ("coherence=posix", "lib.so.1", true),
        ("coherence=overlay", "text", true),
        ("coherence=overlay,passthrough=off", "text", false),
        ("passthrough=off", "program", false),
    ] {
        let Some(mounted) = Mounted::new(options) else {
            return;
        };
        let path = mounted.at(name);
        let below = fs::read(mounted.below(name)).unwrap();
        let number = fs::metadata(&path).unwrap().ino();
        let old = open(&path);
        let was = text(&old);
        for round in ["first", "second"] {
            let new = open_to_write(&path);
            new.write_all_at(round.as_bytes(), 0).unwrap();
            assert!(text(&new).starts_with(round), "{options} {name}");
            assert!(text(&open(&path)).starts_with(round), "{options} {name}");
            assert_eq!(new.metadata().unwrap().ino(), number, "{options} {name}");
            assert_eq!(
                fs::metadata(&path).unwrap().ino(),
                number,
                "{options} {name}"
            );
            assert_eq!(text(&old) == was, keeps, "{options} {name}: {round}");
        }
        assert_eq!(old.metadata().unwrap().ino(), number, "{options} {name}");
        assert_eq!(
            fs::read(mounted.below(name)).unwrap(),
            below,
            "a lower was written to"
        );
        // It can be read, renamed, linked and removed like any other.
        sh_in(
            &mounted.at(""),
            &format!("mv {name} moved; ln moved linked; cat linked > /dev/null"),
        )
        .ok();
        assert_eq!(fs::metadata(mounted.at("linked")).unwrap().ino(), number);
        assert_eq!(fs::metadata(mounted.at("linked")).unwrap().nlink(), 2);
        sh_in(
            &mounted.at(""),
            "rm moved; echo more >> linked; rm linked; ls",
        )
        .ok();
        drop(old);
        mounted.unmount();
    }
}

/// Nothing can be written, so no descriptor is ever old.
#[test]
fn reads_on_a_mount_without_an_upper_layer_send_no_requests() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    for (options, asked) in [("coherence=posix", 0), ("passthrough=off", 1)] {
        let scratch = Scratch::for_test();
        let lower = scratch.make("lower");
        fs::write(lower.join("text"), "x".repeat(300_000)).unwrap();
        let stack = Stack {
            lowers: vec![lower],
            upper: None,
        };
        let log = scratch.join("log");
        let overlay = Overlay::cowlfs_logging(&stack, &scratch.make("m"), options, &log);
        let mounted = Mounted {
            scratch,
            overlay: Some(overlay),
        };
        assert_eq!(text(&open(&mounted.at("text"))).len(), 1 << 16);
        assert_eq!(mounted.asked("READ").min(1), asked, "{options}");
        mounted.unmount();
    }
}

/// The old descriptor has the old inode number of FUSE, which the kernel uses for locks.
#[test]
fn an_old_passthrough_descriptor_is_apart_from_new_ones() {
    let Some(mounted) = Mounted::new("") else {
        return;
    };
    let script = "
import errno, fcntl, os, sys
old = open(sys.argv[1])
fcntl.flock(old, fcntl.LOCK_EX)
new = open(sys.argv[1], 'r+')
new.write('What')
new.flush()
fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)
for kind in fcntl.LOCK_EX, fcntl.LOCK_SH:
    try:
        fcntl.flock(open(sys.argv[1]), kind | fcntl.LOCK_NB)
        sys.exit('locked twice')
    except BlockingIOError:
        pass
assert open(f'/proc/self/fd/{new.fileno()}').readline() == 'What is below\\n'
try:
    open(f'/proc/self/fd/{old.fileno()}')
    sys.exit('opened')
except OSError as error:
    assert error.errno == errno.ESTALE, error
assert old.readline() == 'what is below\\n'";
    let path = mounted.at("usr/share/text");
    run(
        "python3",
        ["-c".as_ref(), script.as_ref(), path.as_os_str()],
    )
    .ok();
    mounted.unmount();
}

#[test]
fn an_unlinked_file_remains_usable() {
    for options in ["", "passthrough=read", "coherence=overlay"] {
        let Some(mounted) = Mounted::new(options) else {
            return;
        };
        for name in ["text", "program", "new"] {
            let path = mounted.at(name);
            if name == "new" {
                fs::write(&path, "new").unwrap();
            }
            let file = open_to_write(&path);
            let known = open(&path);
            fs::remove_file(&path).unwrap();
            file.write_all_at(b"gone", 0).unwrap();
            assert!(text(&file).starts_with("gone"), "{options} {name}");
            assert!(text(&known).starts_with("gone"), "{options} {name}");
            file.sync_all().unwrap();
            known.sync_all().unwrap();
            assert_eq!(file.metadata().unwrap().nlink(), 0, "{options} {name}");
            fs::write(&path, "another").unwrap();
            assert!(text(&known).starts_with("gone"), "{options} {name}");
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 1 << 20).unwrap();
            let end = rustix::fs::seek(&known, rustix::fs::SeekFrom::Hole(0)).unwrap();
            assert!(end > 0, "{options} {name}");
        }
        mounted.unmount();
    }
}

/// A capability, as setcap(8) writes it.
const CAPABILITY: [u8; 20] = [0, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Setuid and setgid bits that are set while a process has the file open for writing are cleared by its writes.
#[test]
fn privileges_set_after_an_open_are_cleared_by_a_write() {
    let Some(mounted) = Mounted::new("") else {
        return;
    };
    let path = mounted.at("file");
    fs::write(&path, "content").unwrap();
    let open = OpenOptions::new().write(true).open(&path).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o4777)).unwrap();
    rustix::fs::setxattr(
        &path,
        "security.capability",
        &CAPABILITY,
        XattrFlags::empty(),
    )
    .unwrap();
    let unprivileged = format!("su nobody -s /bin/sh -c 'echo x >> {}'", path.display());
    sh_in(&mounted.at(""), &unprivileged).ok();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!(mode(&path), 0o777);
    let mut value = [0; 64];
    assert!(rustix::fs::getxattr(&path, "security.capability", &mut value).is_err());
    drop(open);
    mounted.unmount();
}

/// O_DIRECT has the same effect as on the file system below.
#[test]
fn direct_and_buffered_io_can_be_mixed() {
    for options in [
        "",
        "passthrough=read",
        "passthrough=off",
        "coherence=overlay",
    ] {
        let Some(mounted) = Mounted::new(options) else {
            return;
        };
        for name in ["text", "lib.so.1", "new"] {
            let path = mounted.at(name);
            if name == "new" {
                fs::write(&path, "new").unwrap();
            }
            let before = open(&path);
            text(&before);
            let direct = OpenOptions::new()
                .read(true)
                .custom_flags(libc_o_direct())
                .open(&path);
            // Not every file system supports O_DIRECT.
            let direct = direct.as_ref().ok();
            let writer = open_to_write(&path);
            writer.write_all_at(b"by whom", 0).unwrap();
            let after = open(&path);
            assert!(text(&after).starts_with("by whom"), "{options} {name}");
            drop((before, direct, writer, after));
        }
        mounted.unmount();
    }
}

fn libc_o_direct() -> i32 {
    rustix::fs::OFlags::DIRECT.bits().cast_signed()
}

/// A passthrough write after a snapshot would change the frozen layer, and without shared blocks the file cannot move.
#[test]
fn a_snapshot_waits_for_passthrough_writers() {
    let needs = [&[Need::Root, Need::Fuse][..], &Kind::Ext4.needs()].concat();
    if !can(&needs) {
        return;
    }
    let store = Store::on(|scratch, name| Kind::Ext4.mount(scratch, name));
    let source = store.scratch().make("source");
    fs::write(source.join("file"), "one\n").unwrap();
    store
        .cowl(["create", "web", "--from", source.to_str().unwrap()])
        .ok();
    let mut mount = store.command(["mount", "web"]);
    mount.env("COWL_PASSTHROUGH", "all");
    let mount_point = run_command(mount, b"").ok().stdout;
    let mount_point = PathBuf::from(String::from_utf8(mount_point).unwrap().trim_end());
    let snapshot = || store.cowl(["snapshot", "web"]);

    let path = mount_point.join("file");
    let mut writer = OpenOptions::new().append(true).open(&path).unwrap();
    writer.write_all(b"two\n").unwrap();
    let refused = snapshot();
    assert_ne!(refused.code, 0);
    let output = String::from_utf8(refused.stderr).unwrap();
    assert!(
        output.contains("1 file(s)") && output.contains("passthrough=read"),
        "{output}"
    );
    writer.write_all(b"three\n").unwrap();
    drop(writer);
    wait_until("the close", || snapshot().code == 0);

    let first = store.snapshots("web");
    let first = first.last().unwrap();
    fs::write(&path, "above\n").unwrap();
    let kept = store.cowl(["cat", &format!("web@{first}:file")]).ok();
    assert_eq!(kept.stdout, b"one\ntwo\nthree\n");

    // The file may still be mapped.
    drop(open_to_write(&path));
    assert_ne!(snapshot().code, 0);
    fs::remove_file(&path).unwrap();
    wait_until("the end of the file", || snapshot().code == 0);
    store.cowl(["umount", "web"]).ok();
}
