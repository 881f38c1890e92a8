//! A program that does not end a write while its file is replaced in the frozen layer (docs/decisions/0043).

use std::process::Stdio;
use std::sync::mpsc::channel;
use std::time::Duration;

use cowl_tests::conditions::can;
use cowl_tests::images::Kind;

use crate::moving_files::{Lab, NEEDS, Program, assert_files_are_in_one_layer};

/// The time after which a rename is considered to wait for the program.
const HANGS: Duration = Duration::from_secs(60);

/// The kernel holds locks while it waits for the program: they must not be those of the whole file system.
#[test]
fn a_write_that_does_not_end_delays_no_rename_of_other_containers() {
    if !can(&[NEEDS, &Kind::Xfs.needs()].concat()) {
        return;
    }
    let lab = Lab::new(Kind::Xfs, false, Some(("COWL_DELAY", "after a change/15")));
    // Requests that search this directory wait for the program.
    let (dir, store) = (lab.top.join("deep"), lab.store.path());
    let words = [dir.to_str().unwrap(), store.to_str().unwrap()];
    let mut program = Program::start(&["late", words[0], words[1]]);
    assert_eq!(program.hear(), "ready");
    let mut snapshot = lab.snapshot_command();
    let mut snapshot = snapshot.stdout(Stdio::null()).spawn().unwrap();
    assert_eq!(program.hear(), "ready");
    let (renamed, waiting) = channel();
    let filesystem = store.with_file_name("elsewhere");
    std::thread::spawn(move || {
        for name in ["one", "two"] {
            std::fs::create_dir_all(filesystem.join(name)).unwrap();
        }
        std::fs::write(filesystem.join("one/file"), "").unwrap();
        // The daemon waits for the program by then.
        std::thread::sleep(Duration::from_secs(1));
        std::fs::rename(filesystem.join("one/file"), filesystem.join("two/file")).unwrap();
        renamed.send(()).unwrap();
    });
    let done = waiting.recv_timeout(HANGS);
    // Requests in other directories are answered as well.
    std::fs::write(lab.top.join("other"), "written").unwrap();
    let is_running = snapshot.try_wait().unwrap().is_none();
    program.tell();
    assert_eq!(program.hear(), "done");
    assert!(snapshot.wait().unwrap().success());
    done.expect("the rename does not wait for the program");
    assert!(is_running, "the write did not delay the snapshot");
    program.end("the program");
    let names: Vec<_> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name.as_encoded_bytes().starts_with(b"."))
        .collect();
    assert!(names.is_empty(), "{names:?}");
    assert_files_are_in_one_layer(&lab);
    lab.with_snapshot("snap0", |top| {
        assert_eq!(std::fs::read(top.join("deep/stuck")).unwrap(), b"first\n");
        assert!(!top.join("other").try_exists().unwrap());
        assert_eq!(std::fs::read_dir(top.join("deep")).unwrap().count(), 1);
    });
    lab.store.cowl(["umount", "web"]).ok();
    lab.store.cowl(["check", "web"]).ok();
}
