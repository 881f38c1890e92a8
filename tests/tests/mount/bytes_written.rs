//! Snapshot, restore and clone copy no data, however much there is: bytes written by the command,
//! by the daemon, and on disk stay below 64 KiB for a container of 100,000 files.

use std::path::Path;

use cowl_tests::command::{Io, Output};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::images;

const MOST: u64 = 64 << 10;
const DIRS: u32 = 100;
const FILES: u32 = 1000;

/// Creates 100,000 files in 100 directories. Their names alone take more than 64 KiB.
fn fill(base: &Path) {
    for dir in 0..DIRS {
        let dir = base.join(format!("dir{dir}"));
        std::fs::create_dir(&dir).unwrap();
        for file in 0..FILES {
            std::fs::write(dir.join(format!("file{file}")), "a few bytes").unwrap();
        }
    }
}

#[track_caller]
fn little(label: &str, output: &Output) {
    let Io { wchar, write_bytes } = output.io;
    eprintln!(
        "{label}: {wchar} bytes written, {write_bytes} made dirty, {:?}",
        output.took
    );
    assert!(
        wchar < MOST,
        "{label} wrote {wchar} bytes: {}",
        output.report()
    );
    assert!(
        write_bytes < MOST,
        "{label} made {write_bytes} bytes dirty: {}",
        output.report()
    );
}

#[test]
fn snapshot_restore_and_clone_copy_no_data() {
    if !can(&[Need::Root, Need::Fuse, Need::Program("mkfs.ext4")]) {
        return;
    }
    // On an ext4 of its own: the written bytes include its bitmaps and tables, and the number of those that a new
    // directory touches depends on how full the file system is.
    let store = Store::on(|scratch, name| images::ext4_for(DIRS * FILES, scratch, name));
    let base = store.scratch().make("base");
    fill(&base);
    store.create("web", &base);
    std::fs::remove_dir_all(&base).unwrap();
    let on_disk = store.disk_usage();

    little("snapshot", &store.cowl(["snapshot", "web"]).ok());
    little("clone", &store.cowl(["clone", "web", "web2"]).ok());
    little("restore", &store.cowl(["restore", "web", "snap0"]).ok());
    little(
        "restore to a new name",
        &store.cowl(["restore", "web", "snap0", "web3"]).ok(),
    );
    // A few directories and manifests.
    let grown = store.disk_usage().saturating_sub(on_disk);
    assert!(grown < 4 * MOST, "the store grew by {grown} bytes");

    // The same with a head that holds a lot, mounted: the daemon must not copy either.
    let mount_point = store.mount("web");
    for file in 0..FILES {
        std::fs::write(
            mount_point.join(format!("dir7/file{file}")),
            vec![b'x'; 5000],
        )
        .unwrap();
    }
    std::fs::rename(mount_point.join("dir8"), mount_point.join("renamed")).unwrap();
    let pid = store.daemon("web");
    let before = Io::of(pid).unwrap();
    let on_disk = store.disk_usage();
    little("snapshot, mounted", &store.cowl(["snapshot", "web"]).ok());
    let daemon = Io::of(pid).unwrap().since(before);
    eprintln!("its daemon: {daemon:?}");
    assert!(
        daemon.wchar < MOST && daemon.write_bytes < MOST,
        "the daemon wrote {daemon:?}"
    );

    std::fs::write(mount_point.join("dir9/file9"), "changed").unwrap();
    little(
        "restore, mounted",
        &store.cowl(["restore", "web", "snap0"]).ok(),
    );
    let daemon = Io::of(store.daemon("web")).unwrap();
    eprintln!("the new daemon: {daemon:?}");
    assert!(
        daemon.wchar < MOST && daemon.write_bytes < MOST,
        "the new daemon wrote {daemon:?}"
    );
    let grown = store.disk_usage().saturating_sub(on_disk);
    assert!(grown < 4 * MOST, "the store grew by {grown} bytes");
    assert_eq!(
        std::fs::read(mount_point.join("dir7/file0")).unwrap(),
        b"a few bytes"
    );
    assert!(mount_point.join("dir8/file999").is_file());
}
