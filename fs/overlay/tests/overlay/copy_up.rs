//! Copy-up: preserved metadata, and the amount of copied data.

use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use crate::common::{
    FIXED_TIME, Lab, TRUNCATE, blocks, create_files, is_root, lstat, set_fixed_times, set_mode,
    set_xattr, xattrs,
};
use cowl_layers::error::Errno;
use cowl_layers::sys::attr::{SetTime, chown};
use cowl_layers::sys::stat::Time;
use cowl_overlay::{OverlayOptions, SetAttr};

#[test]
fn copy_up_preserves_all_metadata() {
    for options in [OverlayOptions::default(), crate::common::metacopy()] {
        let lab = Lab::new(|top| {
            create_files(top, &["d/f", "d/s/"]);
            let (f, d) = (top.join("d/f"), top.join("d"));
            set_xattr(&f, "user.colour", b"blue\0green");
            set_xattr(&d, "user.colour", b"red");
            if is_root() {
                let fd = cowl_layers::sys::dir::open_root(&d).unwrap();
                chown(fd.as_fd(), Some(12), Some(34)).unwrap();
                std::os::unix::fs::chown(&f, Some(56), Some(78)).unwrap();
            }
            set_mode(&f, 0o4751);
            set_mode(&d, 0o2755);
        })
        .with(options);
        let fs = lab.open();
        let numbers = ["d", "d/f", "d/s"].map(|path| fs.number(path));
        let before = fs.tree();
        // Setting the access time changes nothing else but causes a copy-up.
        let set_atime = SetAttr {
            atime: SetTime::At(Time { secs: 5, nanos: 6 }),
            ..SetAttr::default()
        };
        let attr = fs.set("d/f", &set_atime).unwrap();
        assert_eq!(attr.stat.atime, Time { secs: 5, nanos: 6 });
        assert_eq!(fs.tree(), before);
        let fs = {
            drop(fs);
            lab.open()
        };
        assert_eq!(fs.tree(), before);
        assert_eq!(["d", "d/f", "d/s"].map(|path| fs.number(path)), numbers);
        // The copy-up of the parent directory is not visible.
        assert_eq!(fs.attr("d").unwrap().stat.mtime, FIXED_TIME);
        assert_eq!(lstat(&lab.upper().join("d")).mtime, FIXED_TIME);
    }
}

#[test]
fn copy_up_copies_only_needed_data() {
    const SIZE: u64 = 1 << 20;
    let build = |top: &std::path::Path| std::fs::write(top.join("f"), vec![7; 1 << 20]).unwrap();
    let full = || Lab::new(build).with(OverlayOptions::default());
    let meta = || Lab::new(build);

    let lab = full();
    lab.open().chmod("f", 0o600).unwrap();
    assert_eq!(lab.describe_upper(), ["f file"]);
    assert!(blocks(&lab.upper().join("f")) * 512 >= SIZE);

    let lab = meta();
    let fs = lab.open();
    fs.chmod("f", 0o600).unwrap();
    let attr = fs.attr("f").unwrap().stat;
    assert_eq!((attr.size, attr.blocks * 512 >= SIZE), (SIZE, true));
    assert_eq!(lab.describe_upper(), ["f file metacopy"]);
    assert!(blocks(&lab.upper().join("f")) < 64, "data was copied");
    // An open for writing copies the content.
    fs.append("f", b"end").unwrap();
    assert_eq!(lab.describe_upper(), ["f file"]);
    assert_eq!(fs.attr("f").unwrap().stat.size, SIZE + 3);
    let own = std::fs::read(lab.upper().join("f")).unwrap();
    assert_eq!(
        (own.len() as u64, &own[own.len() - 3..]),
        (SIZE + 3, &b"end"[..])
    );
    assert!(own[..own.len() - 3].iter().all(|&byte| byte == 7));

    for lab in [meta(), full()] {
        let fs = lab.open();
        let handle = fs.open("f", TRUNCATE).unwrap();
        assert_eq!(lab.describe_upper(), ["f file"]);
        assert_eq!(fs.attr("f").unwrap().stat.size, 0);
        assert!(fs.attr("f").unwrap().stat.mtime > FIXED_TIME);
        fs.write_handle(&handle, 0, b"x").unwrap();
        fs.overlay.close(&handle);
        assert_eq!(fs.read("f").unwrap(), b"x");
        assert_eq!(
            std::fs::metadata(lab.lower().join("f")).unwrap().len(),
            SIZE
        );
    }

    // A metacopy that is truncated to size 0, and an empty file, which never becomes a metacopy.
    let lab = meta();
    let fs = lab.open();
    fs.chmod("f", 0o600).unwrap();
    fs.overwrite("f", b"").unwrap();
    drop(fs);
    assert_eq!(lab.describe_upper(), ["f file"]);
    assert_eq!(lab.open().read("f").unwrap(), b"");
    let lab = Lab::new(|top| std::fs::write(top.join("f"), b"").unwrap());
    lab.open().chmod("f", 0o600).unwrap();
    assert_eq!(lab.describe_upper(), ["f file"]);
}

#[test]
fn copy_up_preserves_holes() {
    const END: u64 = 8 << 20;
    let lab = Lab::new(|top| {
        let file = std::fs::File::create(top.join("f")).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"middle", END / 2).unwrap();
        file.set_len(END).unwrap();
    });
    let fs = lab.open();
    fs.append("f", b"end").unwrap();
    drop(fs);
    let (lower, upper) = (lab.lower().join("f"), lab.upper().join("f"));
    let mut wanted = std::fs::read(&lower).unwrap();
    wanted.extend_from_slice(b"end");
    assert!(std::fs::read(&upper).unwrap() == wanted);
    assert!(blocks(&upper) <= blocks(&lower) + 16, "{}", blocks(&upper));
}

#[test]
fn symlinks_and_fifos_are_copied_up() {
    let lab = Lab::new(|top| {
        std::os::unix::fs::symlink("to nowhere", top.join("s")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            top.join("p"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o640),
            0,
        )
        .unwrap();
    });
    let fs = lab.open();
    let before = fs.tree();
    let numbers = ["s", "p"].map(|path| fs.number(path));
    let touch = SetAttr {
        mtime: SetTime::At(FIXED_TIME),
        ..SetAttr::default()
    };
    for path in ["s", "p"] {
        fs.set(path, &touch).unwrap();
    }
    assert_eq!(lab.describe_upper(), ["p node", "s symlink"]);
    drop(fs);
    let fs = lab.open();
    assert_eq!(fs.tree(), before);
    if is_root() {
        assert_eq!(["s", "p"].map(|path| fs.number(path)), numbers);
    }
    let mode = SetAttr {
        mode: Some(0o600),
        ..SetAttr::default()
    };
    assert_eq!(fs.set("s", &mode).unwrap_err(), Errno::OPNOTSUPP);
}

#[test]
fn copy_up_copies_only_escaped_markers() {
    let lab = Lab::new(|top| create_files(top, &["f", "d/x"]));
    let (redirect, escaped) = (
        lab.space.redirect(),
        format!("{}opaque", lab.space.escaped()),
    );
    lab.add_lower(|top| {
        create_files(top, &["d2/", "f"]);
        set_xattr(&top.join("d2"), redirect, b"d");
        set_xattr(&top.join("f"), &escaped, b"y");
    });
    let fs = lab.open();
    assert_eq!(fs.names("d2").unwrap(), ["x"]);
    fs.chmod("d2", 0o700).unwrap();
    fs.chmod("f", 0o600).unwrap();
    let names = |path: &str| -> Vec<String> {
        let all = xattrs(&lab.upper().join(path)).into_iter();
        all.map(|(name, _)| name)
            .filter(|name| name != lab.space.ino())
            .collect()
    };
    assert_eq!(names("d2"), [""; 0]);
    assert_eq!(names("f"), [lab.space.metacopy().to_owned(), escaped]);
    drop(fs);
    let fs = lab.open();
    assert_eq!(fs.names("d2").unwrap(), ["x"]);
    let opaque = lab.space.opaque();
    assert_eq!(fs.get_xattr("f", opaque).unwrap(), b"y");
}

#[test]
fn reads_and_failed_calls_copy_nothing_up() {
    let lab = Lab::new(|top| create_files(top, &["d/f", "g"]));
    set_fixed_times(&lab.lower());
    let fs = lab.open();
    fs.tree();
    assert_eq!(
        fs.remove_xattr("d/f", "user.none").unwrap_err(),
        Errno::NODATA
    );
    assert_eq!(fs.unlink("d").unwrap_err(), Errno::ISDIR);
    assert_eq!(fs.rmdir("d").unwrap_err(), Errno::NOTEMPTY);
    assert_eq!(fs.rmdir("g").unwrap_err(), Errno::NOTDIR);
    assert_eq!(fs.rename("g", "d").unwrap_err(), Errno::ISDIR);
    assert_eq!(fs.rename("d", "g").unwrap_err(), Errno::NOTDIR);
    assert_eq!(fs.rename("d", "d/in").unwrap_err(), Errno::INVAL);
    assert_eq!(fs.rename("none", "x").unwrap_err(), Errno::NOENT);
    assert_eq!(fs.mkdir("d").unwrap_err(), Errno::EXIST);
    assert_eq!(fs.create("g", b"").unwrap_err(), Errno::EXIST);
    assert_eq!(fs.link("d", "h").unwrap_err(), Errno::PERM);
    assert_eq!(fs.truncate("d", 0).unwrap_err(), Errno::ISDIR);
    assert_eq!(lab.describe_upper(), [""; 0]);
    let handle = fs.open("g", crate::common::READ).unwrap();
    assert_eq!(fs.write_handle(&handle, 0, b"x").unwrap_err(), Errno::BADF);
    assert_eq!(
        std::fs::metadata(lab.lower().join("g")).unwrap().mtime(),
        FIXED_TIME.secs
    );
}
