//! A program that runs from the mount can't be written to, by none of the ways there are.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::{Command, Stdio};

use cowl_tests::conditions::{Need, can};
use cowl_tests::mount::Stack;
use cowl_tests::mount::{Overlay, wait_until};
use cowl_tests::scratch::Scratch;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// Tries all ways to change the program at `path` while it runs, and returns their results.
fn answers(path: &Path) -> Vec<Result<(), Errno>> {
    let open = |flags| rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).map(drop);
    let error = |error: std::io::Error| Errno::from_io_error(&error).unwrap();
    vec![
        open(OFlags::WRONLY),
        open(OFlags::RDWR),
        open(OFlags::RDONLY | OFlags::TRUNC),
        open(OFlags::WRONLY | OFlags::TRUNC),
        open(OFlags::WRONLY | OFlags::APPEND),
        rustix::fs::open(path, OFlags::RDONLY, Mode::empty()).map(drop),
        OpenOptions::new()
            .write(true)
            .open(path)
            .map(drop)
            .map_err(error),
    ]
}

#[test]
fn writing_to_a_running_program_fails_with_etxtbsy() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let scratch = Scratch::for_test();
    let at = |name: &str| scratch.join(name);
    for name in ["lower", "upper", "work", "m", "plain"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    std::fs::copy("/bin/sleep", at("lower/below")).unwrap();
    std::fs::copy("/bin/sleep", at("plain/program")).unwrap();
    let stack = Stack {
        lowers: vec![at("lower")],
        upper: Some((at("upper"), at("work"))),
    };
    let overlay = Overlay::cowlfs(&stack, &at("m"), "");
    std::fs::copy("/bin/sleep", at("m/above")).unwrap();
    let whole = std::fs::read("/bin/sleep").unwrap();
    // Repeated, because the effect of a truncation on a running program depends on its progress.
    for _ in 0..10 {
        let mut expected = None;
        for path in ["plain/program", "m/below", "m/above"] {
            let mut running = Command::new(at(path))
                .arg("1000")
                .stdin(Stdio::null())
                .spawn()
                .unwrap();
            let got = answers(&at(path));
            let alive = running.try_wait().unwrap().is_none();
            running.kill().unwrap();
            running.wait().unwrap();
            assert!(alive, "{path}");
            assert!(
                std::fs::read(at(path)).unwrap() == whole,
                "{path} was changed"
            );
            match &expected {
                None => expected = Some(got),
                Some(expected) => assert_eq!(&got, expected, "{path}"),
            }
        }
        let count = expected
            .unwrap()
            .iter()
            .filter(|got| **got == Err(Errno::TXTBSY))
            .count();
        assert_eq!(count, 6);
    }
    // After the program has ended, its file can be truncated; the kernel notices the end a moment later.
    for path in ["m/below", "m/above"] {
        let flags = OFlags::RDONLY | OFlags::TRUNC | OFlags::CLOEXEC;
        wait_until("the end of the program is reported", || {
            rustix::fs::open(at(path), flags, Mode::empty()).is_ok()
        });
        assert_eq!(std::fs::metadata(at(path)).unwrap().len(), 0);
    }
    overlay.unmount();
}
