//! The content of a small lower file, which the kernel gets with the first open.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::Duration;

use cowl_tests::command::sh_in;
use cowl_tests::conditions::{Need, can};
use cowl_tests::mount::Stack;
use cowl_tests::requests::Counted;
use cowl_tests::scratch::Scratch;

const FILES: usize = 10;
const OLD: &str = "the content of the lower layer\n";

/// A mount whose lower layer has [`FILES`] small files with names `f0`, `f1`, ..., and a larger one with the name `large`.
struct Case {
    scratch: Scratch,
    mount: Counted,
}

impl Case {
    fn new(options: &str) -> Option<Self> {
        if !can(&[Need::Root, Need::Fuse]) {
            return None;
        }
        let scratch = Scratch::for_test();
        let lower = scratch.make("lower");
        for file in 0..FILES {
            fs::write(lower.join(format!("f{file}")), OLD).unwrap();
        }
        fs::write(lower.join("large"), OLD.repeat(4000)).unwrap();
        fs::write(lower.join("empty"), "").unwrap();
        let stack = Stack {
            lowers: vec![lower],
            upper: Some((scratch.make("upper"), scratch.make("work"))),
        };
        // In a debug build: the time in which another program can change the file.
        let delay = [("COWL_DELAY", "before content is stored/30")];
        let mount = Counted::mount_with(&stack, &scratch.make("mount"), options, &delay);
        Some(Self { scratch, mount })
    }

    fn dir(&self) -> &Path {
        self.mount.overlay().path()
    }
}

#[test]
fn a_small_lower_file_is_read_without_a_read_request() {
    for options in ["", "passthrough=read"] {
        let Some(case) = Case::new(options) else {
            return;
        };
        let counts = case.mount.during(|| {
            for file in 0..FILES {
                let content = fs::read_to_string(case.dir().join(format!("f{file}"))).unwrap();
                assert_eq!(content, OLD);
            }
            assert_eq!(fs::read(case.dir().join("empty")).unwrap(), b"");
        });
        assert!(counts["open"] >= FILES as u64, "{options}: {counts:?}");
        assert!(!counts.contains_key("read"), "{options}: {counts:?}");
        // A mapping has the content as well, and zeros after its end.
        let program = "import mmap\nwith open('f0', 'rb') as f:\n m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n assert m[:].decode() == 'the content of the lower layer\\n'";
        sh_in(case.dir(), &format!("python3 -c \"{program}\"")).ok();
        let counts = case.mount.during(|| {
            let content = fs::read_to_string(case.dir().join("large")).unwrap();
            assert_eq!(content, OLD.repeat(4000));
        });
        assert!(
            counts.contains_key("read"),
            "a large file: {options}: {counts:?}"
        );
        case.mount.unmount();
    }
}

/// A change of a file while another program opens it for the first time.
type Change = fn(&Path);

/// The content that every later reader must find.
const CHANGES: [(&str, Change, &str); 6] = [
    (
        "truncate",
        |path| {
            // truncate(2) does not open the file.
            let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
            nix::unistd::truncate(path.as_c_str(), 3).unwrap();
            nix::unistd::truncate(path.as_c_str(), OLD.len() as i64).unwrap();
        },
        "the\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
    ),
    (
        "replace the content",
        |path| fs::write(path, "new\n").unwrap(),
        "new\n",
    ),
    (
        "append",
        |path| {
            let mut file = OpenOptions::new().append(true).open(path).unwrap();
            file.write_all(b"more\n").unwrap();
        },
        "the content of the lower layer\nmore\n",
    ),
    (
        "write in place",
        |path| {
            let file = File::options().write(true).open(path).unwrap();
            file.write_all_at(b"THE", 0).unwrap();
        },
        "THE content of the lower layer\n",
    ),
    (
        "read",
        |path| assert_eq!(fs::read_to_string(path).unwrap(), OLD),
        OLD,
    ),
    (
        "change the mode",
        |path| {
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            fs::set_permissions(path, permissions).unwrap();
        },
        OLD,
    ),
];

/// Two programs open a file for the first time, while another one changes it.
#[test]
fn a_first_open_never_shows_old_content_after_a_change() {
    for options in ["", "passthrough=read", "passthrough=off"] {
        for (what, change, expected) in CHANGES {
            let Some(case) = Case::new(options) else {
                return;
            };
            let barrier = Barrier::new(3);
            let found = Mutex::new(Vec::new());
            let path = |file| case.dir().join(format!("f{file}"));
            let read = || {
                for path in (0..FILES).map(path) {
                    barrier.wait();
                    let mut file = File::open(&path).unwrap();
                    // The file was changed.
                    barrier.wait();
                    let mut content = String::new();
                    file.read_to_string(&mut content).unwrap();
                    // A failed assertion would leave the others at the barrier.
                    found.lock().unwrap().push(content);
                }
            };
            thread::scope(|scope| {
                scope.spawn(read);
                scope.spawn(read);
                for path in (0..FILES).map(path) {
                    barrier.wait();
                    // The first open is likely to be in progress.
                    thread::sleep(Duration::from_millis(5));
                    change(&path);
                    barrier.wait();
                }
            });
            for content in found.into_inner().unwrap() {
                assert_eq!(content, expected, "{options}: {what}");
            }
            for file in 0..FILES {
                let path = case.dir().join(format!("f{file}"));
                let content = fs::read_to_string(&path).unwrap();
                assert_eq!(content, expected, "{options}: {what}");
                let size = fs::metadata(&path).unwrap().len();
                assert_eq!(size, expected.len() as u64, "{options}: {what}");
                let lower = fs::read_to_string(case.scratch.join(format!("lower/f{file}")));
                assert_eq!(lower.unwrap(), OLD);
            }
            case.mount.unmount();
        }
    }
}
