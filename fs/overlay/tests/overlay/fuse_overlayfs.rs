//! Markers of container images and of fuse-overlayfs, which are file names: interpreted with the mount option, ordinary
//! names without it.

use crate::common::{Lab, create_files, set_xattr, spaces};
use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;

/// Creates a lower layer, and above it a layer and an upper layer as fuse-overlayfs writes them.
fn lab(space: XattrSpace) -> Lab {
    let lab =
        Lab::new(|top| create_files(top, &["d/x", "d/y", "e/z", "f", "g/a", "h/b", "i/c", "k"]));
    lab.add_lower(|top| {
        create_files(
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
    create_files(&lab.upper(), &["i/.wh.c", ".wh.k", "d/.wh.y"]);
    lab
}

#[test]
fn fuse_overlayfs_markers_count_with_the_option() {
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
fn changes_above_fuse_overlayfs_markers_leave_own_markers() {
    for &space in spaces() {
        let lab = lab(space);
        let fs = lab.open_foreign();
        // The copy of an opaque directory must not hide the original's content.
        for dir in ["d", "e", "g", "h", "i"] {
            fs.chmod(dir, 0o700).unwrap();
        }
        fs.create("k", b"k").unwrap();
        fs.mkdir("f").unwrap();
        fs.rename("g/own", "d/y").unwrap();
        fs.link("d/y", "i/c").unwrap();
        fs.unlink("i/own").unwrap();
        fs.rename("h", "h2").unwrap();
        for marker in [".wh.new", "d/.wh..wh..opq", ".wh."] {
            assert_eq!(fs.create(marker, b""), Err(Errno::INVAL), "{marker}");
            assert_eq!(fs.mkdir(marker), Err(Errno::INVAL), "{marker}");
            assert_eq!(fs.rename("k", marker), Err(Errno::INVAL), "{marker}");
            assert_eq!(fs.link("k", marker), Err(Errno::INVAL), "{marker}");
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
        for (dir, names) in expected {
            assert_eq!(fs.names(dir).unwrap(), names, "{dir}");
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
fn fuse_overlayfs_markers_are_ordinary_names_without_the_option() {
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

/// `.wh.NAME` next to a directory NAME marks it as opaque. A directory that is moved to NAME must not become opaque.
#[test]
fn directory_moved_over_an_opaque_marker_keeps_its_content() {
    for &space in spaces() {
        let lab = Lab::new(|top| create_files(top, &["from/a", "to/b", "plain/c"])).in_space(space);
        create_files(&lab.upper(), &["to/", ".wh.to", "plain/", ".wh.plain"]);
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

/// The name that a marker hides does not exist in the marker's layer.
#[test]
fn hard_links_are_found_next_to_foreign_markers() {
    for &space in spaces() {
        let lab = Lab::new(|top| create_files(top, &["gone", "d/gone"]));
        lab.add_lower(|top| {
            create_files(top, &["a", ".wh.gone", "d/.wh.gone", "d/.wh..wh..opq"]);
            std::fs::hard_link(top.join("a"), top.join("d/b")).unwrap();
        });
        let lab = lab.in_space(space);
        let fs = lab.open_foreign();
        assert_eq!(fs.attr("a").unwrap().stat.nlink, 2);
        fs.append("a", b"!").unwrap();
        assert_eq!(fs.read("d/b").unwrap(), fs.read("a").unwrap());
        fs.unlink("a").unwrap();
        assert_eq!(fs.attr("d/b").unwrap().stat.nlink, 1);
        drop(fs);
        let fs = lab.open_foreign();
        assert_eq!(fs.names("").unwrap(), ["d"]);
        assert_eq!(fs.names("d").unwrap(), ["b"]);
    }
}

/// One name can have a marker of the overlay, a foreign one and an object in the same layer. The object is visible.
#[test]
fn objects_and_markers_of_both_forms_can_have_one_name() {
    for &space in spaces() {
        let lab = Lab::new(|top| create_files(top, &["a", "b", "c/low", "d/low", "e/low", "f"]));
        lab.add_lower(|top| {
            create_files(
                top,
                &[
                    "a",
                    ".wh.a",
                    ".wh.b",
                    "c/top",
                    ".wh.c",
                    "d/top",
                    "d/.wh..wh..opq",
                    "e/top",
                    "e/.wh..wh.plnk/x",
                    "e/.wh..wh.aufs",
                    ".wh.f/inside",
                    ".wh.",
                    ".wh..wh.orph/y",
                ],
            );
            set_xattr(&top.join("d"), space.opaque(), b"y");
            crate::foreign::whiteout(&top.join("b"));
        });
        let lab = lab.in_space(space);
        let mut fs = lab.open_foreign();
        for again in [false, true] {
            if again {
                fs.unlink("a").unwrap();
                fs.create("b", b"b").unwrap();
                fs.rename("c", "c2").unwrap();
                fs.rename("c2", "c").unwrap();
                fs.unlink("e/top").unwrap();
                fs.create("e/top", b"").unwrap();
                fs.unlink("b").unwrap();
                fs.create("a", b"").unwrap();
                drop(fs);
                fs = lab.open_foreign();
            }
            assert_eq!(fs.names("").unwrap(), ["a", "c", "d", "e"]);
            assert_eq!(fs.names("c").unwrap(), ["top"]);
            assert_eq!(fs.names("d").unwrap(), ["top"]);
            assert_eq!(fs.names("e").unwrap(), ["low", "top"]);
        }
    }
}

/// In a directory whose listing has shown no markers, none is searched for.
#[test]
fn changes_do_not_depend_on_whether_a_directory_was_listed() {
    let change = |listed: bool| {
        let lab = lab(XattrSpace::detect());
        let build = |top: &std::path::Path| create_files(top, &["m/p", "m/q", "m/.wh.r"]);
        lab.add_lower(|top| create_files(top, &["m/r", "n/s", "n/t"]));
        lab.add_lower(build);
        let fs = lab.open_foreign();
        if listed {
            fs.tree();
        }
        fs.unlink("m/p").unwrap();
        fs.create("m/r", b"text").unwrap();
        fs.rename("m/q", "m/p").unwrap();
        fs.unlink("m/r").unwrap();
        fs.rename("n/s", "n/u").unwrap();
        fs.unlink("n/t").unwrap();
        fs.create("n/t", b"text").unwrap();
        fs.create("d/y", b"text").unwrap();
        fs.unlink("d/y").unwrap();
        fs.mkdir("new").unwrap();
        fs.rename("n/t", "new/x").unwrap();
        fs.rename("new", "d/x").unwrap();
        assert_eq!(fs.create("d/x/.wh.a", b""), Err(Errno::INVAL));
        let names = ["", "d", "d/x", "m", "n"].map(|dir| fs.names(dir).unwrap());
        let tree = fs.tree();
        drop(fs);
        assert_eq!(lab.open_foreign().tree(), tree);
        (names, lab.describe_upper())
    };
    assert_eq!(change(true), change(false));
}
