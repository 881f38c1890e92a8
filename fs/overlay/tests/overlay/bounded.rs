//! What is kept of objects goes when nobody knows them any more: memory and descriptors are bounded,
//! whatever was done before.

use crate::common::{Lab, READ, caller, plant};
use cowl_layers::Name;
use cowl_overlay::RenameFlags;

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The kernel sends FORGET when an inode leaves its cache and RELEASE when a file is closed, and it hands
/// waiting FORGETs over first: the last word on an inode is often the close.
#[test]
fn a_file_that_is_closed_after_it_was_forgotten_is_not_kept() {
    let count = 1000;
    let lab = Lab::new(|top| {
        for number in 0..count {
            plant(top, &[&format!("d{number}/f")]);
        }
    });
    let fs = lab.open();
    let inodes = fs.overlay.inodes();
    for number in 0..count {
        let op = fs.overlay.begin();
        let inode = op.lookup_path(format!("d{number}/f").as_bytes()).unwrap();
        inodes.count_lookup(&inode);
        let handle = op.open(caller(), &inode, READ).unwrap();
        inodes.forget(inode.ino(), 1);
        drop(inode);
        fs.overlay.close(&handle);
    }
    let kept = inodes.len();
    assert!(kept < count / 2, "{kept} of {count} are kept");
}

/// Folders from below that were moved are noted, because hard links may show in them; removed ones show
/// nothing.
#[test]
fn folders_that_were_moved_and_removed_hold_no_descriptors() {
    let count = 300;
    let lab = Lab::new(|top| {
        for number in 0..count {
            plant(top, &[&format!("d{number}/")]);
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
    assert!(more < count / 3, "{more} descriptors for {count} folders");
}
