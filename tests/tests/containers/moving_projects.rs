//! A frozen layer whose directories belong to a project of XFS, unlike the new layer (docs/decisions/0043).

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;

use cowl_tests::command::{run, run_command};
use cowl_tests::conditions::{Need, can};
use cowl_tests::images::Kind;

use crate::moving_files::{Lab, NEEDS, assert_files_are_in_one_layer, assert_no_placeholders};

/// A copy cannot be renamed to the directory, and the daemon must notice that before it uses the new layer.
#[test]
fn a_directory_of_another_project_refuses_a_snapshot() {
    let needs = [NEEDS, &Kind::Xfs.needs(), &[Need::Program("xfs_io")]].concat();
    if !can(&needs) {
        return;
    }
    let lab = Lab::new(Kind::Xfs, false, None);
    let dir = lab.top.join("limited");
    std::fs::create_dir(&dir).unwrap();
    let mut file = File::create_new(dir.join("file")).unwrap();
    file.write_all(b"first").unwrap();
    let layers = std::fs::read_dir(lab.store.path().join("layers")).unwrap();
    let limited: PathBuf = layers
        .map(|layer| layer.unwrap().path().join("tree/limited"))
        .find(|path| path.try_exists().unwrap())
        .unwrap();
    let limited = limited.to_str().unwrap();
    run("xfs_io", ["-c", "chproj 7", "-c", "chattr +P", limited]).ok();
    let daemon = lab.store.pid("web");
    run_command(lab.snapshot_command(), b"").fails(1, &["cross-device link"]);
    assert_eq!(lab.store.pid("web"), daemon);
    assert_no_placeholders(&lab, "after a refusal");
    file.write_all(b" second").unwrap();
    assert_eq!(std::fs::read(dir.join("file")).unwrap(), b"first second");

    run("xfs_io", ["-c", "chattr -P", limited]).ok();
    run_command(lab.snapshot_command(), b"").ok();
    file.write_all(b" third").unwrap();
    drop(file);
    let snapshots = lab.store.snapshots("web");
    assert_eq!(snapshots.len(), 1);
    lab.with_snapshot(&snapshots[0], |top| {
        let content = std::fs::read(top.join("limited/file")).unwrap();
        assert_eq!(content, b"first second");
    });
    assert_files_are_in_one_layer(&lab);
    lab.store.cowl(["umount", "web"]).ok();
    lab.store.cowl(["check", "web"]).ok();
}
