//! The overlay releases the memory and the descriptors of objects that are no longer referenced.

use crate::common::{Lab, READ, caller, create_files};
use cowl_layers::Name;
use cowl_overlay::RenameFlags;

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The kernel sends FORGET when it evicts an inode and RELEASE when a file is closed.
///
/// It delivers queued FORGETs first, so the last request for an inode is often RELEASE.
#[test]
fn inode_forgotten_before_close_is_released() {
    let count = 1000;
    let lab = Lab::new(|top| {
        for number in 0..count {
            create_files(top, &[&format!("d{number}/f")]);
        }
    });
    let fs = lab.open();
    let inodes = fs.overlay.inodes();
    for number in 0..count {
        let op = fs.overlay.begin();
        let inode = op.lookup_path(format!("d{number}/f").as_bytes()).unwrap();
        inodes.count_lookup(&inode);
        let handle = op.open(caller(), &inode, READ).unwrap();
        fs.overlay.forget(inode.ino(), 1);
        drop(inode);
        fs.overlay.close(&handle);
    }
    let remaining = inodes.len();
    assert!(remaining < count / 2, "{remaining} of {count} remain");
}

/// Moved lower directories are recorded, because they may contain hard links. The record of a removed one must be
/// dropped.
#[test]
fn removed_directories_leak_no_descriptors() {
    let count = 300;
    let lab = Lab::new(|top| {
        for number in 0..count {
            create_files(top, &[&format!("d{number}/")]);
        }
    });
    let fs = lab.open();
    let before = descriptors();
    let root = fs.overlay.root();
    for number in 0..count {
        let name = |first: &str| Name::new(format!("{first}{number}")).unwrap();
        let op = fs.overlay.begin();
        let rename = |from: &Name, to: &Name| {
            op.rename(caller(), root, from, root, to, RenameFlags::default())
                .unwrap();
        };
        rename(&name("d"), &name("e"));
        if number % 2 == 0 {
            op.mkdir(caller(), root, &name("new"), 0o755).unwrap();
            rename(&name("new"), &name("e"));
        }
        op.rmdir(root, &name("e")).unwrap();
    }
    let more = descriptors().saturating_sub(before);
    assert!(
        more < count / 3,
        "{more} descriptors left by {count} directories"
    );
}
