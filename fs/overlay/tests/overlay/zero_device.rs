//! The character device 0:0 and RENAME_WHITEOUT, which programs need that store layers on the mount.

use crate::common::{Fs, Lab, create_files, set_xattr, spaces};
use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_overlay::RenameFlags;

const WHITEOUT: RenameFlags = RenameFlags {
    no_replace: false,
    exchange: false,
    whiteout: true,
};

fn lab(space: XattrSpace) -> Lab {
    Lab::new(|top| create_files(top, &["d/x", "d/y", "e/z", "f"])).in_space(space)
}

fn stat(fs: &Fs, path: &str) -> Stat {
    fs.attr(path).unwrap().stat
}

fn ino(fs: &Fs, path: &str) -> u64 {
    fs.attr(path).unwrap().ino
}

fn listed(fs: &Fs, path: &str) -> (FileKind, u64) {
    let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
    let entries = fs.entries(&fs.find(parent).unwrap());
    let entry = entries.iter().find(|entry| *entry.name == *name.as_bytes());
    let entry = entry.unwrap();
    (entry.kind, entry.ino)
}

/// Verifies that a path is a device 0:0 in stat, listings and xattrs.
#[track_caller]
fn assert_zero_device(fs: &Fs, space: XattrSpace, path: &str) {
    let stat = stat(fs, path);
    assert_eq!(
        (stat.kind(), stat.rdev, stat.size, stat.blocks),
        (FileKind::CharDevice, 0, 0, 0),
        "{path}"
    );
    let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
    assert_eq!(listed(fs, path), (FileKind::CharDevice, ino(fs, path)));
    let marker = [space.prefix(), "whiteout"].concat();
    assert_eq!(fs.get_xattr(path, &marker), Err(Errno::NODATA), "{path}");
    let all = [path, parent].map(|path| fs.xattr_names(&fs.find(path).unwrap()));
    let shown = all
        .iter()
        .flatten()
        .map(|name| name.escape_ascii().to_string());
    let markers: Vec<_> = shown
        .filter(|name| name.starts_with(space.prefix()))
        .collect();
    assert_eq!(markers, [""; 0], "{path}");
}

#[test]
fn zero_device_persists_and_hides_nothing() {
    for &space in spaces() {
        let lab = lab(space);
        let fs = lab.open();
        for path in ["d/dev", "dev", "e/dev"] {
            fs.zero_device(path, 0o640).unwrap();
            assert_zero_device(&fs, space, path);
            assert_eq!(stat(&fs, path).perm(), 0o640);
        }
        assert_eq!(fs.zero_device("f", 0o600), Err(Errno::EXIST));
        assert_eq!(fs.zero_device("d/dev", 0o600), Err(Errno::EXIST));
        // At the name of a removed lower file, and as the result of a rename, a link and an exchange.
        fs.unlink("d/x").unwrap();
        fs.zero_device("d/x", 0o600).unwrap();
        fs.mkdir("plain").unwrap();
        fs.rename("dev", "plain/moved").unwrap();
        fs.mkdir("plain2").unwrap();
        fs.link("plain/moved", "plain2/linked").unwrap();
        fs.mkdir("plain3").unwrap();
        fs.create("plain3/file", b"").unwrap();
        fs.exchange("plain3/file", "e/dev").unwrap();
        let all = [
            "d/dev",
            "d/x",
            "plain/moved",
            "plain2/linked",
            "plain3/file",
        ];
        for path in all {
            assert_zero_device(&fs, space, path);
        }
        assert_eq!(stat(&fs, "e/dev").kind(), FileKind::Regular);
        assert_eq!(stat(&fs, "plain/moved").nlink, 2);
        drop(fs);
        for fs in [lab.open_read_only(), lab.open()] {
            for path in all {
                assert_zero_device(&fs, space, path);
            }
            assert_eq!(fs.names("d").unwrap(), ["dev", "x", "y"]);
        }
        let fs = lab.open();
        for path in all {
            fs.unlink(path).unwrap();
        }
        fs.rmdir("plain").unwrap();
        assert_eq!(fs.names("d").unwrap(), ["y"]);
    }
}

#[test]
fn failed_change_of_an_xattr_leaves_the_markers_of_a_zero_device_hidden() {
    for &space in spaces() {
        let lab = lab(space);
        let fs = lab.open();
        fs.zero_device("d/dev", 0o600).unwrap();
        let opaque = [space.prefix(), "opaque"].concat();
        // More than XATTR_SIZE_MAX.
        let value = vec![b'x'; 65537];
        let failed = fs.set_xattr("d", &opaque, &value);
        assert!(failed.is_err(), "{failed:?}");
        assert_zero_device(&fs, space, "d/dev");
        assert_eq!(fs.get_xattr("d", &opaque), Err(Errno::NODATA));
        fs.set_xattr("d", &opaque, b"x").unwrap();
        assert_eq!(fs.get_xattr("d", &opaque), Ok(b"x".to_vec()));
    }
}

#[test]
fn zero_device_survives_push_and_copy_up() {
    for &space in spaces() {
        let lab = lab(space);
        let fs = lab.open();
        fs.zero_device("d/dev", 0o640).unwrap();
        fs.link("d/dev", "d/two").unwrap();
        fs.zero_device("one", 0o640).unwrap();
        lab.push(&fs).unwrap();
        let number = ino(&fs, "one");
        for path in ["d/dev", "d/two", "one"] {
            assert_zero_device(&fs, space, path);
        }
        fs.chmod("one", 0o600).unwrap();
        fs.rename("d", "moved").unwrap();
        fs.rename("moved/two", "e/two").unwrap();
        drop(fs);
        let fs = lab.open();
        for path in ["one", "moved/dev", "e/two"] {
            assert_zero_device(&fs, space, path);
        }
        assert_eq!(stat(&fs, "one").perm(), 0o600);
        assert_eq!(ino(&fs, "one"), number);
        assert_eq!(ino(&fs, "moved/dev"), ino(&fs, "e/two"));
        assert_eq!(stat(&fs, "e/two").nlink, 2);
    }
}

#[test]
fn zero_device_in_the_bottom_layer_is_visible() {
    for &space in spaces() {
        let lab = lab(space);
        let fs = lab.open();
        fs.zero_device("d/dev", 0o600).unwrap();
        drop(fs);
        let bottom = lab.upper();
        let again = Lab::over(vec![bottom]).in_space(space);
        let fs = again.open();
        assert_zero_device(&fs, space, "d/dev");
    }
}

#[test]
fn rename_whiteout_leaves_a_zero_device() {
    for &space in spaces() {
        let lab = lab(space);
        let fs = lab.open();
        fs.create("new", b"").unwrap();
        for (from, to) in [
            // A lower file to a free name, a new one to a free name, a lower one over a lower one, a directory.
            ("f", "g"),
            ("new", "newer"),
            ("d/x", "d/y"),
            ("e", "h"),
        ] {
            let number = ino(&fs, from);
            fs.rename_with(from, to, WHITEOUT).unwrap();
            assert_eq!(ino(&fs, to), number, "{from}");
            assert_zero_device(&fs, space, from);
        }
        fs.unlink("f").unwrap();
        fs.rename_with("g", "f", WHITEOUT).unwrap();
        assert_zero_device(&fs, space, "g");
        // The device itself can be moved in the same way.
        fs.rename_with("new", "last", WHITEOUT).unwrap();
        assert_zero_device(&fs, space, "last");
        let exchange = RenameFlags {
            exchange: true,
            ..WHITEOUT
        };
        assert_eq!(fs.rename_with("f", "last", exchange), Err(Errno::INVAL));
        let keep = RenameFlags {
            no_replace: true,
            ..WHITEOUT
        };
        assert_eq!(fs.rename_with("f", "last", keep), Err(Errno::EXIST));
        assert_eq!(fs.rename_with("nothing", "x", WHITEOUT), Err(Errno::NOENT));
        drop(fs);
        let fs = lab.open();
        for path in ["g", "new", "last", "d/x", "e"] {
            assert_zero_device(&fs, space, path);
        }
        assert_eq!(fs.names("h").unwrap(), ["z"]);
    }
}

#[test]
fn escaped_markers_set_by_a_user_are_preserved() {
    for &space in spaces() {
        let lab = lab(space);
        let fs = lab.open();
        let opaque = [space.prefix(), "opaque"].concat();
        fs.zero_device("d/dev", 0o600).unwrap();
        assert_eq!(fs.get_xattr("d", &opaque), Err(Errno::NODATA));
        assert_eq!(fs.remove_xattr("d", &opaque), Err(Errno::NODATA));
        for value in [b"x", b"y"] {
            fs.set_xattr("d", &opaque, value).unwrap();
            assert_eq!(fs.get_xattr("d", &opaque).unwrap(), value);
        }
        assert_listed_as_device(&fs, "d/dev");
        fs.remove_xattr("d", &opaque).unwrap();
        assert_listed_as_device(&fs, "d/dev");
        // A marker that was set before the device was created.
        fs.set_xattr("e", &opaque, b"x").unwrap();
        fs.zero_device("e/dev", 0o600).unwrap();
        assert_eq!(fs.get_xattr("e", &opaque).unwrap(), b"x");
    }
}

#[track_caller]
fn assert_listed_as_device(fs: &Fs, path: &str) {
    assert_eq!(listed(fs, path).0, FileKind::CharDevice);
}

#[test]
fn marker_of_another_version_is_a_regular_file() {
    for &space in spaces() {
        let lab = Lab::new(|top| {
            create_files(top, &["n"]);
            std::fs::write(top.join("n"), b"").unwrap();
            set_xattr(&top.join("n"), space.node(), &[9]);
            set_xattr(top, space.nodes(), &[9]);
        })
        .in_space(space);
        assert_eq!(stat(&lab.open(), "n").kind(), FileKind::Regular);
    }
}

/// The hidden marker of the directory exists only for kernel overlayfs and must not affect a user's xattr.
#[test]
fn user_can_set_a_hidden_marker() {
    const CREATE: u32 = 1;
    const REPLACE: u32 = 2;
    for &space in spaces() {
        let lab = lab(space);
        let fs = lab.open();
        fs.zero_device("d/dev", 0o600).unwrap();
        let marker = space.opaque();
        let set = |value: &[u8], flags: u32| {
            let inode = fs.find("d").unwrap();
            let op = fs.overlay.begin();
            let done = op.set_xattr(
                crate::common::caller(),
                &inode,
                marker.as_bytes(),
                value,
                flags,
            );
            done.map_err(|error| error.errno())
        };
        assert_eq!(set(b"y", REPLACE), Err(Errno::NODATA));
        assert_eq!(fs.get_xattr("d", marker), Err(Errno::NODATA));
        assert_eq!(set(b"y", CREATE), Ok(()));
        assert_eq!(fs.get_xattr("d", marker).unwrap(), b"y");
        assert_eq!(set(b"n", CREATE), Err(Errno::EXIST));
        assert_eq!(set(b"x", REPLACE), Ok(()));
        assert_eq!(fs.get_xattr("d", marker).unwrap(), b"x");
    }
}

/// All steps that can fail, except the last one, precede the rename. After an error, the old tree is unchanged.
#[test]
fn failed_rename_whiteout_moves_nothing() {
    let try_with = |good: u64| {
        let lab = lab(XattrSpace::detect());
        let fs = lab.open();
        fs.chmod("d/x", 0o600).unwrap();
        cowl_layers::sys::fault::arm_once(good);
        let done = fs.rename_with("d/x", "d/moved", WHITEOUT);
        cowl_layers::sys::fault::disarm();
        (done, fs.names("d").unwrap())
    };
    let (mut moved, mut passed) = (Vec::new(), 0);
    for good in 0.. {
        // A fault in a cleanup step is not an error of the operation, so the first success is not the end.
        if passed > 8 {
            break;
        }
        match try_with(good) {
            (Ok(()), names) => {
                assert_eq!(names, ["moved", "x", "y"]);
                passed += 1;
            }
            (Err(_), names) if names == ["x", "y"] => {}
            (Err(_), names) => moved.push((good, names)),
        }
    }
    // Only the last step, which links the device, can fail after the rename.
    assert!(moved.len() <= 1, "{moved:?}");
}
