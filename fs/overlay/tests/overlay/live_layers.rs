//! A read-only overlay of layers to which another overlay writes.

use crate::common::{Lab, READ, create_files};
use cowl_layers::error::Errno;

#[test]
fn known_objects_follow_the_changes_of_the_writer() {
    let lab = Lab::new(|top| create_files(top, &["dir/sub/f", "g", "h"]));
    let (writer, reader) = (lab.open(), lab.open_live());
    assert_eq!(reader.tree(), writer.tree());
    // Held by the kernel, as it were.
    let held = ["dir", "dir/sub", "dir/sub/f", "g", "h"].map(|path| reader.find(path).unwrap());
    let numbers = ["dir/sub/f", "g"].map(|path| reader.number(path));
    writer.append("dir/sub/f", b"more").unwrap();
    writer.rename("dir", "moved").unwrap();
    writer.link("g", "linked").unwrap();
    assert_eq!(reader.tree(), writer.tree());
    assert_eq!(
        ["moved/sub/f", "linked"].map(|path| reader.number(path)),
        numbers
    );
    for (path, index) in [("moved", 0), ("moved/sub", 1), ("linked", 3)] {
        let found = reader.find(path).unwrap();
        assert!(std::sync::Arc::ptr_eq(&found, &held[index]), "{path}");
    }
    assert_eq!(reader.find("dir").unwrap_err(), Errno::NOENT);
    assert_eq!(reader.find("moved/sub").unwrap().kind(), held[1].kind());
}

/// A file system reuses inode numbers, also for an object of another type.
#[test]
fn object_with_a_reused_number_has_its_own_type() {
    let lab = Lab::new(|_| {});
    let (writer, reader) = (lab.open(), lab.open_live());
    let mut held = Vec::new();
    for round in 0..20 {
        if round % 2 == 0 {
            writer.create("object", b"text").unwrap();
        } else {
            writer.mkdir("object").unwrap();
        }
        let inode = reader.find("object").unwrap();
        assert_eq!(inode.is_dir(), round % 2 == 1);
        assert_eq!(reader.tree(), writer.tree());
        held.push(inode);
        if round % 2 == 0 {
            writer.unlink("object").unwrap();
        } else {
            writer.rmdir("object").unwrap();
        }
    }
}

#[test]
fn open_file_keeps_its_content_and_attributes_after_a_removal() {
    let lab = Lab::new(|_| {});
    let (writer, reader) = (lab.open(), lab.open_live());
    writer.create("f", b"old").unwrap();
    let handle = reader.open("f", READ).unwrap();
    writer.unlink("f").unwrap();
    writer.create("f", b"other").unwrap();
    assert_eq!(reader.read("f").unwrap(), b"other");
    assert_eq!(reader.read_handle(&handle).unwrap(), b"old");
    let op = reader.overlay.begin();
    let attr = op.attr_of_open(handle.inode(), &handle).unwrap();
    assert_eq!((attr.stat.size, attr.stat.nlink), (3, 0));
    drop(op);
    reader.overlay.close(&handle);
}
