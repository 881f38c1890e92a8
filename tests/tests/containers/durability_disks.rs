//! Durability of acknowledged snapshots on a disk that is detached, shut down or unmounted.

use std::path::Path;

use cowl_tests::command::run;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::images::Kind;
use cowl_tests::mount::{plain_unmount, unmount_free, wait_until};

/// A store on a disk of its own, with the container `web`, in which a file was changed. `None`: skipped.
fn web_on(kind: Kind, more: &[Need]) -> Option<Store> {
    let needs = [&[Need::Root, Need::Fuse], kind.needs().as_slice(), more].concat();
    if !can(&needs) {
        return None;
    }
    let store = Store::on(|scratch, name| kind.mount(scratch, name));
    let root = store.scratch().make("root");
    std::fs::write(root.join("file"), "old").unwrap();
    store.create("web", &root);
    std::fs::write(store.mount("web").join("file"), "new").unwrap();
    Some(store)
}

/// Unmounts the container and takes a snapshot that nothing syncs.
fn snapshot_unsynced(store: &Store) {
    store.cowl(["umount", "web"]).ok();
    store.cowl(["snapshot", "web", "--no-sync"]).ok();
    assert_eq!(state(store), "settling");
}

fn state(store: &Store) -> String {
    let list = store.cowl(["list", "web", "--format", "{state}"]);
    list.ok().out()
}

fn disk(store: &Store) -> &Path {
    store.path().parent().unwrap()
}

fn is_incomplete_from_here_on(store: &Store) {
    assert_eq!(state(store), "incomplete");
    store.cowl(["check"]).ok();
    assert_eq!(state(store), "incomplete");
}

/// A disk that is detached and attached again has lost the data that was in memory, within one boot.
fn attached_anew(kind: Kind) {
    let Some(store) = web_on(kind, &[Need::Program("losetup")]) else {
        return;
    };
    snapshot_unsynced(&store);
    unmount_free(disk(&store));
    kind.mount_again(store.scratch(), "own");
    is_incomplete_from_here_on(&store);
}

#[test]
fn an_unsynced_snapshot_on_a_reattached_disk_is_incomplete() {
    attached_anew(Kind::Ext4);
}

/// The device number of a btrfs is not that of a disk.
#[test]
fn an_unsynced_snapshot_on_a_reattached_btrfs_is_incomplete() {
    attached_anew(Kind::Btrfs);
}

/// A file system that an I/O error shut down has lost the data that was in memory when it is mounted again, within one
/// boot and on the same disk.
#[test]
fn an_unsynced_snapshot_on_a_shut_down_file_system_is_incomplete() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let needs = [Need::Program("losetup"), Need::Program("python3")];
        let Some(store) = web_on(kind, &needs) else {
            return;
        };
        snapshot_unsynced(&store);
        let disk = disk(&store);
        let found = run(
            "findmnt",
            ["-no".as_ref(), "SOURCE".as_ref(), disk.as_os_str()],
        );
        let device = found.ok().out();
        // The loop device stays attached while it is open.
        let _attached = std::fs::File::open(&device).unwrap();
        // FS_IOC_SHUTDOWN, without a flush of the log.
        let shut_down = "import fcntl, os, struct, sys\n\
            fd = os.open(sys.argv[1], os.O_RDONLY)\n\
            fcntl.ioctl(fd, 0x8004587d, struct.pack('I', 2))\n";
        run(
            "python3",
            ["-c".as_ref(), shut_down.as_ref(), disk.as_os_str()],
        )
        .ok();
        unmount_free(disk);
        // Another test's mount namespace may hold the file system for a moment.
        let name = Path::new(&device).file_name().unwrap();
        let sysfs = Path::new("/sys/fs").join(kind.name()).join(name);
        wait_until("the file system has ended", || !sysfs.try_exists().unwrap());
        run("mount", [device.as_ref(), disk.as_os_str()]).ok();
        is_incomplete_from_here_on(&store);
    }
}

/// Also right after a snapshot, which its daemon still syncs.
#[test]
fn umount_releases_the_disk_of_the_store() {
    let Some(store) = web_on(Kind::Ext4, &[]) else {
        return;
    };
    store.cowl(["snapshot", "web"]).ok();
    store.cowl(["umount", "web"]).ok();
    plain_unmount(disk(&store)).unwrap();
}
