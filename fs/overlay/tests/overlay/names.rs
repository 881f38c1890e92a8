//! The markers on disk after names were removed, created again and moved, and the tree of a new mount.

use crate::common::{Fs, Lab, create_files, spaces};
use cowl_layers::error::Errno;
use cowl_overlay::RenameFlags;

struct Case {
    name: &'static str,
    act: fn(&Fs),
    /// The expected content of the upper layer.
    upper: &'static [&'static str],
}

const CASES: &[Case] = &[
    Case {
        name: "unlink below",
        act: |fs| fs.unlink("f").unwrap(),
        upper: &["f whiteout"],
    },
    Case {
        name: "unlink a copied-up file",
        act: |fs| {
            fs.append("f", b"x").unwrap();
            fs.unlink("f").unwrap();
        },
        upper: &["f whiteout"],
    },
    Case {
        name: "unlink a new file",
        act: |fs| {
            fs.create("n", b"x").unwrap();
            fs.unlink("n").unwrap();
        },
        upper: &[],
    },
    Case {
        name: "create over a whiteout",
        act: |fs| {
            fs.unlink("f").unwrap();
            fs.create("f", b"x").unwrap();
        },
        upper: &["f file"],
    },
    Case {
        name: "rmdir below",
        act: |fs| fs.rmdir("empty").unwrap(),
        upper: &["empty whiteout"],
    },
    Case {
        name: "rmdir a directory with whiteouts",
        act: |fs| {
            fs.unlink("m/x").unwrap();
            fs.rmdir("m").unwrap();
        },
        upper: &["m whiteout"],
    },
    Case {
        name: "mkdir over a whiteout",
        act: |fs| {
            fs.unlink("m/x").unwrap();
            fs.rmdir("m").unwrap();
            fs.mkdir("m").unwrap();
        },
        upper: &["m dir opaque"],
    },
    Case {
        name: "a name in a new directory over a whiteout is removed without a whiteout",
        act: |fs| {
            fs.rmdir("empty").unwrap();
            fs.mkdir("empty").unwrap();
            fs.create("empty/n", b"").unwrap();
            fs.unlink("empty/n").unwrap();
        },
        upper: &["empty dir opaque"],
    },
    Case {
        name: "a file over a directory's whiteout",
        act: |fs| {
            fs.rmdir("empty").unwrap();
            fs.create("empty", b"").unwrap();
        },
        upper: &["empty file"],
    },
    Case {
        name: "rename a file",
        act: |fs| fs.rename("f", "g").unwrap(),
        upper: &["f whiteout", "g file metacopy redirect=/f"],
    },
    Case {
        name: "rename a file there and back",
        act: |fs| {
            fs.rename("f", "g").unwrap();
            fs.rename("g", "f").unwrap();
        },
        upper: &["f file metacopy redirect=/f"],
    },
    Case {
        name: "rename a new file",
        act: |fs| {
            fs.create("n", b"").unwrap();
            fs.rename("n", "o").unwrap();
        },
        upper: &["o file"],
    },
    Case {
        name: "rename a new file over a lower one",
        act: |fs| {
            fs.create("n", b"").unwrap();
            fs.rename("n", "f").unwrap();
        },
        upper: &["f file"],
    },
    Case {
        name: "rename a new file over a whiteout",
        act: |fs| {
            fs.unlink("f").unwrap();
            fs.create("n", b"").unwrap();
            fs.rename("n", "f").unwrap();
        },
        upper: &["f file"],
    },
    Case {
        name: "rename a lower directory",
        act: |fs| fs.rename("d", "e").unwrap(),
        upper: &["d whiteout", "e dir redirect=/d"],
    },
    Case {
        name: "rename a directory twice, across parents",
        act: |fs| {
            fs.rename("d", "e").unwrap();
            fs.rename("e", "m/e").unwrap();
        },
        upper: &["d whiteout", "m dir", "m/e dir redirect=/d"],
    },
    Case {
        name: "rename a merged directory",
        act: |fs| {
            fs.create("d/n", b"").unwrap();
            fs.rename("d", "e").unwrap();
        },
        upper: &["d whiteout", "e dir redirect=/d", "e/n file"],
    },
    Case {
        name: "rename a directory in a moved directory",
        act: |fs| {
            fs.rename("d", "e").unwrap();
            fs.rename("e/s", "e/t").unwrap();
            fs.rename("e/t/deep", "deep").unwrap();
        },
        upper: &[
            "d whiteout",
            "deep dir redirect=/d/s/deep",
            "e dir redirect=/d",
            "e/s whiteout",
            "e/t dir redirect=/d/s",
            "e/t/deep whiteout",
        ],
    },
    Case {
        name: "rename a lower directory over a whiteout",
        act: |fs| {
            fs.rmdir("empty").unwrap();
            fs.rename("d", "empty").unwrap();
        },
        upper: &["d whiteout", "empty dir redirect=/d"],
    },
    Case {
        name: "rename a new directory over an emptied lower one",
        act: |fs| {
            fs.unlink("m/x").unwrap();
            fs.mkdir("n").unwrap();
            fs.create("n/i", b"").unwrap();
            fs.rename("n", "m").unwrap();
        },
        upper: &["m dir opaque", "m/i file"],
    },
    Case {
        name: "rename a new directory over a whiteout",
        act: |fs| {
            fs.rmdir("empty").unwrap();
            fs.mkdir("n").unwrap();
            fs.rename("n", "empty").unwrap();
        },
        upper: &["empty dir opaque"],
    },
    Case {
        name: "a directory made anew where one was moved away",
        act: |fs| {
            fs.rename("d", "e").unwrap();
            fs.mkdir("d").unwrap();
        },
        upper: &["d dir opaque", "e dir redirect=/d"],
    },
    Case {
        name: "exchange lower directories",
        act: |fs| fs.exchange("d", "m").unwrap(),
        upper: &["d dir redirect=/m", "m dir redirect=/d"],
    },
    Case {
        name: "exchange a file and a new directory",
        act: |fs| {
            fs.mkdir("n").unwrap();
            fs.exchange("n", "f").unwrap();
        },
        upper: &["f dir opaque", "n file metacopy redirect=/f"],
    },
    Case {
        name: "link",
        act: |fs| fs.link("f", "m/l").unwrap(),
        upper: &[
            "f file metacopy redirect=/f",
            "m dir",
            "m/l file metacopy redirect=/f",
        ],
    },
    Case {
        name: "a renamed metacopy that is filled",
        act: |fs| {
            fs.rename("f", "g").unwrap();
            fs.append("g", b"x").unwrap();
        },
        upper: &["f whiteout", "g file"],
    },
    Case {
        name: "a metacopy in a moved directory",
        act: |fs| {
            fs.rename("d", "e").unwrap();
            fs.chmod("e/a", 0o600).unwrap();
        },
        upper: &["d whiteout", "e dir redirect=/d", "e/a file metacopy"],
    },
    Case {
        name: "a metacopy out of a moved directory",
        act: |fs| {
            fs.rename("d", "e").unwrap();
            fs.rename("e/a", "a").unwrap();
        },
        upper: &[
            "a file metacopy redirect=/d/a",
            "d whiteout",
            "e dir redirect=/d",
            "e/a whiteout",
        ],
    },
];

fn lab() -> Lab {
    Lab::new(|top| create_files(top, &["f", "d/a", "d/s/deep/b", "m/x", "empty/"]))
}

#[test]
fn changes_create_the_expected_markers() {
    let cases = CASES.iter();
    for (case, &space) in cases.flat_map(|case| spaces().iter().map(move |space| (case, space))) {
        let lab = lab().in_space(space);
        let fs = lab.open();
        (case.act)(&fs);
        assert_eq!(lab.describe_upper(), case.upper, "{}", case.name);
        let shown = fs.tree();
        drop(fs);
        assert_eq!(lab.open().tree(), shown, "{}: after a new mount", case.name);
        assert_eq!(
            lab.open_read_only().tree(),
            shown,
            "{}: read-only",
            case.name
        );
    }
}

/// Freezes the upper layer after each case, and then copies up and moves its directories.
#[test]
fn markers_in_a_frozen_layer_remain_valid() {
    for case in CASES {
        let lab = lab();
        let fs = lab.open();
        (case.act)(&fs);
        let shown = fs.tree();
        lab.push(&fs).unwrap();
        assert_eq!(fs.tree(), shown, "{}: after a push", case.name);
        // Copy up all directories, and rename those of the root back and forth.
        for (path, object) in shown.iter().filter(|(_, o)| o.mtime.is_none()) {
            fs.chmod(path, object.perm).unwrap();
            if !path.contains('/') {
                fs.rename(path, "elsewhere").unwrap();
                fs.rename("elsewhere", path).unwrap();
            }
        }
        assert_eq!(fs.tree(), shown, "{}: moved there and back", case.name);
        drop(fs);
        assert_eq!(lab.open().tree(), shown, "{}: after a new mount", case.name);
    }
}

#[test]
fn content_follows_a_moved_directory() {
    let lab = lab();
    let fs = lab.open();
    fs.append("d/s/deep/b", b"+").unwrap();
    fs.rename("d", "e").unwrap();
    fs.rename("e/s", "m/s").unwrap();
    for fs in [fs, lab.open_read_only()] {
        assert_eq!(fs.read("e/a").unwrap(), b"content of d/a");
        assert_eq!(fs.read("m/s/deep/b").unwrap(), b"content of d/s/deep/b+");
        assert_eq!(fs.read("d/a").unwrap_err(), Errno::NOENT);
        assert_eq!(fs.names("e").unwrap(), ["a"]);
        assert_eq!(fs.names("").unwrap(), ["e", "empty", "f", "m"]);
    }
}

#[test]
fn rename_flags_are_honored() {
    let lab = lab();
    let fs = lab.open();
    let keep = RenameFlags {
        no_replace: true,
        ..RenameFlags::default()
    };
    assert_eq!(fs.rename_with("f", "m/x", keep), Err(Errno::EXIST));
    fs.unlink("m/x").unwrap();
    fs.rename_with("f", "m/x", keep).unwrap();
    assert_eq!(fs.exchange("m/x", "none"), Err(Errno::NOENT));
    assert_eq!(fs.rename("d", "m"), Err(Errno::NOTEMPTY));
    let both = RenameFlags {
        no_replace: true,
        exchange: true,
        whiteout: false,
    };
    assert_eq!(fs.rename_with("d", "m", both), Err(Errno::INVAL));
}

#[test]
fn removed_directory_accepts_no_new_names() {
    let lab = lab();
    let fs = lab.open();
    fs.unlink("m/x").unwrap();
    fs.mkdir("n").unwrap();
    for path in ["empty", "m", "n"] {
        let inode = fs.find(path).unwrap();
        fs.rmdir(path).unwrap();
        assert_eq!(fs.attr_of_inode(&inode).unwrap().stat.nlink, 0, "{path}");
        assert!(fs.entries(&inode).is_empty(), "{path}");
        let name = cowl_layers::Name::new("x").unwrap();
        let op = fs.overlay.begin();
        assert!(op.lookup(&inode, &name).unwrap().is_none());
        let made = op.mkdir(crate::common::caller(), &inode, &name, 0o755);
        assert_eq!(made.unwrap_err().errno(), Errno::NOENT, "{path}");
        drop(op);
        // A new directory of the same name is a different inode.
        fs.mkdir(path).unwrap();
        assert_eq!(fs.attr_of_inode(&inode).unwrap().stat.nlink, 0);
        assert_ne!(fs.number(path), inode.ino());
    }
}
