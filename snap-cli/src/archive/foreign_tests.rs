//! Tests with entries that another system or an unusual writer created: each is imported, changed, skipped or refused.
//!
//! docs/decisions/0019 has the same table, with the behavior of GNU tar.

use std::fs;
use std::path::Path;

use cowl_layers::format::XattrSpace;
use tar::{EntryType, Header};

use super::acl;
use super::import;
use super::import_tests::{Tar, import_tar};
use crate::tree::error::ErrorKind;
use crate::tree::omissions::Unsupported;
use crate::tree::testing::{describe, is_root};

const DIR: EntryType = EntryType::Directory;
const LINK: EntryType = EntryType::Symlink;
const HARD: EntryType = EntryType::Link;

fn tar() -> Tar {
    Tar::default()
}

/// Returns the names of a tree without its root.
fn names(tree: &Path) -> Vec<String> {
    let all = describe(tree).into_keys().filter(|name| !name.is_empty());
    all.collect()
}

/// Appends an entry whose header is edited after it was filled in.
fn edited(mut archive: Tar, kind: EntryType, edit: impl FnOnce(&mut Header)) -> Tar {
    let mut header = Header::new_gnu();
    header.as_old_mut().name[..3].copy_from_slice(b"odd");
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_size(0);
    header.set_entry_type(kind);
    edit(&mut header);
    header.set_cksum();
    archive.0.extend_from_slice(header.as_bytes());
    archive
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
fn entries_that_linux_cannot_store_are_changed_or_skipped_with_a_note() {
    if !is_root() {
        return;
    }
    let long = [b'n'; 300];
    for (label, archive, want, note) in [
        (
            "absolute names",
            tar().file(b"/etc/motd").file(b"//etc/hosts"),
            &["etc", "etc/hosts", "etc/motd"][..],
            "/etc/motd, //etc/hosts: removed the leading slash",
        ),
        (
            "absolute root",
            tar().entry(DIR, b"/", b"", b""),
            &[],
            "/: removed the leading slash",
        ),
        (
            "absolute target of a hard link",
            tar().file(b"a").entry(HARD, b"b", b"/a", b""),
            &["a", "b"],
            "leading slash of the target",
        ),
        (
            "target of a hard link with parents",
            tar().file(b"a").entry(HARD, b"b", b"x/../../a", b""),
            &["a", "b"],
            "'..'",
        ),
        (
            "unknown type",
            tar().entry(EntryType::new(b'Q'), b"odd", b"", b"data"),
            &["odd"],
            "odd (Q): imported an entry of an unknown type",
        ),
        (
            "long name",
            tar().pax(&[(b"path", &long)]).file(b"x"),
            &[],
            "more than 255 bytes",
        ),
        (
            "hard link to a long name",
            tar()
                .pax(&[(b"linkpath", &long)])
                .entry(HARD, b"h", b"x", b""),
            &[],
            "skipped a hard link to a name that Linux cannot store",
        ),
        (
            "NUL in a name",
            tar().pax(&[(b"path", b"a\0b")]).file(b"x"),
            &[],
            "NUL",
        ),
        ("no name", tar().file(b""), &[], "without a name"),
        (
            "root that is a file",
            tar().file(b"."),
            &[],
            ".: skipped a root that is not a directory",
        ),
        (
            "symbolic link without a target",
            tar().entry(LINK, b"l", b"", b""),
            &[],
            "without a target",
        ),
        (
            "symbolic link with a target of more than PATH_MAX",
            tar()
                .pax(&[(b"linkpath", &[b't'; 4096])])
                .entry(LINK, b"l", b"x", b""),
            &[],
            "l: skipped a symbolic link",
        ),
        (
            "hard link to a directory",
            tar()
                .entry(DIR, b"d", b"", b"")
                .entry(HARD, b"h", b"d", b""),
            &["d"],
            "h: skipped a hard link to a directory",
        ),
        (
            "major number of 13 bits",
            tar()
                .pax(&[(b"SCHILY.devmajor", b"4096")])
                .entry(EntryType::Char, b"c", b"", b""),
            &[],
            "c: skipped a device",
        ),
        (
            "minor number of 21 bits",
            tar()
                .pax(&[(b"SCHILY.devminor", b"1048576")])
                .entry(EntryType::Block, b"c", b"", b"")
                .entry(HARD, b"h", b"c", b""),
            &[],
            "h (c): skipped a hard link to a file that no earlier entry contains",
        ),
        (
            "xattr of macOS",
            tar()
                .pax(&[(b"SCHILY.xattr.com.apple.provenance", b"x")])
                .file(b"f"),
            &["f"],
            "f (com.apple.provenance): skipped an xattr of another operating system",
        ),
        (
            "user xattr of a symbolic link",
            tar()
                .pax(&[(b"SCHILY.xattr.user.x", b"x")])
                .entry(LINK, b"l", b"t", b""),
            &["l"],
            "l (user.x): skipped a user xattr",
        ),
        (
            "ACL of NFSv4",
            tar()
                .pax(&[(b"SCHILY.acl.ace", b"owner@:rwxp--aARWcCos:-------:allow")])
                .file(b"f"),
            &["f"],
            "f (ace): skipped an ACL of a type",
        ),
        (
            "invalid ACL",
            tar().pax(&[(b"SCHILY.acl.access", b"hello")]).file(b"f"),
            &["f"],
            "f (access): skipped an invalid ACL",
        ),
        (
            "invalid ACL in binary form",
            tar()
                .pax(&[(b"SCHILY.xattr.system.posix_acl_access", b"garbage")])
                .file(b"f"),
            &["f"],
            "f (system.posix_acl_access): skipped an invalid ACL",
        ),
        (
            "invalid capabilities",
            tar()
                .pax(&[(b"SCHILY.xattr.security.capability", b"garbage")])
                .file(b"f"),
            &["f"],
            "f (security.capability): skipped invalid capabilities",
        ),
        (
            "hard link without a target",
            tar().entry(HARD, b"h", b"", b""),
            &[],
            "h: skipped a hard link to a name that Linux cannot store",
        ),
        (
            "sparse map of a directory",
            tar()
                .pax(&[(b"GNU.sparse.size", b"10"), (b"GNU.sparse.map", b"0,1")])
                .entry(DIR, b"d", b"", b"")
                .file(b"/f"),
            &["d", "f"],
            "leading slash",
        ),
        (
            "default ACL of a file",
            tar()
                .pax(&[(b"SCHILY.acl.default", b"user::rwx,group::r--,other::---")])
                .file(b"f"),
            &["f"],
            "skipped a default ACL",
        ),
        (
            "xattr of more than 64 KiB",
            tar()
                .pax(&[(b"SCHILY.xattr.user.x", &[b'v'; 70_000])])
                .file(b"f"),
            &["f"],
            "f (user.x): skipped an xattr of more than 64 KiB",
        ),
    ] {
        let (target, got) = import_tar(&archive.file(b"z").end());
        let notes = got
            .unwrap_or_else(|error| panic!("{label}: {error}"))
            .notes
            .lines();
        let mut want = want.to_vec();
        want.push("z");
        assert_eq!(names(target.path()), want, "{label}");
        let found = notes.iter().any(|line| line.contains(note));
        assert!(found, "{label}: no {note:?} in {notes:?}");
    }
}

#[test]
fn many_odd_entries_cause_one_note_with_a_count() {
    let mut archive = tar();
    for n in 0..50 {
        archive = archive.file(format!("/f{n}").as_bytes());
    }
    let (_target, got) = import_tar(&archive.end());
    let want = ["/f0, /f1, /f2 and 47 more: removed the leading slash of the name"];
    assert_eq!(got.unwrap().notes.lines(), want);
}

#[test]
fn fields_that_are_no_numbers_are_replaced_with_a_note() {
    if !is_root() {
        return;
    }
    let file = EntryType::Regular;
    let ignored = "ignored a field that is not a number";
    let owner = "changed an owner or group that is not a number to 65534";
    let header = |edit: fn(&mut Header)| edited(tar(), file, edit);
    let record = |key: &'static [u8]| {
        let archive = tar().pax(&[(key, b"zz")]);
        edited(archive, file, |header| header.set_uid(7))
    };
    for (archive, want, note) in [
        (
            header(|header| header.as_old_mut().mode = *b"zz00644\0"),
            "100700 0:0 1.0",
            "odd: changed a mode that is not a number to 0700".to_owned(),
        ),
        (
            header(|header| header.as_old_mut().mtime = *b"zz0000000000"),
            "100644 0:0 0.0",
            format!("odd (mtime): {ignored}"),
        ),
        (
            header(|header| header.as_old_mut().gid = *b"-0000001"),
            "100644 0:65534 1.0",
            format!("odd (gid): {owner}"),
        ),
        (
            record(b"mtime"),
            "100644 7:0 1.0",
            format!("odd (mtime): {ignored}"),
        ),
        (
            record(b"uid"),
            "100644 65534:0 1.0",
            format!("odd (uid): {owner}"),
        ),
    ] {
        let (target, got) = import_tar(&archive.end());
        let notes = got.unwrap_or_else(|error| panic!("{note}: {error}")).notes;
        assert_eq!(notes.lines(), [note]);
        let line = &describe(target.path())["odd"];
        assert!(line.starts_with(want), "{line}");
    }
}

#[test]
fn numbers_out_of_range_are_changed() {
    if !is_root() {
        return;
    }
    let file = EntryType::Regular;
    let overflow = "65534:";
    for (label, archive, want, is_noted) in [
        (
            "-1 as an unsigned number",
            tar().pax(&[(b"uid", b"4294967295")]).file(b"odd"),
            overflow,
            true,
        ),
        (
            "more than 32 bits",
            tar().pax(&[(b"uid", b"4294967296")]).file(b"odd"),
            overflow,
            true,
        ),
        (
            "negative in a PAX record",
            tar().pax(&[(b"uid", b"-2")]).file(b"odd"),
            overflow,
            true,
        ),
        (
            "negative in a header",
            edited(tar(), file, |header| {
                header.as_old_mut().uid = *b"\xff\xff\xff\xff\xff\xff\xff\xfe";
            }),
            overflow,
            true,
        ),
        (
            "garbage behind a number",
            edited(tar(), file, |header| {
                header.as_old_mut().uid = *b"12 3456\0";
            }),
            "10:",
            false,
        ),
        (
            "time before the first one",
            tar()
                .pax(&[(b"mtime", b"-9223372036854775809")])
                .file(b"odd"),
            "0:",
            false,
        ),
        (
            "time after the last one",
            edited(tar(), file, |header| {
                header.as_old_mut().mtime = *b"\x80\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff";
            }),
            "0:",
            false,
        ),
    ] {
        let (target, got) = import_tar(&archive.end());
        let notes = got.unwrap_or_else(|error| panic!("{label}: {error}")).notes;
        let line = &describe(target.path())["odd"];
        let owner = line.split(' ').nth(1).unwrap();
        assert!(owner.starts_with(want), "{label}: {line}");
        assert_eq!(!notes.is_empty(), is_noted, "{label}: {notes:?}");
    }
}

#[test]
fn links_in_the_directories_of_names_are_followed_within_the_root() {
    for (label, archive, want) in [
        (
            "relative",
            tar()
                .entry(DIR, b"usr/bin", b"", b"")
                .entry(LINK, b"bin", b"usr/bin", b""),
            "usr/bin/f",
        ),
        (
            "absolute",
            tar().entry(LINK, b"bin", b"/usr/bin", b""),
            "usr/bin/f",
        ),
        (
            "above the root",
            tar().entry(LINK, b"bin", b"../../usr/bin", b""),
            "usr/bin/f",
        ),
        ("dangling", tar().entry(LINK, b"bin", b"new", b""), "new/f"),
        (
            "several",
            tar()
                .entry(LINK, b"bin", b"sbin", b"")
                .entry(LINK, b"sbin", b"/usr/./sbin/", b""),
            "usr/sbin/f",
        ),
    ] {
        let archive = archive
            .file(b"bin/f")
            .entry(DIR, b"bin/d", b"", b"")
            .entry(HARD, b"bin/g", b"bin/f", b"")
            .end();
        let (target, got) = import_tar(&archive);
        let notes = got.unwrap_or_else(|error| panic!("{label}: {error}")).notes;
        assert!(notes.is_empty(), "{label}: {notes:?}");
        let found = fs::read(target.path().join(want)).unwrap();
        assert_eq!(found, b"x", "{label}");
        let linked = describe(target.path())
            .into_values()
            .any(|line| line.contains("same as"));
        assert!(linked, "{label}");
    }
}

const NAMED: &[u8] = b"user::rw-,user:joe:rw-,group::r--,group:staff:r--,mask::rw-,other::---";

#[test]
fn names_in_acls_are_those_of_the_archive() {
    if !is_root() {
        return;
    }
    let passwd = b"root:x:0:0::/:/bin/sh\njoe:x:4321:1::/:/bin/sh\njoe:x:1:1::/:\n";
    let group = b"root:x:0:\nstaff:x:8765:\n";
    let file = EntryType::Regular;
    let access: (&[u8], &[u8]) = (b"SCHILY.acl.access", NAMED);
    let default: (&[u8], &[u8]) = (b"SCHILY.acl.default", NAMED);
    let archive = tar()
        .pax(&[access])
        .file(b"f")
        .pax(&[access])
        .file(b"replaced")
        .file(b"replaced")
        .pax(&[access, default])
        .entry(DIR, b"d", b"", b"")
        .pax(&[default])
        .entry(DIR, b"./", b"", b"")
        .entry(file, b"etc/passwd.new", b"", passwd)
        .entry(LINK, b"etc/passwd", b"passwd.new", b"")
        .entry(file, b"etc/group", b"", group)
        .end();
    let (target, got) = import_tar(&archive);
    let notes = got.unwrap().notes;
    assert!(notes.is_empty(), "{notes:?}");
    let all = describe(target.path());
    let numeric = String::from_utf8(NAMED.to_vec()).unwrap();
    let numeric = numeric.replace("joe", "4321").replace("staff", "8765");
    let binary = acl::from_text_with(numeric.as_bytes(), &mut |_, _| None).unwrap();
    let value = format!("={}]", binary.escape_ascii());
    assert!(all["f"].starts_with("100660 ") && all["f"].ends_with(&value));
    assert!(!all["replaced"].contains("acl"), "{}", all["replaced"]);
    assert_eq!(all["d"].matches(&value).count(), 2, "{}", all["d"]);
    assert_eq!(all[""].matches(&value).count(), 1, "{}", all[""]);
}

#[test]
fn unknown_names_in_acls_are_dropped_with_a_note() {
    if !is_root() {
        return;
    }
    let hostile = tempfile::tempdir().unwrap();
    let secret = hostile.path().join("passwd");
    fs::write(&secret, "joe:x:4321:\n").unwrap();
    let access: (&[u8], &[u8]) = (b"SCHILY.acl.access", NAMED);
    let outside = secret.to_str().unwrap().as_bytes();
    for passwd in [
        tar(),
        tar().entry(EntryType::Fifo, b"etc/passwd", b"", b""),
        tar().entry(LINK, b"etc/passwd", outside, b""),
        tar().entry(LINK, b"etc/passwd", b"passwd", b""),
        tar().entry(DIR, b"etc/passwd", b"", b""),
    ] {
        let (target, got) = import_tar(&passwd.pax(&[access]).file(b"f").end());
        let notes = got.unwrap().notes.lines();
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].starts_with("f (joe), f (staff): "), "{notes:?}");
        let rest = b"user::rw-,group::r--,mask::rw-,other::---";
        let rest = acl::from_text_with(rest, &mut |_, _| None).unwrap();
        let line = &describe(target.path())["f"];
        assert!(line.contains(&rest.escape_ascii().to_string()), "{line}");
    }
}

/// A file system without xattrs and with names of at most 255 bytes is simulated by a value that none of them stores.
#[test]
fn attributes_that_the_file_system_cannot_store_are_skipped_on_request() {
    if !is_root() {
        return;
    }
    // No file system of Linux has an NFSv4 ACL and stores a layer.
    let archive = tar()
        .pax(&[(b"SCHILY.xattr.system.nfs4_acl", b"x")])
        .file(b"f")
        .end();
    let import = |unsupported| {
        let target = tempfile::tempdir().unwrap();
        let space = XattrSpace::detect();
        let got = import::from_stream(&archive[..], target.path(), space, unsupported, &mut |_| {});
        (target, got)
    };
    let error = import(Unsupported::Refuse).1.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let (target, got) = import(Unsupported::Skip);
    let want = ["f (system.nfs4_acl): skipped an xattr that this file system or user cannot store"];
    assert_eq!(got.unwrap().notes.lines(), want);
    assert_eq!(names(target.path()), ["f"]);
}
