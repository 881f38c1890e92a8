//! Calls that change nothing, and side effects of calls that do.

use std::sync::Arc;

use crate::common::{
    Fs, Lab, WRITE, caller, create_files, is_root, set_fixed_times, set_mode, set_xattr,
};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::name::Name;
use cowl_overlay::idmap::IdMap;
use cowl_overlay::inode::Inode;
use cowl_overlay::{Caller, Op, OverlayOptions, RenameFlags, SetAttr, Writer};

const CREATE: u32 = 1;
const REPLACE: u32 = 2;
const ACCESS: &[u8] = b"system.posix_acl_access";
/// An undefined flag of fallocate(2), which no file system receives.
const UNKNOWN: u32 = 1 << 30;

type Call = fn(&Op<'_>, &Arc<Inode>) -> Result<()>;

fn set(op: &Op<'_>, inode: &Arc<Inode>, name: &[u8], flags: u32) -> Result<()> {
    op.set_xattr(caller(), inode, name, b"v", flags)
}

/// Each call with its expected error, if any.
const CALLS: [(&str, Option<Errno>, Call); 8] = [
    (
        "replace an absent xattr",
        Some(Errno::NODATA),
        |op, inode| set(op, inode, b"user.none", REPLACE),
    ),
    (
        "create an existing xattr",
        Some(Errno::EXIST),
        |op, inode| set(op, inode, b"user.there", CREATE),
    ),
    (
        "set an unsupported xattr",
        Some(Errno::OPNOTSUPP),
        |op, inode| set(op, inode, b"system.none", 0),
    ),
    (
        "remove an absent xattr",
        Some(Errno::NODATA),
        |op, inode| op.remove_xattr(inode, b"user.none"),
    ),
    ("remove an absent ACL", None, |op, inode| {
        op.remove_xattr(inode, ACCESS)
    }),
    (
        "set an owner that is not mapped",
        Some(Errno::OVERFLOW),
        |op, inode| {
            let set = SetAttr {
                uid: Some(70_000),
                size: Some(1),
                ..SetAttr::default()
            };
            op.set_attr(caller(), inode, &set, None).map(drop)
        },
    ),
    (
        "set an ACL with an id that is not mapped",
        Some(Errno::INVAL),
        |op, inode| {
            let value = [&[2, 0, 0, 0, 2, 0, 7, 0][..], &70_000_u32.to_le_bytes()].concat();
            op.set_xattr(caller(), inode, ACCESS, &value, 0)
        },
    ),
    (
        "clear setuid of another user's file",
        Some(Errno::PERM),
        |op, inode| {
            let other = Caller {
                uid: 1234,
                gid: 1234,
                pid: 0,
                ..caller()
            };
            op.set_attr(other, inode, &SetAttr::default(), None)
                .map(drop)
        },
    ),
];

fn lab() -> Lab {
    let lab = Lab::new(|top| {
        create_files(top, &["f", "d/"]);
        set_xattr(&top.join("f"), "user.there", b"v");
        set_mode(&top.join("f"), 0o4777);
        set_fixed_times(top);
    });
    let map = || IdMap::new(IdMap::parse("0:0:5000").unwrap(), None);
    lab.with(OverlayOptions {
        uids: map(),
        gids: map(),
        ..OverlayOptions::default()
    })
}

fn check(fs: &Fs, inode: &Arc<Inode>, calls: &[(&str, Option<Errno>, Call)]) {
    for (name, error, call) in calls {
        let before = fs.attr_of_inode(inode).unwrap();
        let done = call(&fs.overlay.begin(), inode);
        assert_eq!(done.err().map(Error::errno), *error, "{name}");
        assert_eq!(fs.attr_of_inode(inode).unwrap(), before, "{name}");
    }
}

#[test]
fn no_op_calls_copy_nothing_up() {
    let lab = lab();
    let fs = lab.open();
    check(&fs, &fs.find("f").unwrap(), &CALLS);
    assert_eq!(lab.describe_upper(), [""; 0]);
    assert!(!lab.upper().join("f").try_exists().unwrap());
}

/// A copy-up changes the ctime on disk, which a failing call must not expose.
#[test]
fn no_op_calls_preserve_ctime() {
    let lab = lab();
    let fs = lab.open();
    let inode = fs.find("f").unwrap();
    let before = fs.attr_of_inode(&inode).unwrap().stat.ctime;
    let handle = fs.open("f", WRITE).unwrap();
    assert!(lab.upper().join("f").try_exists().unwrap());
    // While the file is open for writing, a write by any process clears the setuid bit.
    check(&fs, &inode, &CALLS[..CALLS.len() - 1]);
    let op = fs.overlay.begin();
    op.fallocate(&handle, UNKNOWN, 1, 1).unwrap_err();
    op.write(&handle, u64::MAX / 2, b"x", Writer::Privileged)
        .unwrap_err();
    drop(op);
    assert_eq!(fs.attr_of_inode(&inode).unwrap().stat.ctime, before);
    fs.write_handle(&handle, 0, b"x").unwrap();
    assert!(fs.attr_of_inode(&inode).unwrap().stat.ctime > before);
    fs.overlay.close(&handle);
}

/// Failing calls on names. The kernel refuses most of them by its cached names, which can be outdated.
#[test]
fn failed_calls_on_names_copy_nothing_up() {
    let lab = Lab::new(|top| {
        create_files(top, &["d/f", "d/full/inside", "e/g"]);
        set_fixed_times(top);
    });
    let flags = |exchange, no_replace| RenameFlags {
        exchange,
        no_replace,
        whiteout: false,
    };
    let fs = lab.open();
    let too_large = SetAttr {
        size: Some(u64::MAX / 2),
        ..SetAttr::default()
    };
    for (call, error) in [
        (fs.mkdir("d/f"), Errno::EXIST),
        (fs.create("d/full", b"x"), Errno::EXIST),
        (fs.symlink("d/f", "x"), Errno::EXIST),
        (fs.zero_device("d/f", 0o600), Errno::EXIST),
        (fs.link("e/g", "d/f"), Errno::EXIST),
        (fs.link("e", "d/new"), Errno::PERM),
        (fs.unlink("d/none"), Errno::NOENT),
        (fs.unlink("d/full"), Errno::ISDIR),
        (fs.rmdir("d/none"), Errno::NOENT),
        (fs.rmdir("d/full"), Errno::NOTEMPTY),
        (fs.rmdir("d/f"), Errno::NOTDIR),
        (fs.rename("d/none", "e/new"), Errno::NOENT),
        (fs.rename("e", "d/full"), Errno::NOTEMPTY),
        (fs.rename("d", "d/full/new"), Errno::INVAL),
        (
            fs.rename_with("d/f", "e/g", flags(false, true)),
            Errno::EXIST,
        ),
        (
            fs.rename_with("d/f", "e/new", flags(true, false)),
            Errno::NOENT,
        ),
        (fs.set("d/f", &too_large).map(drop), Errno::FBIG),
    ] {
        assert_eq!(call.unwrap_err(), error);
    }
    assert_eq!(lab.describe_upper(), [""; 0]);
    assert_eq!(
        std::fs::read_dir(lab.work().join("work")).unwrap().count(),
        0
    );
}

/// Names that the format of fuse-overlayfs reserves are refused first, and so are names in a removed directory.
#[test]
fn reserved_names_and_removed_directories_copy_nothing_up() {
    let lab = Lab::new(|top| create_files(top, &["d/f", "removed/"]));
    let fs = lab.open_foreign();
    let removed = fs.find("removed").unwrap();
    fs.rmdir("removed").unwrap();
    let before = lab.describe_upper();
    let name = Name::new(b"new").unwrap();
    let (file, dir) = (fs.find("d/f").unwrap(), fs.find("d").unwrap());
    let op = fs.overlay.begin();
    for call in [
        op.mkdir(caller(), &removed, &name, 0o755).map(drop),
        op.link(&file, &removed, &name).map(drop),
        op.rename(
            caller(),
            &dir,
            &Name::new(b"f").unwrap(),
            &removed,
            &name,
            RenameFlags::default(),
        ),
    ] {
        assert_eq!(call.unwrap_err().errno(), Errno::NOENT);
    }
    drop(op);
    for call in [
        fs.mkdir("d/.wh.new"),
        fs.zero_device("d/.wh.new", 0o600),
        fs.link("d/f", "d/.wh.new"),
        fs.rename("d/f", "d/.wh.new"),
    ] {
        assert_eq!(call.unwrap_err(), Errno::INVAL);
    }
    assert_eq!(lab.describe_upper(), before);
}

/// Attributes are listed for invalidation if a request changes more than its type implies, and only then, because
/// each costs the kernel another request.
#[test]
fn unexpected_attribute_changes_are_listed_as_stale() {
    let lab = Lab::new(|top| {
        create_files(top, &["d/f", "d/g"]);
        set_mode(&top.join("d/f"), 0o4777);
    });
    let fs = lab.open();
    let numbers = |op: &Op<'_>| {
        let mut stale: Vec<u64> = op.take_stale().iter().map(|inode| inode.ino()).collect();
        stale.sort_unstable();
        stale
    };
    let (dir, program, plain) = (fs.number("d"), fs.number("d/f"), fs.number("d/g"));
    let inode = fs.find("d/f").unwrap();
    let op = fs.overlay.begin();
    let handle = op.open(caller(), &inode, WRITE).unwrap();
    let mut copied = [dir, program];
    copied.sort_unstable();
    assert_eq!(numbers(&op), copied);
    op.write(&handle, 0, b"x", Writer::Privileged).unwrap();
    assert_eq!(numbers(&op), [0; 0]);
    if is_root() {
        let other = Writer::Unprivileged(Caller {
            uid: 1234,
            gid: 1234,
            ..caller()
        });
        op.write(&handle, 0, b"x", other).unwrap();
        assert_eq!(numbers(&op), [program]);
        // The bits are cleared.
        op.write(&handle, 0, b"x", other).unwrap();
        assert_eq!(numbers(&op), [0; 0]);
    }
    drop(op);
    fs.overlay.close(&handle);
    let inode = fs.find("d/g").unwrap();
    let op = fs.overlay.begin();
    op.set_xattr(caller(), &inode, b"user.a", b"v", 0).unwrap();
    assert_eq!(numbers(&op), [plain]);
    op.set_xattr(caller(), &inode, b"user.a", b"w", 0).unwrap();
    assert_eq!(numbers(&op), [0; 0]);
    let new = SetAttr {
        mode: Some(0o600),
        ..SetAttr::default()
    };
    op.set_attr(caller(), &inode, &new, None).unwrap();
    op.unlink(&fs.find("d").unwrap(), &Name::new(b"g").unwrap())
        .unwrap();
    assert_eq!(numbers(&op), [0; 0]);
}
