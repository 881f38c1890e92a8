//! Marks of fuse-overlayfs, which are names: read where the mount is told to, ordinary names elsewhere.

use crate::common::{Lab, plant, set_xattr, spaces};
use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;

/// A lower, a layer above it that fuse-overlayfs could have written, and an upper that it wrote.
fn lab(space: XattrSpace) -> Lab {
    let lab = Lab::new(|top| plant(top, &["d/x", "d/y", "e/z", "f", "g/a", "h/b", "i/c", "k"]));
    lab.add_lower(|top| {
        plant(
            top,
            &[
                "d/.wh.x",
                "e/new",
                "e/.wh..wh..opq",
                ".wh.f",
                "g/own",
                "h/own",
                ".wh.h",
                "i/own",
            ],
        );
        set_xattr(&top.join("g"), XattrSpace::User.opaque(), b"n");
        set_xattr(&top.join("g"), "user.fuseoverlayfs.opaque", b"y");
    });
    let lab = lab.in_space(space);
    plant(&lab.upper(), &["i/.wh.c", ".wh.k", "d/.wh.y"]);
    lab
}

#[test]
fn names_are_marks_where_the_mount_is_told_so() {
    for &space in spaces() {
        let lab = lab(space);
        let fs = lab.open_foreign();
        assert_eq!(fs.names("").unwrap(), ["d", "e", "g", "h", "i"]);
        assert_eq!(fs.names("d").unwrap(), [""; 0]);
        assert_eq!(fs.names("e").unwrap(), ["new"]);
        assert_eq!(fs.names("g").unwrap(), ["own"]);
        assert_eq!(fs.names("h").unwrap(), ["own"]);
        assert_eq!(fs.names("i").unwrap(), ["own"]);
        for absent in [
            "f",
            "k",
            ".wh.f",
            ".wh.k",
            "d/.wh.x",
            "e/.wh..wh..opq",
            "e/z",
        ] {
            assert_eq!(fs.read(absent), Err(Errno::NOENT), "{absent}");
        }
        assert_eq!(
            fs.get_xattr("g", "user.fuseoverlayfs.opaque"),
            Err(Errno::NODATA)
        );
        assert_eq!(
            fs.set_xattr("g", "user.fuseoverlayfs.opaque", b"n"),
            Err(Errno::PERM)
        );
    }
}

#[test]
fn changes_above_them_leave_marks_of_our_own() {
    for &space in spaces() {
        let lab = lab(space);
        let fs = lab.open_foreign();
        // Copied up, an opaque folder must not hide itself.
        for folder in ["d", "e", "g", "h", "i"] {
            fs.chmod(folder, 0o700).unwrap();
        }
        fs.create("k", b"k").unwrap();
        fs.mkdir("f").unwrap();
        fs.rename("g/own", "d/y").unwrap();
        fs.link("d/y", "i/c").unwrap();
        fs.unlink("i/own").unwrap();
        fs.rename("h", "h2").unwrap();
        for mark in [".wh.new", "d/.wh..wh..opq", ".wh."] {
            assert_eq!(fs.create(mark, b""), Err(Errno::INVAL), "{mark}");
            assert_eq!(fs.mkdir(mark), Err(Errno::INVAL), "{mark}");
            assert_eq!(fs.rename("k", mark), Err(Errno::INVAL), "{mark}");
            assert_eq!(fs.link("k", mark), Err(Errno::INVAL), "{mark}");
        }
        fs.unlink("k").unwrap();
        fs.rename("d/y", "k").unwrap();
        drop(fs);
        let expected: [(&str, &[&str]); 6] = [
            ("", &["d", "e", "f", "g", "h2", "i", "k"]),
            ("d", &[]),
            ("e", &["new"]),
            ("f", &[]),
            ("g", &[]),
            ("i", &["c"]),
        ];
        let fs = lab.open_foreign();
        for (folder, names) in expected {
            assert_eq!(fs.names(folder).unwrap(), names, "{folder}");
        }
        assert_eq!(fs.names("h2").unwrap(), ["own"]);
        assert_eq!(fs.attr("k").unwrap().stat.nlink, 2);
        fs.unlink("i/c").unwrap();
        fs.rmdir("i").unwrap();
        fs.unlink("e/new").unwrap();
        fs.rename("f", "e").unwrap();
        assert_eq!(fs.names("e").unwrap(), [""; 0]);
    }
}

#[test]
fn they_are_ordinary_names_else() {
    for &space in spaces() {
        let lab = lab(space);
        let fs = lab.open();
        assert_eq!(fs.names("d").unwrap(), [".wh.x", ".wh.y", "x", "y"]);
        assert_eq!(fs.names("e").unwrap(), [".wh..wh..opq", "new", "z"]);
        fs.rename("d/.wh.x", ".wh.any").unwrap();
        fs.create(".wh..wh..opq", b"text").unwrap();
        drop(fs);
        let fs = lab.open();
        assert_eq!(fs.read(".wh..wh..opq").unwrap(), b"text");
        assert_eq!(
            fs.get_xattr("g", "user.fuseoverlayfs.opaque").unwrap(),
            b"y"
        );
    }
}

/// `.wh.NAME` beside NAME says that a folder NAME is opaque: another folder that gets its name is not.
#[test]
fn a_folder_that_is_moved_over_a_marked_one_shows_what_it_showed() {
    for &space in spaces() {
        let lab = Lab::new(|top| plant(top, &["from/a", "to/b", "plain/c"])).in_space(space);
        plant(&lab.upper(), &["to/", ".wh.to", "plain/", ".wh.plain"]);
        let mut fs = lab.open_foreign();
        assert_eq!(fs.names("to").unwrap(), [""; 0]);
        fs.rename("from", "to").unwrap();
        fs.rename("plain", "moved").unwrap();
        for again in [false, true] {
            if again {
                drop(fs);
                fs = lab.open_foreign();
            }
            assert_eq!(fs.names("").unwrap(), ["moved", "to"]);
            assert_eq!(fs.names("to").unwrap(), ["a"]);
            assert_eq!(fs.names("moved").unwrap(), [""; 0]);
        }
    }
}
