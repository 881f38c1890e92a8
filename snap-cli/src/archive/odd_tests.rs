//! Tests with archives of other programs: no entry is lost or altered.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use cowl_layers::format::XattrSpace;
use tar::{EntryType, Header};

use super::import_tests::{Tar, import_tar};
use super::input::{self, Input};
use super::stream::Members;
use super::unpack::Unpacker;
use super::unpack_mode::UnpackMode;
use crate::tree::error::ErrorKind;
use crate::tree::omissions::Unsupported;
use crate::tree::testing::{describe, is_root, run};

fn names(tree: &Path) -> Vec<String> {
    let all = describe(tree).into_keys().filter(|name| !name.is_empty());
    all.collect()
}

/// Returns a header in the old format that claims a size, without data.
fn claiming(kind: EntryType, path: &str, size: u64) -> Vec<u8> {
    let mut header = Header::new_ustar();
    header.set_path(path).unwrap();
    header.set_entry_type(kind);
    let link: &[u8] = if kind == EntryType::Link || kind == EntryType::Symlink {
        b"first"
    } else {
        b""
    };
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_size(size);
    header.set_device_major(1).unwrap();
    header.set_device_minor(3).unwrap();
    header.set_cksum();
    header.as_bytes().to_vec()
}

const WITHOUT_CONTENT: [EntryType; 6] = [
    EntryType::Link,
    EntryType::Symlink,
    EntryType::Directory,
    EntryType::Fifo,
    EntryType::Char,
    EntryType::Block,
];

#[test]
fn claimed_size_without_data_skips_no_entry() {
    if !is_root() {
        return;
    }
    for kind in WITHOUT_CONTENT {
        for size in [1, 512, 700, 5000, 1 << 40] {
            let mut archive = Tar::default().file(b"first");
            archive.0.extend(claiming(kind, "odd", size));
            for name in [b"a", b"b", b"c", b"d"] {
                archive = archive.file(name);
            }
            archive.0.extend(claiming(kind, "last", size));
            let end = archive.0.len();
            let mut archive = archive.end();
            let (target, got) = import_tar(&archive);
            got.unwrap_or_else(|error| panic!("{kind:?} {size}: {error}"));
            let want = ["a", "b", "c", "d", "first", "last", "odd"];
            assert_eq!(names(target.path()), want, "{kind:?} {size}");
            // Padded to a record, as by tar.
            archive.resize(20 * 512 * 2, 0);
            let (target, got) = import_tar(&archive);
            got.unwrap_or_else(|error| panic!("{kind:?} {size}, padded: {error}"));
            assert_eq!(names(target.path()), want, "{kind:?} {size}, padded");
            // A truncation is detected there as well.
            let error = import_tar(&archive[..end]).1.unwrap_err();
            assert_eq!(
                error.kind(),
                ErrorKind::Truncated,
                "{kind:?} {size}: {error}"
            );
        }
    }
}

#[test]
fn unexpected_data_is_skipped() {
    if !is_root() {
        return;
    }
    let text = b"some text ".repeat(130);
    let zeros = vec![0; 1300];
    let late = [vec![0; 1024], text.clone()].concat();
    for kind in WITHOUT_CONTENT {
        for data in [&text, &zeros, &late] {
            let mut archive = Tar::default().file(b"first");
            archive.0.extend(claiming(kind, "odd", data.len() as u64));
            archive.0.extend(data);
            archive.0.resize(archive.0.len().next_multiple_of(512), 0);
            let (target, got) = import_tar(&archive.file(b"after").end());
            got.unwrap_or_else(|error| panic!("{kind:?}: {error}"));
            assert_eq!(names(target.path()), ["after", "first", "odd"], "{kind:?}");
        }
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn root_without_an_entry_has_the_mode_of_any_other_implied_directory() {
    let (target, got) = import_tar(&Tar::default().file(b"etc/motd").end());
    got.unwrap();
    assert_eq!(mode(target.path()), 0o755);
    assert_eq!(mode(&target.path().join("etc")), 0o755);
    for path in [&b"./"[..], b"."] {
        let root = Tar::default().entry(EntryType::Directory, path, b"", b"");
        let (target, got) = import_tar(&root.file(b"etc/motd").end());
        got.unwrap();
        assert_eq!(mode(target.path()), 0o644);
    }
}

/// Describes a tree without the times of implied directories, and without the root, whose times GNU tar does not set.
fn comparable(tree: &Path) -> BTreeMap<String, String> {
    let mut all = describe(tree);
    all.remove("");
    for line in all.values_mut() {
        let mut fields: Vec<&str> = line.split(' ').collect();
        let is_now = fields[2].split('.').next().unwrap().parse::<i64>().unwrap() > 1_000_000_000;
        if fields[0].starts_with("40") && is_now {
            fields[2] = "now";
        }
        *line = fields.join(" ");
    }
    all
}

/// Describes the tree that GNU tar unpacks from an archive.
fn unpacked_by_gnu_tar(archive: &[u8]) -> BTreeMap<String, String> {
    let dir = tempfile::tempdir().unwrap();
    let (file, tree) = (dir.path().join("a.tar"), dir.path().join("tree"));
    fs::write(&file, archive).unwrap();
    fs::create_dir(&tree).unwrap();
    let options = [
        "--numeric-owner",
        "--acls",
        "--xattrs",
        "--xattrs-include=*",
    ];
    let mut args: Vec<&OsStr> = options.map(OsStr::new).to_vec();
    args.extend([
        "-C".as_ref(),
        tree.as_os_str(),
        "-xpf".as_ref(),
        file.as_os_str(),
    ]);
    run("tar", &args);
    comparable(&tree)
}

fn assert_same_as_gnu_tar(label: &str, archive: &[u8]) {
    let (target, got) = import_tar(archive);
    got.unwrap_or_else(|error| panic!("{label}: {error}"));
    assert_eq!(
        comparable(target.path()),
        unpacked_by_gnu_tar(archive),
        "{label}"
    );
}

#[test]
fn acl_takes_precedence_over_the_mode() {
    if !is_root() {
        return;
    }
    // As written by bsdtar: the permissions of the owning group in the mode, the mask in the ACL.
    let acl = b"user::rw-,group::r--,other::---,user:1234:rw-,mask::rw-";
    let closed = b"user::---,group::---,other::---,user:1234:rwx,mask::rwx";
    let default: (&[u8], &[u8]) = (b"SCHILY.acl.default", acl);
    let archive = Tar::default()
        .pax(&[(b"SCHILY.acl.access", acl)])
        .file(b"file")
        .pax(&[(b"SCHILY.acl.access", acl), default])
        .entry(EntryType::Directory, b"dir", b"", b"")
        .file(b"dir/has-no-acl")
        .entry(EntryType::Directory, b"dir/inner", b"", b"")
        .pax(&[(b"SCHILY.acl.access", closed), default])
        .entry(EntryType::Directory, b"closed", b"", b"")
        .file(b"closed/inside")
        .end();
    assert_same_as_gnu_tar("ACLs", &archive);
    let (target, got) = import_tar(&archive);
    got.unwrap();
    let all = describe(target.path());
    assert!(all["file"].starts_with("100660 "), "{}", all["file"]);
    assert!(!all["dir/has-no-acl"].contains("acl"));
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
fn odd_archives_are_unpacked_as_by_gnu_tar() {
    if !is_root() {
        return;
    }
    let tar = Tar::default;
    let dir = EntryType::Directory;
    let raw = |entry: &dyn Fn(&mut Header)| {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..3].copy_from_slice(b"odd");
        header.set_mode(0o640);
        header.set_uid(5);
        header.set_gid(6);
        header.set_mtime(7);
        header.set_entry_type(EntryType::Regular);
        header.set_size(0);
        entry(&mut header);
        header.set_cksum();
        let mut archive = tar().file(b"first");
        archive.0.extend(header.as_bytes());
        archive.file(b"after").end()
    };
    let v7 = raw(&|header| header.as_mut_bytes()[156] = 0);
    assert_same_as_gnu_tar("the type of the seventh edition", &v7);
    let old = raw(&|header| header.as_mut_bytes()[257..].fill(0));
    assert_same_as_gnu_tar("a header of the seventh edition", &old);
    let binary = raw(&|header| {
        let old = header.as_old_mut();
        old.uid = *b"\x80\0\0\0\xee\x6b\x28\0";
        old.mtime = [0xff; 12];
    });
    assert_same_as_gnu_tar("binary numbers", &binary);
    let blanks = raw(&|header| {
        header.as_old_mut().mode = *b"   640 \0";
        header.as_old_mut().uid = *b"    17 \0";
    });
    assert_same_as_gnu_tar("blanks before numbers", &blanks);
    let contiguous = raw(&|header| header.set_entry_type(EntryType::Continuous));
    assert_same_as_gnu_tar("a contiguous file", &contiguous);
    let prefix = raw(&|header| {
        let ustar = &mut header.as_mut_bytes()[257..];
        ustar[..8].copy_from_slice(b"ustar\x0000");
        ustar[88..95].copy_from_slice(b"one/two");
    });
    assert_same_as_gnu_tar("a prefix", &prefix);
    let prefix = raw(&|header| {
        let ustar = &mut header.as_mut_bytes()[257..];
        ustar[..8].copy_from_slice(b"ustar\0  ");
        ustar[88..95].copy_from_slice(b"one/two");
    });
    assert_same_as_gnu_tar("a prefix without a version", &prefix);
    let garbage = raw(&|header| {
        header.as_old_mut().uid = *b"12 3456\0";
        header.as_old_mut().gid = *b"  7\0abcd";
    });
    assert_same_as_gnu_tar("garbage behind numbers", &garbage);
    let unknown = raw(&|header| header.set_entry_type(EntryType::new(b'Q')));
    assert_same_as_gnu_tar("an unknown type", &unknown);
    for (label, archive) in [
        (
            "a directory after its content",
            tar().file(b"d/f").entry(dir, b"d/", b"", b""),
        ),
        (
            "a directory twice",
            tar()
                .entry(dir, b"d", b"", b"")
                .file(b"d/f")
                .entry(dir, b"d/", b"", b""),
        ),
        (
            "an empty directory, then a file",
            tar().entry(dir, b"x", b"", b"").file(b"x"),
        ),
        (
            "a file, then a directory",
            tar().file(b"x").entry(dir, b"x/", b"", b"").file(b"x/y"),
        ),
        (
            "a link, then a file",
            tar()
                .entry(EntryType::Symlink, b"x", b"nowhere", b"")
                .file(b"x"),
        ),
        (
            "a file that has another name, then another file",
            tar()
                .file(b"a")
                .entry(EntryType::Link, b"b", b"a", b"")
                .entry(EntryType::Regular, b"a", b"", b"second"),
        ),
        (
            "a hard link to a symbolic link",
            tar()
                .entry(EntryType::Symlink, b"l", b"nowhere", b"")
                .entry(EntryType::Link, b"m", b"l", b""),
        ),
        (
            "a hard link to itself",
            tar().file(b"a").entry(EntryType::Link, b"a", b"./a", b""),
        ),
        (
            "absolute names and targets of hard links",
            tar()
                .file(b"/d/a")
                .entry(EntryType::Link, b"//b", b"/d/a", b"")
                .entry(EntryType::Link, b"c", b"x/../../d/a", b""),
        ),
        (
            "names and a target through a link to a directory",
            tar()
                .file(b"d/first")
                .entry(EntryType::Symlink, b"l", b"d", b"")
                .file(b"l/f")
                .entry(dir, b"l/e", b"", b"")
                .entry(EntryType::Link, b"l/g", b"l/f", b"")
                // GNU tar does not restore the time of a directory after later entries in it.
                .entry(dir, b"d", b"", b""),
        ),
        (
            "two extended headers for one entry",
            tar()
                .pax(&[(b"uid", b"7")])
                .pax(&[(b"gid", b"8")])
                .file(b"f"),
        ),
        (
            "a long name and a name in an extended header",
            tar()
                .pax(&[(b"path", b"extended")])
                .entry(EntryType::GNULongName, b"L", b"", b"long\0")
                .file(b"f"),
        ),
        (
            "a name with doubled slashes and dots",
            tar().file(b".//d/./e//f"),
        ),
        (
            "a file whose name ends with a slash",
            tar().entry(EntryType::Regular, b"d/", b"", b""),
        ),
        (
            "an extended header for all and one for the next",
            tar()
                .entry(EntryType::XGlobalHeader, b"g", b"", b"9 uid=77\n9 gid=78\n")
                .pax(&[(b"uid", b"79")])
                .file(b"one")
                .file(b"two"),
        ),
        (
            "a volume's label and a list of names",
            tar()
                .entry(EntryType::new(b'V'), b"label", b"", b"")
                .entry(EntryType::new(b'D'), b"d/", b"", b"Yone\0\0")
                .file(b"d/one"),
        ),
    ] {
        assert_same_as_gnu_tar(label, &archive.end());
    }
}

#[test]
fn size_that_is_not_a_number_is_refused() {
    for size in [&b"9223372036854775808"[..], b"zz", b"-1"] {
        let error = Tar::default().pax(&[(b"size", size)]).file(b"f").refused();
        assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
        assert!(error.to_string().ends_with("f"), "{error}");
        assert!(error.own_hint().unwrap().contains("--from DIR"));
    }
}

/// The data of such an entry can be anything, also headers.
#[test]
fn only_the_entry_that_continues_a_file_of_another_volume_is_skipped() {
    let tar = Tar::default;
    let data = tar().file(b"inside").0;
    let global = EntryType::XGlobalHeader;
    let offset = b"25 GNU.volume.offset=512\n";
    for archive in [
        tar().entry(EntryType::new(b'M'), b"m", b"", &data),
        tar()
            .entry(global, b"g", b"", offset)
            .entry(EntryType::Regular, b"m", b"", &data),
        tar()
            .pax(&[(b"GNU.volume.offset", b"512")])
            .entry(EntryType::Regular, b"m", b"", &data),
    ] {
        let (target, got) = import_tar(&archive.file(b"f").end());
        let want = ["m: skipped the rest of a file that began in another volume"];
        assert_eq!(got.unwrap().notes.lines(), want);
        assert_eq!(names(target.path()), ["f"]);
    }
}

#[test]
fn second_archive_in_the_stream_is_noted() {
    let one = Tar::default().file(b"one").end();
    let two = Tar::default().file(b"two").end();
    let (target, got) = import_tar(&[one.clone(), two].concat());
    let notes = got.unwrap().notes.lines();
    assert_eq!(notes.len(), 1);
    assert!(notes[0].contains("another archive"), "{}", notes[0]);
    assert_eq!(names(target.path()), ["one"]);
    let (_target, got) = import_tar(&[one, vec![b'x'; 5000]].concat());
    assert!(got.unwrap().notes.is_empty());
}

#[test]
fn duplicate_entries_of_a_raw_layer_are_refused() {
    let space = XattrSpace::detect();
    let dir = EntryType::Directory;
    for archive in [
        Tar::default().file(b"f").file(b"f"),
        Tar::default()
            .entry(dir, b"d", b"", b"")
            .entry(dir, b"d", b"", b""),
        Tar::default()
            .entry(dir, b"./", b"", b"")
            .entry(dir, b"./", b"", b""),
        Tar::default()
            .file(b"f")
            .file(b"g")
            .entry(EntryType::Link, b"g", b"f", b""),
    ] {
        let target = tempfile::tempdir().unwrap();
        let data = archive.end();
        let mut members = Members::new(&data[..]);
        let mut progress = |_| {};
        let mut unpacker = Unpacker::new(
            target.path(),
            UnpackMode::Raw(space, space),
            Unsupported::Refuse,
            &mut progress,
        )
        .unwrap();
        let error = loop {
            match members.next().unwrap() {
                Some(member) => match unpacker.unpack_entry(member, &mut members) {
                    Ok(()) => {}
                    Err(error) => break error,
                },
                None => panic!("the duplicate was accepted"),
            }
        };
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains("two entries"), "{error}");
    }
}

/// Archives that were created on XFS contain the alias. It must not be set, because it does not follow later changes
/// of the ACL.
#[test]
fn alias_of_an_acl_is_skipped() {
    let alias: (&[u8], &[u8]) = (b"SCHILY.xattr.trusted.SGI_ACL_FILE", b"\0\0\0\x01");
    let data = Tar::default().pax(&[alias]).file(b"f").end();
    let Input::Tree(tree) = input::open(&data[..]).unwrap() else {
        panic!("not a tree");
    };
    assert_eq!(tree.first.unwrap().attrs.xattrs, []);
}
