//! Mounts on which no file is read or written by passthrough: the kernel opens and closes files without a request.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use cowl_tests::beside;
use cowl_tests::command::sh_in;
use cowl_tests::conditions::{Need, can};
use cowl_tests::mount::{Stack, wait_until};
use cowl_tests::requests::{Counted, Counts, total};
use cowl_tests::scratch::Scratch;

const TIMES: u64 = 100;
const TEXT: &str = "the content of the lower layer\n";

/// A mount whose lower layer has a small file `small` and a larger one, `large`.
struct Case {
    scratch: Scratch,
    mount: Counted,
}

impl Case {
    fn new(options: &str) -> Option<Self> {
        if !can(&[Need::Root, Need::Fuse, Need::Program("python3")]) {
            return None;
        }
        let scratch = Scratch::for_test();
        let lower = scratch.make("lower");
        fs::write(lower.join("small"), TEXT).unwrap();
        fs::write(lower.join("large"), TEXT.repeat(20_000)).unwrap();
        let stack = Stack {
            lowers: vec![lower],
            upper: Some((scratch.make("upper"), scratch.make("work"))),
        };
        let mount = Counted::mount(&stack, &scratch.make("mount"), options);
        // The kernel learns it from the reply to the first open.
        drop(File::open(mount.overlay().path().join("small")).unwrap());
        Some(Self { scratch, mount })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.mount.overlay().path().join(name)
    }

    /// Whether the upper layer has this file.
    fn is_copied_up(&self, name: &str) -> bool {
        self.scratch.join("upper").join(name).try_exists().unwrap()
    }

    /// Returns the number of descriptors that the daemon has of files without a name.
    fn nameless(&self) -> usize {
        let pid = self.mount.overlay().pid().unwrap();
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let targets = descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        targets
            .filter_map(|target| target.into_os_string().into_string().ok())
            .filter(|target| target.ends_with(" (deleted)") && !target.contains("memfd:"))
            .count()
    }
}

fn assert_lacks(counts: &Counts, kinds: &[&str]) {
    for kind in kinds {
        assert!(!counts.contains_key(*kind), "{kind}: {counts:?}");
    }
}

fn both() -> OpenOptions {
    OpenOptions::new().read(true).write(true).clone()
}

#[test]
fn files_are_opened_and_closed_without_requests() {
    let Some(case) = Case::new("passthrough=off") else {
        return;
    };
    let read = |name: &str| fs::read_to_string(case.at(name)).unwrap();
    let counts = case.mount.during(|| assert_eq!(read("small"), TEXT));
    assert!(counts["read"] == 1, "{counts:?}");
    assert_lacks(&counts, &["open", "flush", "release"]);
    assert_eq!(read("large"), TEXT.repeat(20_000));
    let counts = case.mount.during(|| {
        for _ in 0..TIMES {
            assert_eq!(read("small"), TEXT);
            assert_eq!(read("large").len(), TEXT.len() * 20_000);
            drop(both().open(case.at("small")).unwrap());
        }
    });
    assert!(total(&counts) <= 5, "cached content: {counts:?}");
    let counts = case.mount.during(|| {
        for file in 0..TIMES {
            fs::write(case.at(&format!("new{file}")), TEXT).unwrap();
            assert_eq!(read(&format!("new{file}")), TEXT);
        }
    });
    assert_eq!((counts["create"], counts["write"]), (TIMES, TIMES));
    assert_lacks(&counts, &["open", "flush", "release"]);
    case.mount.unmount();
}

/// A snapshot must know the files that are open for writing, and passthrough begins with an open.
#[test]
fn open_requests_are_sent_where_they_are_needed() {
    for options in ["", "passthrough=read", "managed,passthrough=off"] {
        let Some(case) = Case::new(options) else {
            return;
        };
        let counts = case.mount.during(|| {
            for _ in 0..TIMES {
                assert_eq!(fs::read_to_string(case.at("small")).unwrap(), TEXT);
            }
        });
        assert_eq!(counts["open"], TIMES, "{options}: {counts:?}");
        assert_eq!(counts["release"], TIMES, "{options}: {counts:?}");
        case.mount.unmount();
    }
}

#[test]
fn a_file_is_copied_up_by_the_first_change_instead_of_the_open() {
    type Change = fn(&File);
    let changes: [(&str, Change); 5] = [
        ("write", |file| file.write_all_at(b"THE", 0).unwrap()),
        ("truncate", |file| file.set_len(3).unwrap()),
        ("allocate", |file| {
            rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, 1 << 20).unwrap();
        }),
        ("copy", |file| {
            let (mut from, mut to) = (4, 0);
            let copied = rustix::fs::copy_file_range(file, Some(&mut from), file, Some(&mut to), 3);
            assert_eq!(copied, Ok(3));
        }),
        ("store", |file| {
            let path = format!("/proc/{}/fd/{}", std::process::id(), {
                use std::os::fd::AsRawFd;
                file.as_raw_fd()
            });
            let program = format!(
                "import mmap\nwith open('{path}', 'r+b') as f:\n m = mmap.mmap(f.fileno(), 0)\n m[0:3] = b'THE'\n m.flush()"
            );
            sh_in(Path::new("/"), &format!("python3 -c \"{program}\"")).ok();
        }),
    ];
    for (what, change) in changes {
        let Some(case) = Case::new("passthrough=off") else {
            return;
        };
        let reader = File::open(case.at("large")).unwrap();
        let file = both().open(case.at("large")).unwrap();
        assert!(!case.is_copied_up("large"), "{what}");
        change(&file);
        assert!(case.is_copied_up("large"), "{what}");
        let (mut seen, mut stored) = (Vec::new(), Vec::new());
        (&reader).read_to_end(&mut seen).unwrap();
        drop(file);
        let upper = File::open(case.scratch.join("upper/large")).unwrap();
        (&upper).read_to_end(&mut stored).unwrap();
        assert!(seen == stored, "{what}: an old descriptor sees the change");
        let lower = fs::read_to_string(case.scratch.join("lower/large")).unwrap();
        assert_eq!(lower, TEXT.repeat(20_000));
        drop(reader);
        case.mount.unmount();
    }
}

#[test]
fn an_open_that_truncates_copies_no_content_up() {
    let Some(case) = Case::new("passthrough=off") else {
        return;
    };
    let counts = case.mount.during(|| {
        let mut file = File::create(case.at("large")).unwrap();
        assert_eq!(fs::metadata(case.at("large")).unwrap().len(), 0);
        file.write_all(b"new").unwrap();
    });
    assert_eq!(counts["setattr"], 1, "{counts:?}");
    assert_eq!(fs::read(case.at("large")).unwrap(), b"new");
    assert_eq!(fs::read(case.scratch.join("upper/large")).unwrap(), b"new");
    case.mount.unmount();
}

#[test]
fn unlinked_files_are_usable_until_they_are_closed() {
    let Some(case) = Case::new("passthrough=off") else {
        return;
    };
    fs::write(case.at("above"), TEXT).unwrap();
    fs::write(case.at("replacing"), "new").unwrap();
    fs::write(case.at("replaced"), TEXT).unwrap();
    let names = ["small", "large", "above", "replaced"];
    let files = names.map(|name| both().open(case.at(name)).unwrap());
    for name in ["small", "large", "above"] {
        fs::remove_file(case.at(name)).unwrap();
    }
    fs::rename(case.at("replacing"), case.at("replaced")).unwrap();
    let new = both().create_new(true).open(case.at("new")).unwrap();
    fs::remove_file(case.at("new")).unwrap();
    for file in files.iter().chain([&new]) {
        let size = file.metadata().unwrap().size();
        file.write_all_at(b"THE END", size).unwrap();
        file.set_len(size + 4).unwrap();
        file.sync_all().unwrap();
        let mut content = vec![0; usize::try_from(size + 4).unwrap()];
        file.read_exact_at(&mut content, 0).unwrap();
        assert!(content.ends_with(b"THE "));
    }
    assert!(case.nameless() >= 5);
    drop((files, new));
    wait_until("the space is free", || case.nameless() == 0);
    assert_eq!(fs::read(case.at("replaced")).unwrap(), b"new");
    case.mount.unmount();
}

/// No process can open a running program for writing.
#[test]
fn a_file_that_cannot_be_opened_for_writing_can_be_synced() {
    let Some(case) = Case::new("passthrough=off") else {
        return;
    };
    let program = case.scratch.join("upper/program");
    fs::copy("/usr/bin/sleep", &program).unwrap();
    let mut running = Command::new(&program).arg("600").spawn().unwrap();
    let busy = both().open(&program).unwrap_err();
    let synced = File::open(case.at("program")).and_then(|file| file.sync_all());
    running.kill().unwrap();
    running.wait().unwrap();
    assert_eq!(busy.kind(), std::io::ErrorKind::ExecutableFileBusy);
    synced.unwrap();
    case.mount.unmount();
}

/// Removed files that are not open must leave no descriptors.
#[test]
fn removed_files_leave_no_descriptors() {
    let Some(case) = Case::new("passthrough=off") else {
        return;
    };
    for file in 0..TIMES {
        let path = case.at(&format!("f{file}"));
        fs::write(&path, TEXT.repeat(10_000)).unwrap();
        assert_eq!(fs::read(&path).unwrap().len(), TEXT.len() * 10_000);
        match file % 2 {
            0 => fs::remove_file(&path).unwrap(),
            _ => fs::rename(&path, case.at("last")).unwrap(),
        }
    }
    wait_until("the descriptors are closed", || case.nameless() == 0);
    case.mount.unmount();
}

/// The kernel does not report whether the caller writes, so the daemon inspects its descriptors.
#[test]
fn only_the_owner_and_writers_of_a_program_remove_its_setuid_bit() {
    let Some(case) = Case::new("passthrough=off,allow_other") else {
        return;
    };
    let dir = case.mount.overlay().path();
    let become_other = "import os\nos.setgid(65534); os.setgroups([]); os.setuid(65534)";
    let chown = "try: os.chown('program', -1, -1)\nexcept PermissionError: print('refused')";
    let write = "os.pwrite(fd, b'THE', 0)";
    for (mode, how, act, is_removed) in [
        (0o4755, "", chown, false),
        (0o4757, "", chown, false),
        (0o4755, "fd = os.open('program', os.O_RDONLY)", chown, false),
        // As on a plain directory, a descriptor is sufficient for a write.
        (0o4755, "fd = os.open('program', os.O_RDWR)", write, true),
        (0o4755, "fd = os.open('program', os.O_WRONLY)", write, true),
    ] {
        let path = case.at("program");
        fs::write(&path, TEXT).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let script = format!("import os\n{how}\n{become_other}\n{act}");
        let output = beside::python(dir, &script).ok().out();
        assert_eq!(output.contains("refused"), act == chown, "{mode:o} {how}");
        let mode_now = fs::metadata(&path).unwrap().mode() & 0o7777;
        assert_eq!(mode_now & 0o4000 == 0, is_removed, "{mode:o} {mode_now:o}");
        fs::remove_file(&path).unwrap();
    }
    // A write by such a user removes it, and one by root does not.
    let path = case.at("program");
    fs::write(&path, TEXT).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4757)).unwrap();
    both().open(&path).unwrap().write_all_at(b"THE", 0).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o4757);
    let script = "import os\nos.setgid(65534); os.setgroups([]); os.setuid(65534)\nwith open('program', 'r+b') as f: f.write(b'x')";
    beside::python(dir, script).ok();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o757);
    case.mount.unmount();
}
