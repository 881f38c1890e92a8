//! Tests with hostile archives: no entry leads outside of the target, and contradictions are refused.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use cowl_layers::format::XattrSpace;
use tar::EntryType;

use super::import;
use super::import_tests::Tar;
use crate::tree::error::ErrorKind;
use crate::tree::omissions::Unsupported;
use crate::tree::testing::describe;

#[test]
fn archives_that_contradict_themselves_are_refused_and_the_error_names_the_entry() {
    let tar = Tar::default;
    let (link, hard) = (EntryType::Symlink, EntryType::Link);
    for (bad, named) in [
        (tar().file(b"a/../../b"), "a/../../b"),
        (tar().file(b".."), ".."),
        (tar().file(b"/../etc/passwd"), "/../etc/passwd"),
        (tar().entry(link, b"l", b"l", b"").file(b"l/f"), "l/f"),
        (tar().file(b"f").entry(hard, b"h", b"/etc/passwd", b""), "h"),
        (tar().file(b"f").entry(hard, b"h", b"missing", b""), "h"),
        (tar().file(b"f").entry(hard, b"h", b"no/missing", b""), "h"),
        (tar().file(b"f").file(b"f/g"), "f"),
        (tar().file(b"d/f").file(b"d"), "d"),
    ] {
        let error = bad.refused();
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        assert!(
            error.to_string().contains(named),
            "{error} does not name {named}"
        );
    }
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
