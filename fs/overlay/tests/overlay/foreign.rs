//! Layers from other programs.
//!
//! They have markers that cowl reads but never writes, markers without a meaning, and damaged markers. Damage is an
//! error and never treated as an absent object.

use std::path::Path;

use crate::common::{Lab, create_files, set_xattr, spaces};
use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;

pub(crate) fn whiteout(path: &Path) {
    let device = rustix::fs::FileType::CharacterDevice;
    let mode = rustix::fs::Mode::empty();
    rustix::fs::mknodat(rustix::fs::CWD, path, device, mode, 0).unwrap();
}

fn create_xattr_whiteout(path: &Path, space: XattrSpace) {
    std::fs::write(path, b"").unwrap();
    set_xattr(path, space.whiteout(), b"");
}

struct Case {
    name: &'static str,
    /// Creates the layer above one with `d/x`, `d/y`, `e/z` and `f`.
    build: fn(&Path, XattrSpace),
    /// All visible paths.
    shown: &'static [&'static str],
}

const CASES: &[Case] = &[
    Case {
        name: "nothing",
        build: |_, _| {},
        shown: &["d", "d/x", "d/y", "e", "e/z", "f"],
    },
    Case {
        name: "marked files in a marked directory",
        build: |top, space| {
            create_files(top, &["d/"]);
            set_xattr(&top.join("d"), space.opaque(), b"x");
            create_xattr_whiteout(&top.join("d/x"), space);
        },
        shown: &["d", "d/y", "e", "e/z", "f"],
    },
    Case {
        name: "whiteouts that hide nothing, and names of tar layers",
        build: |top, _| {
            create_files(top, &["new/.wh.name", "e/.wh..wh..opq"]);
            whiteout(&top.join("new/w"));
            whiteout(&top.join("w"));
        },
        shown: &[
            "d",
            "d/x",
            "d/y",
            "e",
            "e/.wh..wh..opq",
            "e/z",
            "f",
            "new",
            "new/.wh.name",
        ],
    },
    Case {
        name: "a sibling redirect",
        build: |top, space| {
            create_files(top, &["moved/"]);
            set_xattr(&top.join("moved"), space.redirect(), b"d");
            whiteout(&top.join("d"));
        },
        shown: &["e", "e/z", "f", "moved", "moved/x", "moved/y"],
    },
    Case {
        name: "a path redirect that ends in a NUL",
        build: |top, space| {
            create_files(top, &["e/moved/"]);
            set_xattr(&top.join("e/moved"), space.redirect(), b"/d\0");
            whiteout(&top.join("d"));
        },
        shown: &["e", "e/moved", "e/moved/x", "e/moved/y", "e/z", "f"],
    },
    Case {
        name: "an opaque directory with a redirect is not merged",
        build: |top, space| {
            create_files(top, &["e/own"]);
            set_xattr(&top.join("e"), space.opaque(), b"y");
            set_xattr(&top.join("e"), space.redirect(), b"/d");
        },
        shown: &["d", "d/x", "d/y", "e", "e/own", "f"],
    },
    Case {
        name: "a redirect to nowhere, and one to a file",
        build: |top, space| {
            create_files(top, &["n/own", "m/"]);
            set_xattr(&top.join("n"), space.redirect(), b"/none/at/all");
            set_xattr(&top.join("m"), space.redirect(), b"f");
        },
        shown: &["d", "d/x", "d/y", "e", "e/z", "f", "m", "n", "n/own"],
    },
    Case {
        name: "a redirect on a file that is whole",
        build: |top, space| {
            create_files(top, &["f"]);
            set_xattr(&top.join("f"), space.redirect(), b"/d/x");
        },
        shown: &["d", "d/x", "d/y", "e", "e/z", "f"],
    },
    Case {
        name: "a file over a directory, a directory over a file",
        build: |top, _| create_files(top, &["d", "f/in"]),
        shown: &["d", "e", "e/z", "f", "f/in"],
    },
];

fn over(build: impl FnOnce(&Path), space: XattrSpace) -> Lab {
    let lab = Lab::new(|top| create_files(top, &["d/x", "d/y", "e/z", "f"])).in_space(space);
    lab.add_lower(build);
    lab
}

#[test]
fn foreign_markers_are_interpreted() {
    for &space in spaces() {
        for case in CASES {
            let lab = over(|top| (case.build)(top, space), space);
            let fs = lab.open();
            let tree = fs.tree();
            let paths: Vec<&String> = tree.keys().collect();
            assert_eq!(paths, case.shown, "{}", case.name);
            // Copy everything up, and rename each object of the root back and forth.
            for (path, object) in &tree {
                fs.chmod(path, object.perm).unwrap();
                if !path.contains('/') {
                    fs.rename(path, "elsewhere").unwrap();
                    fs.rename("elsewhere", path).unwrap();
                }
            }
            assert!(fs.tree() == tree, "{}: copied up", case.name);
            drop(fs);
            assert!(
                lab.open().tree() == tree,
                "{}: after a new mount",
                case.name
            );
        }
    }
}

/// The opaque marker and the marker of a directory with xattr whiteouts are values of the same xattr.
#[test]
fn xattr_whiteouts_remain_valid_when_their_directory_becomes_opaque() {
    for &space in spaces() {
        let lab = over(|_| {}, space);
        // As a mount leaves it where device nodes are refused.
        let n = lab.upper().join("n");
        create_files(&lab.upper(), &["n/own"]);
        set_xattr(&n, space.opaque(), b"x");
        create_xattr_whiteout(&n.join("w"), space);
        let fs = lab.open();
        assert_eq!(fs.names("n").unwrap(), ["own"]);
        fs.unlink("e/z").unwrap();
        fs.rename("n", "e").unwrap();
        assert_eq!(fs.names("e").unwrap(), ["own"]);
        fs.tree();
        assert_eq!(lab.describe_upper(), ["e dir opaque", "e/own file"]);
        fs.unlink("e/own").unwrap();
        fs.rmdir("e").unwrap();
    }
}

#[test]
fn damaged_markers_return_eio() {
    let space = XattrSpace::detect();
    let bad: [(&str, &[u8]); 5] = [
        (space.redirect(), b"../d"),
        (space.redirect(), b"/d/../../etc"),
        (space.redirect(), b""),
        (space.ino(), b""),
        (space.ino(), b"\x01short"),
    ];
    for (marker, value) in bad {
        let lab = over(
            |top| {
                create_files(top, &["d/"]);
                set_xattr(&top.join("d"), marker, value);
            },
            space,
        );
        let fs = lab.open();
        let description = format!("{marker} {}", value.escape_ascii());
        assert_eq!(fs.attr("d").unwrap_err(), Errno::IO, "{description}");
        assert_eq!(fs.mkdir("d").unwrap_err(), Errno::IO, "{description}");
        assert_eq!(fs.read("f").unwrap(), b"content of f", "{description}");
        // The upper layer stays unchanged: the marked object is not replaced.
        assert_eq!(lab.describe_upper(), [""; 0], "{description}");
    }
    // A metacopy without content in any layer.
    let lab = over(
        |top| {
            create_files(top, &["lost"]);
            set_xattr(&top.join("lost"), space.metacopy(), b"");
        },
        space,
    );
    assert_eq!(lab.open().attr("lost").unwrap_err(), Errno::IO);
}

#[test]
fn inherited_number_requires_its_layer() {
    let space = XattrSpace::detect();
    let lab = over(
        |top| {
            create_files(top, &["later", "other"]);
            set_xattr(&top.join("later"), space.ino(), b"\x02whatever");
            let unknown_layer = [&[1][..], &7_u64.to_le_bytes(), &1234_u64.to_le_bytes()].concat();
            set_xattr(&top.join("other"), space.ino(), &unknown_layer);
        },
        space,
    );
    let fs = lab.open();
    for path in ["later", "other"] {
        let own = crate::common::lstat(&lab.lower().join(path)).ino;
        assert_eq!(fs.number(path), own, "{path}");
        fs.chmod(path, 0o600).unwrap();
        assert_eq!(fs.number(path), own, "{path}");
    }
    drop(fs);
    let fs = lab.open();
    for path in ["later", "other"] {
        assert_eq!(
            fs.number(path),
            crate::common::lstat(&lab.lower().join(path)).ino
        );
    }
}
