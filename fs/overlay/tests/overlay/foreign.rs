//! Layers that others wrote: marks that cowl reads and does not write, marks that mean nothing where
//! they stand, and damage, which is told and never taken for "absent".

use std::path::Path;

use crate::common::{Lab, plant, set_xattr, spaces};
use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;

fn whiteout(path: &Path) {
    let device = rustix::fs::FileType::CharacterDevice;
    let mode = rustix::fs::Mode::empty();
    rustix::fs::mknodat(rustix::fs::CWD, path, device, mode, 0).unwrap();
}

fn marked_file(path: &Path, space: XattrSpace) {
    std::fs::write(path, b"").unwrap();
    set_xattr(path, space.whiteout(), b"");
}

struct Case {
    name: &'static str,
    /// Makes the layer above one with `d/x`, `d/y`, `e/z` and `f`.
    build: fn(&Path, XattrSpace),
    /// All paths that show.
    shown: &'static [&'static str],
}

const CASES: &[Case] = &[
    Case {
        name: "nothing",
        build: |_, _| {},
        shown: &["d", "d/x", "d/y", "e", "e/z", "f"],
    },
    Case {
        name: "marked files in a marked folder",
        build: |top, space| {
            plant(top, &["d/"]);
            set_xattr(&top.join("d"), space.opaque(), b"x");
            marked_file(&top.join("d/x"), space);
        },
        shown: &["d", "d/y", "e", "e/z", "f"],
    },
    Case {
        name: "whiteouts that hide nothing, and names of tar layers",
        build: |top, _| {
            plant(top, &["new/.wh.name", "e/.wh..wh..opq"]);
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
            plant(top, &["moved/"]);
            set_xattr(&top.join("moved"), space.redirect(), b"d");
            whiteout(&top.join("d"));
        },
        shown: &["e", "e/z", "f", "moved", "moved/x", "moved/y"],
    },
    Case {
        name: "a path redirect that ends in a NUL",
        build: |top, space| {
            plant(top, &["e/moved/"]);
            set_xattr(&top.join("e/moved"), space.redirect(), b"/d\0");
            whiteout(&top.join("d"));
        },
        shown: &["e", "e/moved", "e/moved/x", "e/moved/y", "e/z", "f"],
    },
    Case {
        name: "an opaque folder with a redirect shows its own alone",
        build: |top, space| {
            plant(top, &["e/own"]);
            set_xattr(&top.join("e"), space.opaque(), b"y");
            set_xattr(&top.join("e"), space.redirect(), b"/d");
        },
        shown: &["d", "d/x", "d/y", "e", "e/own", "f"],
    },
    Case {
        name: "a redirect to nowhere, and one to a file",
        build: |top, space| {
            plant(top, &["n/own", "m/"]);
            set_xattr(&top.join("n"), space.redirect(), b"/none/at/all");
            set_xattr(&top.join("m"), space.redirect(), b"f");
        },
        shown: &["d", "d/x", "d/y", "e", "e/z", "f", "m", "n", "n/own"],
    },
    Case {
        name: "a redirect on a file that is whole",
        build: |top, space| {
            plant(top, &["f"]);
            set_xattr(&top.join("f"), space.redirect(), b"/d/x");
        },
        shown: &["d", "d/x", "d/y", "e", "e/z", "f"],
    },
    Case {
        name: "a file over a folder, a folder over a file",
        build: |top, _| plant(top, &["d", "f/in"]),
        shown: &["d", "e", "e/z", "f", "f/in"],
    },
];

fn over(build: impl FnOnce(&Path), space: XattrSpace) -> Lab {
    let lab = Lab::new(|top| plant(top, &["d/x", "d/y", "e/z", "f"])).in_space(space);
    lab.add_lower(build);
    lab
}

#[test]
fn what_shows() {
    for &space in spaces() {
        for case in CASES {
            let lab = over(|top| (case.build)(top, space), space);
            let fs = lab.open();
            let tree = fs.tree();
            let paths: Vec<&String> = tree.keys().collect();
            assert_eq!(paths, case.shown, "{}", case.name);
            // The same with all of it brought up, and moved there and back.
            for (path, object) in &tree {
                fs.chmod(path, object.perm).unwrap();
                if !path.contains('/') {
                    fs.rename(path, "elsewhere").unwrap();
                    fs.rename("elsewhere", path).unwrap();
                }
            }
            assert!(fs.tree() == tree, "{}: brought up", case.name);
            drop(fs);
            assert!(
                lab.open().tree() == tree,
                "{}: after a new mount",
                case.name
            );
        }
    }
}

/// A folder with marked files that gets opaque: the two marks are one attribute.
#[test]
fn marked_files_in_a_folder_that_gets_opaque() {
    for &space in spaces() {
        let lab = over(|_| {}, space);
        // As a mount leaves it where no devices can be made.
        let n = lab.upper().join("n");
        plant(&lab.upper(), &["n/own"]);
        set_xattr(&n, space.opaque(), b"x");
        marked_file(&n.join("w"), space);
        let fs = lab.open();
        assert_eq!(fs.names("n").unwrap(), ["own"]);
        fs.unlink("e/z").unwrap();
        fs.rename("n", "e").unwrap();
        assert_eq!(fs.names("e").unwrap(), ["own"]);
        fs.tree();
        assert_eq!(lab.marks(), ["e dir opaque", "e/own file"]);
        fs.unlink("e/own").unwrap();
        fs.rmdir("e").unwrap();
    }
}

#[test]
fn damage_is_told() {
    let space = XattrSpace::detect();
    let bad: [(&str, &[u8]); 5] = [
        (space.redirect(), b"../d"),
        (space.redirect(), b"/d/../../etc"),
        (space.redirect(), b""),
        (space.ino(), b""),
        (space.ino(), b"\x01short"),
    ];
    for (mark, value) in bad {
        let lab = over(
            |top| {
                plant(top, &["d/"]);
                set_xattr(&top.join("d"), mark, value);
            },
            space,
        );
        let fs = lab.open();
        let why = format!("{mark} {}", value.escape_ascii());
        assert_eq!(fs.attr("d").unwrap_err(), Errno::IO, "{why}");
        assert_eq!(fs.mkdir("d").unwrap_err(), Errno::IO, "{why}");
        assert_eq!(fs.read("f").unwrap(), b"content of f", "{why}");
        // What it marks is not hidden by that, and the layer is not written over it.
        assert_eq!(lab.marks(), [""; 0], "{why}");
    }
    // A file whose content is nowhere.
    let lab = over(
        |top| {
            plant(top, &["lost"]);
            set_xattr(&top.join("lost"), space.metacopy(), b"");
        },
        space,
    );
    assert_eq!(lab.open().attr("lost").unwrap_err(), Errno::IO);
}

#[test]
fn a_borrowed_number_counts_only_while_its_lender_is_there() {
    let space = XattrSpace::detect();
    let lab = over(
        |top| {
            plant(top, &["later", "other"]);
            set_xattr(&top.join("later"), space.ino(), b"\x02whatever");
            let nobody = [&[1][..], &7_u64.to_le_bytes(), &1234_u64.to_le_bytes()].concat();
            set_xattr(&top.join("other"), space.ino(), &nobody);
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
