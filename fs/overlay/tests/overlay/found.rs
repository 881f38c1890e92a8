//! Regression tests of failures that the model test found, each reduced to a minimum.

use crate::common::Lab;
use cowl_layers::format::XattrSpace;

/// In the user namespace, a FIFO or a symbolic link cannot have the xattr with its inode number.
///
/// The copy had two numbers at once: the cached one and the one that a new lookup returned.
#[test]
fn object_without_number_marker_keeps_its_number_while_mounted() {
    let lab = Lab::new(|_| {}).in_space(XattrSpace::User);
    let fs = lab.open();
    fs.mkfifo("fifo").unwrap();
    fs.symlink("link", "nowhere").unwrap();
    lab.push(&fs).unwrap();
    let before = ["fifo", "link"].map(|name| fs.number(name));
    fs.chmod("fifo", 0o600).unwrap();
    fs.rename("link", "moved").unwrap();
    let after = || ["fifo", "moved"].map(|name| fs.number(name));
    assert_eq!(after(), before);
    // Verifies that listings agree.
    fs.tree();
    // A forgotten object gets the same number at the next lookup.
    for number in before {
        fs.overlay.forget(number, u64::MAX);
    }
    assert_eq!(after(), before);
    fs.tree();
}

/// A new object that reuses the inode on disk must not inherit the number of the removed copy.
#[test]
fn number_without_marker_is_not_reused() {
    let lab = Lab::new(|_| {}).in_space(XattrSpace::User);
    let fs = lab.open();
    let names: Vec<String> = (0..20).map(|at| format!("fifo{at}")).collect();
    names.iter().for_each(|name| fs.mkfifo(name).unwrap());
    lab.push(&fs).unwrap();
    for name in &names {
        fs.chmod(name, 0o600).unwrap();
        let number = fs.number(name);
        fs.unlink(name).unwrap();
        // Drop the last reference, so that the file system frees the inode.
        fs.overlay.forget(number, u64::MAX);
    }
    // The file system reuses freed inodes.
    for at in 0..40 {
        fs.create(&format!("file{at}"), b"x").unwrap();
    }
    // Verifies that listings agree with lookups.
    fs.tree();
}
