//! Tests with hostile archives: no entry leads outside of the target, and contradictions are skipped.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use cowl_layers::format::XattrSpace;
use tar::EntryType;

use super::import;
use super::import_tests::{Tar, import_tar};
use crate::tree::error::ErrorKind;
use crate::tree::omissions::Unsupported;
use crate::tree::testing::describe;

#[test]
fn entries_that_contradict_the_archive_are_skipped_with_a_note() {
    let tar = Tar::default;
    let (link, hard) = (EntryType::Symlink, EntryType::Link);
    let missing = "skipped a hard link to a file that no earlier entry contains";
    let over = "skipped a file with the name of a directory that is not empty";
    let below = "skipped an entry below a file that is not a directory";
    let dots = "skipped an entry with '..' in its name";
    for (odd, want, note) in [
        (tar().file(b"a/../../b"), "z", format!("a/../../b: {dots}")),
        (tar().file(b".."), "z", format!("..: {dots}")),
        (
            tar().file(b"/../etc/passwd"),
            "z",
            format!("/../etc/passwd: {dots}"),
        ),
        (
            tar().entry(link, b"l", b"l", b"").file(b"l/f"),
            "l z",
            "l/f: skipped an entry below too many symbolic links".to_owned(),
        ),
        (
            tar().entry(hard, b"h", b"/etc/passwd", b""),
            "z",
            format!("h (/etc/passwd): {missing}"),
        ),
        (
            tar().file(b"f").entry(hard, b"h", b"no/missing", b""),
            "f z",
            format!("h (no/missing): {missing}"),
        ),
        (
            tar().file(b"f").entry(hard, b"h", b"f/g", b""),
            "f z",
            format!("h (f/g): {missing}"),
        ),
        (
            tar()
                .entry(hard, b"h", b"missing", b"")
                .entry(hard, b"i", b"h", b""),
            "z",
            format!("h (missing), i (h): {missing}"),
        ),
        (
            tar().file(b"f").file(b"f/g"),
            "f z",
            format!("f/g: {below}"),
        ),
        (
            tar().file(b"d/f").file(b"d"),
            "d d/f z",
            format!("d: {over}"),
        ),
        (
            tar().file(b"d/f").file(b"f").entry(hard, b"d", b"f", b""),
            "d d/f f z",
            format!("d: {over}"),
        ),
    ] {
        let (target, got) = import_tar(&odd.file(b"z").end());
        let notes = got.unwrap_or_else(|error| panic!("{note}: {error}")).notes;
        assert!(notes.lines().contains(&note), "{note}: {notes:?}");
        let names: Vec<_> = describe(target.path()).into_keys().collect();
        assert_eq!(names.join(" ").trim(), want, "{note}");
    }
}

#[test]
fn attributes_of_a_directory_that_a_file_does_not_replace_are_kept() {
    let dir = EntryType::Directory;
    let archive = Tar::default().entry(dir, b"d", b"", b"").file(b"d/f");
    let (expected, got) = import_tar(&archive.clone().end());
    got.unwrap();
    let (target, got) = import_tar(&archive.file(b"d").end());
    assert_eq!(got.unwrap().notes.lines().len(), 1);
    assert_eq!(describe(target.path())["d"], describe(expected.path())["d"]);
}

#[test]
fn archive_without_any_entry_that_can_be_imported_is_refused() {
    let error = Tar::default().file(b"../a").file(b"../b").refused();
    assert_eq!(error.kind(), ErrorKind::Refused);
    let want = "no entry of the archive can be imported: \
                ../a, ../b: skipped an entry with '..' in its name";
    assert_eq!(error.to_string(), want);
}

/// Each archive tries to write, replace or link a file outside of the target.
#[test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
fn no_entry_leads_outside_of_the_target() {
    let around = tempfile::tempdir().unwrap();
    let (outside, target) = (around.path().join("outside"), around.path().join("target"));
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "unchanged").unwrap();
    let out = outside.to_str().unwrap().as_bytes();
    let secret = [out, b"/secret"].concat();
    let tar = Tar::default;
    let (link, hard, dir) = (EntryType::Symlink, EntryType::Link, EntryType::Directory);
    for (label, archive) in [
        ("absolute", tar().file(&secret)),
        ("parents", tar().file(b"../outside/secret")),
        ("later parents", tar().file(b"d/../../outside/secret")),
        (
            "absolute link",
            tar().entry(link, b"l", out, b"").file(b"l/secret"),
        ),
        (
            "relative link",
            tar()
                .entry(link, b"l", b"../outside", b"")
                .file(b"l/secret"),
        ),
        (
            "link to a link",
            tar()
                .entry(link, b"a", b"..", b"")
                .entry(link, b"l", b"a/outside", b"")
                .file(b"l/secret"),
        ),
        (
            "link through a directory",
            tar()
                .file(b"d/f")
                .entry(link, b"l", b"d/../../outside", b"")
                .file(b"l/secret"),
        ),
        (
            "directory",
            tar()
                .entry(link, b"l", out, b"")
                .entry(dir, b"l/new", b"", b""),
        ),
        (
            "attributes of a directory",
            tar()
                .entry(link, b"l", out, b"")
                .entry(dir, b"l/.", b"", b"")
                .entry(dir, b"l", b"", b""),
        ),
        (
            "replaced directory",
            tar()
                .file(b"d/f")
                .entry(link, b"l", b"d", b"")
                .file(b"l/g")
                .entry(link, b"l", out, b"")
                .file(b"l/secret"),
        ),
        (
            "hard link",
            tar()
                .entry(hard, b"h", &secret, b"")
                .entry(EntryType::Regular, b"h", b"", b"changed"),
        ),
        (
            "hard link through a link",
            tar()
                .entry(link, b"l", out, b"")
                .entry(hard, b"h", b"l/secret", b""),
        ),
        (
            "hard link with parents",
            tar().entry(hard, b"h", b"../outside/secret", b""),
        ),
        (
            "device through a link",
            tar()
                .entry(link, b"l", out, b"")
                .entry(EntryType::Fifo, b"l/fifo", b"", b""),
        ),
    ] {
        let before = describe(&outside);
        fs::create_dir(&target).unwrap();
        let space = XattrSpace::detect();
        let archive = archive.end();
        for unsupported in [Unsupported::Refuse, Unsupported::Skip] {
            let got = import::from_stream(&archive[..], &target, space, unsupported, &mut |_| {});
            assert_eq!(describe(&outside), before, "{label}");
            assert_eq!(fs::read_dir(around.path()).unwrap().count(), 2, "{label}");
            for line in describe(&target).values() {
                assert!(!line.contains("unchanged"), "{label}: {line}");
            }
            // A hard link would show the file in both trees.
            let secret = fs::metadata(outside.join("secret")).unwrap();
            assert_eq!(secret.nlink(), 1, "{label}: {got:?}");
            fs::remove_dir_all(&target).unwrap();
            fs::create_dir(&target).unwrap();
        }
        fs::remove_dir(&target).unwrap();
    }
}
