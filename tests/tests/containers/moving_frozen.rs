//! Snapshots on a file system without shared blocks, for which the programs of the container are stopped
//! (docs/decisions/0043).

use std::path::PathBuf;

use cowl_tests::command::run_command;
use cowl_tests::conditions::{Need, can};
use cowl_tests::images::Kind;
use cowl_tests::lxc_stub::LxcStub;

use crate::moving_files::{Lab, NEEDS, Program, Run, snapshots_beside, store_for};

/// Like `snapshots_have_the_content_of_one_moment_on_xfs`: the program is stopped for each snapshot.
#[test]
fn snapshots_of_a_stopped_program_have_the_content_of_one_moment_on_ext4() {
    let kind = Kind::Ext4;
    let more = [Need::Freezer, Need::Program("lxc-info")];
    if !can(&[NEEDS, &kind.needs(), &more].concat()) {
        return;
    }
    let length = Run::from_env();
    let store = store_for(kind, &length);
    let rootfs = store.path().with_file_name("rootfs");
    std::fs::create_dir(&rootfs).unwrap();
    let stub = LxcStub::new(store.scratch(), "web", &rootfs);
    store.cowl(stub.adopt()).ok();
    let top = PathBuf::from(store.cowl(["mount", "web"]).ok().out());
    let lab = Lab { store, top };
    // The copies are written, so the files must not grow fast.
    let writer = Program::start_writer(&lab, 20);
    stub.add(writer.id());
    let snapshot = || {
        let mut command = lab.snapshot_command();
        command.env("PATH", stub.path_variable());
        run_command(command, b"")
    };
    snapshots_beside(&lab, writer, &snapshot, &mut || ());
}
