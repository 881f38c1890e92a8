//! The results of cowl for odd archives, beside those of GNU tar.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;

use cowl_tests::command::sh_in;
use cowl_tests::conditions::{Need, can};
use cowl_tests::scratch::Scratch;

use super::archive_cases::{
    Case,
    Expected::{Other, Refused, Same},
    all,
};
use super::archive_more;
use super::archive_programs::{Unpacked, differences, imported, unpacked_by_gnu_tar};

/// Returns the names in a tree, without the parents of the directory outside.
fn names((tree, _): &Unpacked, outside: &str) -> Vec<String> {
    let outside = outside.trim_start_matches('/');
    let parents: BTreeSet<_> = outside
        .match_indices('/')
        .map(|(at, _)| &outside[..at])
        .collect();
    let names = tree.keys().map(|path| path.escape_ascii().to_string());
    names
        .filter(|name| !name.is_empty() && !parents.contains(name.as_str()))
        .map(|name| name.replace(outside, "OUTSIDE"))
        .collect()
}

fn check(scratch: &Scratch, outside: &str, case: &Case) -> Vec<String> {
    let archive = scratch.join("a.tar");
    std::fs::write(&archive, &case.archive).unwrap();
    let (output, by_gnu_tar) = unpacked_by_gnu_tar(scratch, &archive);
    let (created, got) = imported(scratch, &archive, &[]);
    let mut problems = Vec::new();
    if output.code != case.gnu_tar {
        problems.push(format!("GNU tar: {}", output.report()));
    }
    let notes = created.err();
    let mut noted = |words: &[&str]| {
        let lines = notes
            .lines()
            .filter(|line| line.starts_with("note: "))
            .count();
        if lines != words.len() || !words.iter().all(|word| notes.contains(word)) {
            problems.push(format!("notes {words:?}: {notes}"));
        }
    };
    match (&case.cowl, got) {
        (Same(notes), Some(got)) => {
            noted(notes);
            problems.extend(differences(&archive, by_gnu_tar, got));
        }
        (Other(want, notes), Some(got)) => {
            noted(notes);
            if names(&got, outside) != *want {
                problems.push(format!("names {:?}", names(&got, outside)));
            }
        }
        (Refused(word), None) if created.code == 1 && notes.contains(word) => {}
        (_, _) => problems.push(format!("cowl: {}", created.report())),
    }
    problems
}

#[test]
fn odd_archives_are_imported_as_documented() {
    if !can(&[Need::Root, Need::Program("tar")]) {
        return;
    }
    let scratch = Scratch::in_memory();
    let outside = scratch.make("outside");
    let kept = outside.join("kept");
    std::fs::write(&kept, "kept").unwrap();
    let outside = outside.to_str().unwrap();
    let before = kept.metadata().unwrap();
    let mut failed = Vec::new();
    for case in all(outside).into_iter().chain(archive_more::all()) {
        for problem in check(&scratch, outside, &case) {
            failed.push(format!("{}: {problem}", case.name));
        }
        let after = kept.metadata().unwrap();
        let state = |meta: &std::fs::Metadata| (meta.ctime(), meta.ctime_nsec(), meta.nlink());
        assert_eq!(state(&before), state(&after), "{}", case.name);
        assert_eq!(
            std::fs::read_dir(outside).unwrap().count(),
            1,
            "{}",
            case.name
        );
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// A compressed stream that is complete proves that the archive is, too.
#[test]
fn only_complete_compressed_archives_may_lack_an_end_marker() {
    if !can(&[Need::Root, Need::Program("tar"), Need::Program("zstd")]) {
        return;
    }
    let scratch = Scratch::in_memory();
    // GNU tar's record, without the end marker: headers and data of two files.
    sh_in(
        &scratch,
        "echo 1 > a; echo 2 > b; tar -cf end.tar a b; head -c 2048 end.tar > plain
         gzip -c plain > a.gz; xz -c plain > a.xz; zstd -qc plain > a.zst",
    )
    .ok();
    for name in ["a.gz", "a.xz", "a.zst"] {
        let archive = scratch.join(name);
        let (output, got) = imported(&scratch, &archive, &[]);
        let output = output.ok();
        assert!(output.err().contains("the end marker is missing"), "{name}");
        assert_eq!(got.unwrap().0.len(), 3, "{name}");
        let data = std::fs::read(&archive).unwrap();
        std::fs::write(&archive, &data[..data.len() - 3]).unwrap();
        let (output, _) = imported(&scratch, &archive, &[]);
        output.fails(1, &["truncated"]);
    }
    let (output, _) = imported(&scratch, &scratch.join("plain"), &[]);
    output.fails(1, &["truncated"]);
}
