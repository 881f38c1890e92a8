//! Writeback of content that replaces a lower file starts when ext4, XFS and btrfs would start it in a plain
//! directory, without a durability guarantee.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowl_tests::beside;
use cowl_tests::command::{self, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::mount::{Overlay, Stack, wait_until};
use cowl_tests::scratch::Scratch;

/// Mounts a new file system with a lower, an upper and a work directory.
fn disk(scratch: &Scratch, kind: &str) -> PathBuf {
    let image = scratch.join("image");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(320 << 20)
        .unwrap();
    command::run(format!("mkfs.{kind}"), [Path::new("-q"), &image]).ok();
    let disk = scratch.make("disk");
    command::run("mount", [Path::new("-oloop"), &image, &disk]).ok();
    let line = "mkdir lower upper work mount
        for i in 1 2 3 4 5 6 7 8 9; do head -c 70000 /dev/zero | tr '\\0' o >lower/$i; done; sync -f .";
    sh_in(&disk, line).ok();
    disk
}

/// Whether all blocks of a file are allocated: with delayed allocation, they are when writeback begins.
fn is_begun(file: &Path) -> bool {
    let output = command::run("filefrag", [Path::new("-v"), file]).ok().out();
    assert!(
        output.contains("extent") && !output.contains(" 0 extents"),
        "{output}"
    );
    !output.contains("delalloc")
}

/// Ways to replace the content of a file, in a shell or in Python, with the affected files.
const REPLACE: &[(&str, &[&str])] = &[
    // A new file renamed over a lower one, and a rename of a file that replaces a lower file itself.
    ("cp /usr/bin/env new; mv new 1", &["1"]),
    ("cp /usr/bin/env 8; mv 8 2", &["2"]),
];

const REWRITE: &[(&str, &[&str])] = &[
    ("cat /usr/bin/env >3", &["3"]),
    // The descriptor is duplicated, and the first close precedes the write.
    (
        "exec 7>4; (:) 7>&7; cat /usr/bin/env >&7; exec 7>&-",
        &["4"],
    ),
    (
        "python3 -c 'f = open(\"5\", \"r+b\"); f.truncate(0); f.write(bytes(90000)); f.close()'",
        &["5"],
    ),
    // Truncated by its path. The descriptor prevents the kernel from forgetting the file: other tests drop its caches.
    (
        "python3 -c 'import os; p = os.open(\"6\", os.O_PATH); os.truncate(\"6\", 0); f = open(\"6\", \"r+b\"); f.write(bytes(90000)); f.close()'",
        &["6"],
    ),
    // Files that were written in this mount are replaced, too.
    ("echo x >>7; cat /usr/bin/env >7", &["7"]),
    // Copied by COPY_FILE_RANGE, not by writes.
    ("cp 3 9", &["9"]),
    // Without open requests, the kernel can forget the file before it counts as closed.
    (
        "cat /usr/bin/env >3; echo 2 >/proc/sys/vm/drop_caches",
        &["3"],
    ),
];

fn begins(kind: &'static str, cases: &[&[(&str, &[&str])]]) {
    let test = format!("write_back_begins_on_{kind}");
    let mkfs = match kind {
        "ext4" => "mkfs.ext4",
        "xfs" => "mkfs.xfs",
        _ => "mkfs.btrfs",
    };
    let needs = [
        Need::Root,
        Need::Fuse,
        Need::Filesystem(kind),
        Need::Program(mkfs),
        Need::Program("filefrag"),
    ];
    if !can(&needs) {
        return;
    }
    for passthrough in ["auto", "read", "off"] {
        // In memory, so that writeback completes soon, regardless of the load on the host's disk.
        let scratch = Scratch::new_in(Path::new("/dev/shm"), &test);
        let disk = disk(&scratch, kind);
        let stack = Stack {
            lowers: vec![disk.join("lower")],
            upper: Some((disk.join("upper"), disk.join("work"))),
        };
        let extra = format!("passthrough={passthrough}");
        let mount = Overlay::cowlfs(&stack, &disk.join("mount"), &extra);
        for (line, files) in cases.iter().copied().flatten() {
            sh_in(mount.path(), line).ok();
            for file in *files {
                let file = disk.join("upper").join(file);
                let label = format!("{kind}, {extra}: {line}");
                if kind == "btrfs" || passthrough == "off" {
                    // On btrfs, allocation is visible when the write is complete. Without open requests, it begins when
                    // the file has not been written for a moment. Without an early start, the kernel waits 30 seconds.
                    let start = Instant::now();
                    wait_until(&label, || is_begun(&file));
                    assert!(start.elapsed() < Duration::from_secs(20), "{label}");
                } else {
                    assert!(is_begun(&file), "{label}");
                }
            }
        }
        mount.unmount();
    }
}

#[test]
fn writeback_of_a_replacement_is_started_on_ext4() {
    begins("ext4", &[REPLACE, REWRITE]);
}

#[test]
fn writeback_of_an_overwritten_lower_file_is_started_on_xfs() {
    begins("xfs", &[REWRITE]);
}

#[test]
fn writeback_of_a_replacement_is_started_on_btrfs() {
    begins("btrfs", &[REPLACE, REWRITE]);
}

/// The kernel sends no FSYNC after a direct write, so the daemon syncs it.
#[test]
fn synchronous_direct_writes_are_synced() {
    let needs = [
        Need::Root,
        Need::Fuse,
        Need::Program("mkfs.ext4"),
        Need::Program("filefrag"),
        Need::Program("python3"),
    ];
    if !can(&needs) {
        return;
    }
    let script = r#"
import mmap, os
data = mmap.mmap(-1, 65536); data[:] = b"x" * 65536
for name, how, flags in (
    ("later", os.O_RDWR | os.O_DIRECT, 0),
    ("dsync", os.O_RDWR | os.O_DIRECT | os.O_DSYNC, 0),
    ("sync", os.O_WRONLY | os.O_DIRECT | os.O_SYNC, 0),
    ("flag", os.O_RDWR | os.O_DIRECT, os.RWF_DSYNC),
    ("cached", os.O_RDWR | os.O_DSYNC, 0),
):
    fd = os.open(name, how | os.O_CREAT)
    assert os.pwritev(fd, [data], 0, flags) == 65536
for i in range(20): os.close(os.open(f"small{i}", os.O_WRONLY | os.O_CREAT))
fd = os.open("small", os.O_WRONLY | os.O_CREAT | os.O_DSYNC); os.write(fd, data)
"#;
    for passthrough in ["auto", "read", "off"] {
        let scratch = Scratch::new_in(Path::new("/dev/shm"), "synchronous_direct_writes");
        let disk = disk(&scratch, "ext4");
        let stack = Stack {
            lowers: vec![disk.join("lower")],
            upper: Some((disk.join("upper"), disk.join("work"))),
        };
        let extra = format!("passthrough={passthrough}");
        let mount = Overlay::cowlfs(&stack, &disk.join("mount"), &extra);
        beside::python(mount.path(), script).ok();
        for file in ["dsync", "sync", "flag", "cached", "small"] {
            let is_synced = is_begun(&disk.join("upper").join(file));
            assert!(is_synced, "{extra}: the content of {file} is not on disk");
        }
        let later = is_begun(&disk.join("upper/later"));
        assert!(!later, "{extra}: the file system always writes at once");
        mount.unmount();
    }
}
