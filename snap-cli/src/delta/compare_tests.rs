//! Tests of diff, digest and measure, on layers that kernel overlayfs wrote and on plain trees.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::stack_tests::{Stack, kernel_shows, view};
use super::{Change, diff};
use crate::tree::testing::{self, is_root, one_of_everything};
use crate::tree::{digest_dir, measure};

/// Verifies the diffs between all states of a stack: applied to the paths of the first state they yield those of the
/// second one, and paths that they do not list are equal in both.
pub(super) fn check_diff_of_every_pair(stack: &Stack) {
    let count = stack.layers.len();
    for (a, b) in (1..=count).flat_map(|a| (1..=count).map(move |b| (a, b))) {
        let (one, two) = (stack.down(..a), stack.down(..b));
        let changes = diff(&view(&one), &view(&two)).unwrap();
        let old = kernel_shows(stack, &one, &format!("d{a}{b}-a"));
        let new = kernel_shows(stack, &two, &format!("d{a}{b}-b"));
        check_diff(&changes, &old, &new);
    }
}

fn check_diff(changes: &[Change], old: &BTreeMap<String, String>, new: &BTreeMap<String, String>) {
    let text = |path: &[u8]| path.escape_ascii().to_string();
    // Returns the path in the old state of a path in the new state, according to the renames.
    let origin = |path: &str| -> String {
        let renames = changes
            .iter()
            .filter_map(|c| Some((text(&c.path), text(c.from.as_ref()?))));
        let best = renames
            .filter(|(to, _)| path == to || path.starts_with(&format!("{to}/")))
            .max_by_key(|(to, _)| to.len());
        best.map_or(path.to_owned(), |(to, from)| {
            format!("{from}{}", &path[to.len()..])
        })
    };
    let with = |letters: &str| -> std::collections::BTreeSet<String> {
        changes
            .iter()
            .filter(|c| letters.contains(c.status.letter()))
            .map(|c| text(&c.path))
            .collect()
    };
    let (added, changed) = (with("A"), with("MTR"));
    let mut remaining: std::collections::BTreeSet<&String> = old.keys().collect();
    for (path, line) in new {
        if added.contains(path) {
            continue;
        }
        let from = origin(path);
        let Some(before) = old.get(&from) else {
            panic!("{path} was not added, and {from} did not exist: {changes:?}");
        };
        remaining.remove(&from);
        let is_dir = line.starts_with('4') && before.starts_with('4');
        let same = |line: &str| {
            let line = line.split(" same as ").next().unwrap().to_owned();
            let mut words: Vec<&str> = line.split(' ').collect();
            if is_dir {
                words.remove(2);
            }
            words.join(" ")
        };
        if !changed.contains(path) && !path.is_empty() {
            assert_eq!(same(line), same(before), "{path} (was {from}): {changes:?}");
        }
    }
    let removed: std::collections::BTreeSet<String> = remaining.into_iter().cloned().collect();
    assert_eq!(
        removed,
        with("D"),
        "{:#?}\n{old:#?}\n{new:#?}",
        lines(changes)
    );
}

fn lines(changes: &[Change]) -> Vec<String> {
    changes
        .iter()
        .map(|change| {
            let from = change
                .from
                .as_ref()
                .map(|from| format!(" <- {}", from.escape_ascii()));
            format!(
                "{} {}{}",
                change.status,
                change.path.escape_ascii(),
                from.unwrap_or_default()
            )
        })
        .collect()
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
fn a_diff_lists_every_change_and_no_copy_up() {
    if !is_root() {
        return;
    }
    let mut stack = Stack::new();
    let base = stack.layer();
    for file in [
        "keep/a",
        "tree/x/1",
        "tree/x/2",
        "tree/y",
        "ren/old/1",
        "ren/old/2",
        "f",
        "typ",
        "same",
        "touch",
        "con",
    ] {
        let path = base.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, file).unwrap();
    }
    fs::write(base.join("up"), b"copied up only").unwrap();
    stack.write(|at| {
        fs::write(at.join("new"), b"new").unwrap();
        fs::create_dir_all(at.join("newdir/in")).unwrap();
        fs::remove_dir_all(at.join("tree")).unwrap();
        fs::rename(at.join("ren/old"), at.join("ren/new")).unwrap();
        fs::write(at.join("ren/new/1"), b"changed").unwrap();
        fs::remove_file(at.join("ren/new/2")).unwrap();
        fs::rename(at.join("f"), at.join("g")).unwrap();
        fs::remove_file(at.join("typ")).unwrap();
        fs::create_dir(at.join("typ")).unwrap();
        fs::write(at.join("typ/in"), b"x").unwrap();
        testing::set_times(&at.join("touch"), 5, 6);
        let before = fs::metadata(at.join("con")).unwrap().modified().unwrap();
        fs::write(at.join("con"), b"CON").unwrap();
        fs::File::options()
            .write(true)
            .open(at.join("con"))
            .unwrap()
            .set_modified(before)
            .unwrap();
        // Only copied up.
        drop(
            fs::File::options()
                .append(true)
                .open(at.join("up"))
                .unwrap(),
        );
        testing::chmod(&at.join("keep"), 0o700);
    });
    let (a, b) = (view(&stack.down(..1)), view(&stack.down(..)));
    let got = lines(&diff(&a, &b).unwrap());
    // The kernel stores no marker by which a renamed file with copied data could be recognized. This file is a
    // metadata-only copy, which can be recognized.
    assert_eq!(
        got,
        [
            "M con",
            "D f",
            "A g",
            "M keep",
            "A new",
            "A newdir",
            "A newdir/in",
            "R ren/new <- ren/old",
            "M ren/new/1",
            "D ren/old/2",
            "M touch",
            "D tree",
            "D tree/x",
            "D tree/x/1",
            "D tree/x/2",
            "D tree/y",
            "T typ",
            "A typ/in",
        ]
        .map(|line| if line == "A g" { "R g <- f" } else { line })
        .into_iter()
        .filter(|line| *line != "D f")
        .collect::<Vec<_>>()
    );
    assert_eq!(diff(&a, &a).unwrap(), []);
    assert_eq!(diff(&b, &b).unwrap(), []);
}

#[test]
fn digests_change_with_every_relevant_difference() {
    if !is_root() {
        return;
    }
    let tree = tempfile::tempdir().unwrap();
    one_of_everything(tree.path());
    let root = tree.path();
    let now = || digest_dir(root, &mut |_| {}).unwrap();
    let first = now();
    assert_eq!(now(), first);
    assert_eq!(first.to_string().len(), "2:".len() + 64);
    // Reading does not change the digest.
    fs::read(root.join("dir/big")).unwrap();
    let keep_times = |path: &str, change: &dyn Fn(&Path)| {
        let path = root.join(path);
        let before = fs::symlink_metadata(&path).unwrap().modified().unwrap();
        change(&path);
        fs::File::open(&path).unwrap().set_modified(before).unwrap();
    };
    assert_eq!(now(), first);
    let mut digests = vec![first];
    let mut assert_differs = |change: &str| {
        let digest = now();
        assert!(
            !digests.contains(&digest),
            "{change} did not change the digest"
        );
        digests.push(digest);
    };
    keep_times("empty", &|path| fs::write(path, b"1").unwrap());
    assert_differs("content");
    keep_times("empty", &|path| testing::chmod(path, 0o1755));
    assert_differs("a mode");
    keep_times("empty", &|path| testing::chown(path, 12, 35));
    assert_differs("a group");
    keep_times("empty", &|path| testing::set_xattr(path, "user.a", b""));
    assert_differs("an xattr");
    testing::set_times(&root.join("empty"), 5, 6);
    assert_differs("a time");
    testing::set_times(&root.join("empty"), 5, 7);
    assert_differs("a nanosecond");
    keep_times("dir", &|path| {
        fs::rename(path.join("hard"), path.join("hard2")).unwrap()
    });
    assert_differs("a name");
    keep_times("dir", &|path| {
        let from = path.join("hard2");
        let time = fs::metadata(&from).unwrap().modified().unwrap();
        fs::copy(&from, path.join("copy")).unwrap();
        fs::rename(path.join("copy"), &from).unwrap();
        testing::chmod(&from, 0o400);
        for (name, value) in [
            ("user.text", &b"value"[..]),
            ("user.eq=uals%3D", b"a\n9 b=c\n\0\xff"),
            ("user.none", b""),
        ] {
            testing::set_xattr(&from, name, value);
        }
        fs::File::open(&from).unwrap().set_modified(time).unwrap();
    });
    assert_differs("a hard link that became a copy");
}

#[test]
fn measure_counts_each_inode_once() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a"), vec![1; 100_000]).unwrap();
    let one = measure(dir.path()).unwrap();
    fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
    let two = measure(dir.path()).unwrap();
    assert_eq!(two.entries, one.entries + 1);
    assert_eq!((two.bytes, two.inodes), (one.bytes, 2));
    assert_ne!(two.metadata_digest, one.metadata_digest);
    assert_eq!(one.entries, 1);
    assert!(one.bytes >= 100_000 && one.bytes < 120_000, "{}", one.bytes);
}
