//! Snapshots of a container that stays mounted: each costs the daemon one descriptor and a little memory, until its layer
//! is merged because the stack is deeper than the limit. A file that is open throughout keeps its content and its inode
//! number.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::process::{anonymous, descriptors};

/// The number of snapshots; `COWL_SCALE_SNAPSHOTS=1000` for the soak test.
const SNAPSHOTS: usize = 150;
/// The descriptors that may be opened for other reasons, such as the threads' own.
const OTHER_DESCRIPTORS: usize = 40;
/// The memory of a layer, with its part of the merged directories.
const BYTES_PER_LAYER: usize = 12 << 10;
/// The memory that may be allocated for other reasons.
const OTHER_BYTES: usize = 4 << 20;
/// The default of `depth_limit`.
const DEPTH_LIMIT: usize = 128;

#[test]
fn descriptors_and_memory_of_a_mounted_container_with_many_snapshots_are_bounded() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let count =
        std::env::var("COWL_SCALE_SNAPSHOTS").map_or(SNAPSHOTS, |number| number.parse().unwrap());
    let store = Store::for_test();
    let source = store.scratch().make("source");
    fs::write(source.join("lower"), "never changed").unwrap();
    fs::write(source.join("log"), "").unwrap();
    store.create("web", &source);
    let root = store.mount("web");
    let pid = store.daemon("web");
    let lower = fs::File::open(root.join("lower")).unwrap();
    let number = fs::metadata(root.join("log")).unwrap().ino();
    // It stays open for writing over all snapshots.
    let mut log = OpenOptions::new()
        .append(true)
        .open(root.join("log"))
        .unwrap();
    store.ok(["snapshot", "web"]);
    let (descriptors_before, memory_before) = (descriptors(pid), anonymous(pid));

    for n in 0..count {
        fs::write(root.join("state"), n.to_string()).unwrap();
        writeln!(log, "{n}").unwrap();
        store.ok(["snapshot", "web"]);
    }

    let opened = descriptors(pid) - descriptors_before;
    let allocated = anonymous(pid).saturating_sub(memory_before);
    println!("{count} snapshots: {opened} descriptors, {allocated} bytes");
    let most = count.min(DEPTH_LIMIT) + OTHER_DESCRIPTORS;
    assert!(opened <= most, "{opened} descriptors");
    let most = count.min(DEPTH_LIMIT) * BYTES_PER_LAYER + OTHER_BYTES;
    assert!(allocated <= most, "{allocated} bytes");
    let lines =
        |dir: &std::path::Path| fs::read_to_string(dir.join("log")).unwrap().lines().count();
    assert_eq!(lines(&root), count);
    assert_eq!(fs::metadata(root.join("log")).unwrap().ino(), number);
    let mut content = [0; 13];
    lower.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(&content, b"never changed");
    drop((log, lower));

    // snap0 was taken before the first round.
    assert_eq!(store.snapshots("web").len(), count + 1);
    for n in [0, count / 2, count - 1] {
        let snapshot = format!("snap{}", n + 1);
        store.ok(["umount", "web"]);
        store.restore("web", &snapshot);
        let root = store.mount("web");
        assert_eq!(
            fs::read_to_string(root.join("state")).unwrap(),
            n.to_string()
        );
        assert_eq!(lines(&root), n + 1, "{snapshot}");
    }
    store.ok(["umount", "web"]);
}
