//! A number belongs to one object, also where the file system gives numbers out again: copied up,
//! flattened, the old layers collected, and then a hundred thousand new files.

use std::collections::HashMap;
use std::os::unix::fs::{DirEntryExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::images;
use cowl_tests::tree;

const OLD: u32 = 2_000;
const NEW: u32 = 100_000;

/// Returns every object below `root` by its inode number, and verifies that only hard links share a number.
fn numbers(root: &Path) -> HashMap<u64, PathBuf> {
    let mut found: HashMap<u64, PathBuf> = HashMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let stat = entry.metadata().unwrap();
            assert_eq!(entry.ino(), stat.ino(), "{}", entry.path().display());
            if let Some(other) = found.insert(stat.ino(), entry.path()) {
                let linked = stat.nlink() > 1 && stat.is_file();
                let (one, two) = (other.display(), entry.path());
                assert!(linked, "{one} and {} have one number", two.display());
                // The order of a listing is not stable, so of two names always the same one is returned.
                found.insert(stat.ino(), other.min(entry.path()));
            }
            if stat.is_dir() {
                open.push(entry.path());
            }
        }
    }
    found
}

#[test]
fn inode_numbers_are_unique_after_a_flatten() {
    let needs = [Need::Root, Need::Fuse, Need::Program("mkfs.ext4")];
    if !can(&needs) {
        return;
    }
    let store = Store::on(|scratch, name| images::ext4_for(NEW + 4 * OLD, scratch, name));
    let base = store.scratch().make("base");
    for number in 0..OLD {
        std::fs::write(base.join(format!("old{number}")), "content").unwrap();
    }
    for number in (0..OLD).step_by(10) {
        let name = base.join(format!("old{number}"));
        std::fs::hard_link(name, base.join(format!("two{number}"))).unwrap();
    }
    store.create("web", &base);
    let layers = || {
        let layers = std::fs::read_dir(store.path().join("layers")).unwrap();
        layers.count()
    };
    let mount_point = store.mount("web");
    // A quarter each is copied up without content, copied up with content, removed, and unchanged.
    for number in 0..OLD {
        let file = mount_point.join(format!("old{number}"));
        match number % 4 {
            0 => std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap(),
            1 => std::fs::write(&file, "changed").unwrap(),
            2 => std::fs::remove_file(&file).unwrap(),
            _ => {}
        }
    }
    let before = numbers(&mount_point);
    store.cowl(["umount", "web"]).ok();
    store.cowl(["mount", "web"]).ok();
    assert_eq!(numbers(&mount_point), before, "after a remount");
    store.cowl(["umount", "web"]).ok();
    store.cowl(["flatten", "web"]).ok();
    // The layers that contained the original inodes are removed, so the file system can reuse their numbers.
    assert_eq!(layers(), 2, "a flattened layer and a head");
    store.cowl(["mount", "web"]).ok();
    let flattened = numbers(&mount_point);
    assert_eq!(flattened.len(), before.len());
    std::fs::create_dir(mount_point.join("new")).unwrap();
    for number in 0..NEW {
        std::fs::File::create(mount_point.join(format!("new/{number}"))).unwrap();
    }
    // Some old ones are copied up among the new ones.
    for number in (3..OLD).step_by(4) {
        let file = mount_point.join(format!("old{number}"));
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    }
    let after = numbers(&mount_point);
    assert_eq!(after.len(), flattened.len() + 1 + NEW as usize);
    for (number, path) in &flattened {
        assert_eq!(after.get(number), Some(path));
    }
    store.cowl(["umount", "web"]).ok();
    store.cowl(["mount", "web"]).ok();
    assert!(numbers(&mount_point) == after, "after a remount");
    store.cowl(["umount", "web"]).ok();
}

/// Like after a remount, but the mount continues: what is known retains its number, and no new object gets it.
#[test]
fn inode_numbers_are_retained_when_layers_are_merged_under_a_mount() {
    let needs = [Need::Root, Need::Fuse, Need::Program("mkfs.ext4")];
    if !can(&needs) {
        return;
    }
    let store = Store::on(|scratch, name| images::ext4_for(NEW + 4 * OLD, scratch, name));
    let base = store.scratch().make("base");
    for number in 0..OLD {
        std::fs::write(base.join(format!("old{number}")), "content").unwrap();
    }
    store.create("web", &base);
    let mount_point = store.mount("web");
    store.ok(["snapshot", "web"]);
    store.ok(["rm", "web", "snap0"]);
    for number in (0..OLD).step_by(3) {
        std::fs::write(mount_point.join(format!("old{number}")), "changed").unwrap();
    }
    store.ok(["snapshot", "web"]);
    store.ok(["rm", "web", "snap1"]);
    let before = numbers(&mount_point);
    // An open descriptor of each object prevents the kernel from forgetting it.
    let known = tree::open_all(&mount_point).unwrap();
    store.ok(["flatten", "web", "--base"]);
    let layers = std::fs::read_dir(store.path().join("layers")).unwrap();
    assert_eq!(layers.count(), 2, "the merged layer and the head");
    assert_eq!(numbers(&mount_point), before);
    drop(known);
    std::fs::create_dir(mount_point.join("new")).unwrap();
    for number in 0..NEW {
        std::fs::File::create(mount_point.join(format!("new/{number}"))).unwrap();
    }
    // Also those that the kernel has forgotten in the meantime.
    std::fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    let after = numbers(&mount_point);
    for (number, path) in &before {
        assert_eq!(after.get(number), Some(path));
    }
    store.ok(["umount", "web"]);
}
