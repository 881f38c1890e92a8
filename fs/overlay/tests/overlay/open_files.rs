//! Open files, whose file changes after the open.

use crate::common::{Fs, Lab, READ, WRITE, create_files};
use cowl_overlay::{OverlayOptions, unopened};

fn labs() -> [Lab; 2] {
    let build = |top: &std::path::Path| {
        create_files(top, &["f", "g", "h1"]);
        std::fs::hard_link(top.join("h1"), top.join("h2")).unwrap();
    };
    [
        Lab::new(build),
        Lab::new(build).with(OverlayOptions::default()),
    ]
}

type Change = fn(&Fs);

/// A change of `f` while it is open, with the expected content and link count.
const CHANGES: [(Change, &[u8], u64); 8] = [
    (|fs| fs.append("f", b"+").unwrap(), b"content of f+", 1),
    (|fs| fs.overwrite("f", b"new").unwrap(), b"new", 1),
    (|fs| fs.truncate("f", 3).unwrap(), b"con", 1),
    (|fs| fs.chmod("f", 0o600).unwrap(), b"content of f", 1),
    (
        |fs| {
            fs.chmod("f", 0o600).unwrap();
            fs.append("f", b"+").unwrap();
        },
        b"content of f+",
        1,
    ),
    (
        |fs| {
            fs.rename("f", "moved").unwrap();
            fs.append("moved", b"+").unwrap();
        },
        b"content of f+",
        1,
    ),
    (|fs| fs.unlink("f").unwrap(), b"content of f", 0),
    (|fs| fs.rename("g", "f").unwrap(), b"content of f", 0),
];

#[test]
fn open_file_sees_later_changes() {
    // The file is a lower one, a metacopy, or in the upper layer.
    let setups: [fn(&Fs); 3] = [
        |_| {},
        |fs| fs.chmod("f", 0o640).unwrap(),
        |fs| fs.append("f", b"").unwrap(),
    ];
    for setup in setups {
        for (act, content, nlink) in CHANGES {
            for lab in labs() {
                let fs = lab.open();
                setup(&fs);
                let handle = fs.open("f", READ).unwrap();
                assert_eq!(fs.read_handle(&handle).unwrap(), b"content of f");
                act(&fs);
                assert_eq!(fs.read_handle(&handle).unwrap(), content);
                let attr = fs.attr_of_inode(handle.inode()).unwrap();
                assert_eq!(attr.stat.nlink, nlink);
                assert_eq!(attr.ino, handle.inode().ino());
                lab.push(&fs).unwrap();
                assert_eq!(fs.read_handle(&handle).unwrap(), content, "after a push");
                assert_eq!(fs.overlay.open_files(), Some((1, 0)));
                fs.overlay.close(&handle);
                assert_eq!(fs.overlay.open_files(), Some((0, 0)));
            }
        }
    }
}

/// An unlinked open file can be changed after its layer is frozen.
#[test]
fn unlinked_open_file_can_be_changed() {
    for lab in labs() {
        for path in ["f", "g"] {
            let fs = lab.open();
            if path == "g" {
                fs.append("g", b"").unwrap();
            }
            let handle = fs.open(path, READ).unwrap();
            fs.unlink(path).unwrap();
            let left = lab.describe_upper();
            lab.push(&fs).unwrap();
            let set = cowl_overlay::SetAttr {
                mode: Some(0o600),
                ..Default::default()
            };
            let op = fs.overlay.begin();
            let attr = op
                .set_attr(crate::common::caller(), handle.inode(), &set, None)
                .unwrap();
            assert_eq!((attr.stat.perm(), attr.stat.nlink), (0o600, 0));
            drop(op);
            let content = format!("content of {path}");
            assert_eq!(fs.read_handle(&handle).unwrap(), content.as_bytes());
            assert_eq!(lab.describe_upper(), [""; 0], "the copy has a name");
            assert!(left.contains(&format!("{path} whiteout")));
        }
    }
}

#[test]
fn open_file_is_writable_after_rename_and_unlink() {
    for lab in labs() {
        let fs = lab.open();
        let handle = fs.open("f", WRITE).unwrap();
        fs.rename("f", "moved").unwrap();
        fs.write_handle(&handle, 0, b"C").unwrap();
        assert_eq!(fs.read("moved").unwrap(), b"Content of f");
        fs.unlink("moved").unwrap();
        fs.write_handle(&handle, 0, b"K").unwrap();
        assert_eq!(fs.read_handle(&handle).unwrap(), b"Kontent of f");
        fs.overlay.close(&handle);
    }
}

#[test]
fn open_file_survives_the_unlink_of_one_name() {
    for lab in labs() {
        let fs = lab.open();
        let handle = fs.open("h1", READ).unwrap();
        fs.unlink("h1").unwrap();
        assert_eq!(fs.attr_of_inode(handle.inode()).unwrap().stat.nlink, 1);
        fs.append("h2", b"+").unwrap();
        assert_eq!(fs.read_handle(&handle).unwrap(), b"content of h1+");
        fs.unlink("h2").unwrap();
        assert_eq!(fs.attr_of_inode(handle.inode()).unwrap().stat.nlink, 0);
        assert_eq!(fs.read_handle(&handle).unwrap(), b"content of h1+");
    }
}

/// Returns the number of descriptors that this process has of a file.
fn descriptors_of(dev: u64, ino: u64) -> usize {
    use std::os::unix::fs::MetadataExt;
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
    let found = descriptors.filter_map(|entry| std::fs::metadata(entry.ok()?.path()).ok());
    found
        .filter(|found| (found.dev(), found.ino()) == (dev, ino))
        .count()
}

/// The kernel opens files without a request: docs/decisions/0044.
#[test]
fn file_that_was_not_opened_can_be_read_and_changed() {
    for lab in labs() {
        let fs = lab.open();
        unopened::set_opens_unknown(&fs.overlay);
        assert_eq!(fs.overlay.open_files(), None);
        let inode = fs.find("f").unwrap();
        let file = |options| {
            let op = fs.overlay.begin();
            unopened::file_for_request(&op, &inode, options).unwrap()
        };
        assert_eq!(fs.read_handle(&file(READ)).unwrap(), b"content of f");
        assert_eq!(lab.describe_upper(), [""; 0]);
        fs.write_handle(&file(WRITE), 0, b"C").unwrap();
        assert_eq!(fs.read("f").unwrap(), b"Content of f");
        lab.push(&fs).unwrap();
        fs.write_handle(&file(WRITE), 1, b"O").unwrap();
        assert_eq!(fs.read_handle(&file(READ)).unwrap(), b"COntent of f");
        fs.unlink("f").unwrap();
        fs.write_handle(&file(WRITE), 2, b"N").unwrap();
        assert_eq!(fs.read_handle(&file(READ)).unwrap(), b"CONtent of f");
        let stat = fs.overlay.begin().stat_on_disk(&inode).unwrap();
        assert!(descriptors_of(stat.dev, stat.ino) > 0);
        let ino = inode.ino();
        drop(inode);
        fs.overlay.forget(ino, u64::MAX);
        let left = descriptors_of(stat.dev, stat.ino);
        assert_eq!(left, 0, "it occupies space");
        let dir = fs.overlay.root();
        let refused = unopened::file_for_request(&fs.overlay.begin(), dir, READ);
        assert!(refused.is_err(), "a directory has no content");
    }
}
