//! Changes as text: unified diffs that `patch -p1` and `git apply` take, with what has no place in one
//! (owners, folders, devices, content that is no text) told in lines that they pass over.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Read as _;
use std::time::{Duration, Instant};

use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::{FileNode, Found};
use similar::{Algorithm, DiffOp, DiffTag, capture_diff_slices_deadline, group_diff_ops};

use super::diff::{Change, Side, Status};
use crate::tree::error::{Context as _, Result};
use crate::tree::find::Finder;
use crate::tree::walk::open_content;

/// A file that is longer is not compared line by line.
const LONGEST: u64 = 16 << 20;
/// After this time a file's diff is finished in a hurry: right, but not the shortest.
const PATIENCE: Duration = Duration::from_secs(5);
/// So many lines around what differs are shown.
const AROUND: usize = 3;

/// One change between two states as text. What was renamed is told as gone and new: a patch can't move folders.
pub fn of(a: &mut Finder<'_>, b: &mut Finder<'_>, change: &Change) -> Result<Vec<u8>> {
    let path = match change.path.as_slice() {
        b"." => b"",
        path => path,
    };
    let mut text = Vec::new();
    match change.status {
        Status::Added => one_sided(&mut text, &b.at(path)?, path, Side::New)?,
        Status::Deleted => one_sided(&mut text, &a.at(path)?, path, Side::Gone)?,
        Status::TypeChanged | Status::Renamed => {
            let from = change.from.as_deref().unwrap_or(path);
            one_sided(&mut text, &a.at(from)?, from, Side::Gone)?;
            one_sided(&mut text, &b.at(path)?, path, Side::New)?;
        }
        Status::Modified => both(&mut text, a, b, change, path)?,
    }
    Ok(text)
}

fn both(
    text: &mut Vec<u8>,
    a: &mut Finder<'_>,
    b: &mut Finder<'_>,
    change: &Change,
    path: &[u8],
) -> Result<()> {
    let (old, new) = (a.at(path)?, b.at(path)?);
    let (Some(before), Some(after)) = (stat(&old), stat(&new)) else {
        return Ok(());
    };
    if change.what.owner {
        let (from, to) = (owner(before), owner(after));
        remark(text, path, &format!("owner {from} -> {to}"));
    }
    if change.what.xattrs {
        remark(text, path, "extended attributes differ");
    }
    let special = (before.mode | after.mode) & 0o7000 != 0;
    if change.what.mode && (special || before.kind() != FileKind::Regular) {
        let (from, to) = (before.perm(), after.perm());
        remark(text, path, &format!("mode {from:04o} -> {to:04o}"));
    }
    match (&old, &new) {
        (Found::File(one), Found::File(two)) if one.stat.kind() == FileKind::Regular => {
            let modes = (before.mode & 0o777, after.mode & 0o777);
            let contents = match change.what.content {
                true => Some((content(one, path)?, content(two, path)?)),
                false => None,
            };
            if modes.0 == modes.1 && contents.is_none() {
                return Ok(());
            }
            let (from, to) = (named("a/", path), named("b/", path));
            let head = if modes.0 == modes.1 {
                String::new()
            } else {
                format!("old mode 100{:03o}\nnew mode 100{:03o}\n", modes.0, modes.1)
            };
            match contents {
                None => push(text, &format!("diff --git {from} {to}\n{head}")),
                Some((Some(one), Some(two))) => {
                    push(text, &format!("diff --git {from} {to}\n{head}"));
                    push(text, &format!("--- {from}\n+++ {to}\n"));
                    hunks(text, &one, &two);
                }
                Some(_) => {
                    if !head.is_empty() {
                        push(text, &format!("diff --git {from} {to}\n{head}"));
                    }
                    push(text, &format!("Binary files {from} and {to} differ\n"));
                }
            }
        }
        (Found::File(_), Found::File(_)) if change.what.content => {
            one_sided(text, &old, path, Side::Gone)?;
            one_sided(text, &new, path, Side::New)?;
        }
        _ => {}
    }
    Ok(())
}

/// Writes an object that only one of the two states has.
fn one_sided(text: &mut Vec<u8>, found: &Found, path: &[u8], side: Side) -> Result<()> {
    let new = side == Side::New;
    let Some(stat) = stat(found) else {
        return Ok(());
    };
    let done = if new { "added" } else { "removed" };
    let file = match found {
        Found::File(file) if matches!(stat.kind(), FileKind::Regular | FileKind::Symlink) => file,
        _ => {
            let mode = stat.perm();
            let said = format!(
                "{} {done}, mode {mode:04o}, owner {}",
                kind(stat),
                owner(stat)
            );
            remark(text, path, &said);
            return Ok(());
        }
    };
    if new && (stat.uid, stat.gid) != (0, 0) {
        remark(text, path, &format!("owner {}", owner(stat)));
    }
    if new && stat.mode & 0o7000 != 0 {
        remark(text, path, &format!("mode {:04o}", stat.perm()));
    }
    let (from, to) = (named("a/", path), named("b/", path));
    let (content, mode) = match stat.kind() {
        FileKind::Symlink => {
            let target = file.loc.readlink();
            let target = target.context("can't read the symbolic link", path)?;
            (Some(target), 0o120_000)
        }
        _ => (content(file, path)?, stat.mode & 0o100_777),
    };
    let sides = match new {
        true => ("/dev/null", to.as_str()),
        false => (from.as_str(), "/dev/null"),
    };
    let Some(content) = content else {
        let said = format!("Binary files {} and {} differ\n", sides.0, sides.1);
        push(text, &said);
        return Ok(());
    };
    let word = if new { "new" } else { "deleted" };
    push(
        text,
        &format!("diff --git {from} {to}\n{word} file mode {mode:06o}\n"),
    );
    if !content.is_empty() {
        push(text, &format!("--- {}\n+++ {}\n", sides.0, sides.1));
        match new {
            true => hunks(text, b"", &content),
            false => hunks(text, &content, b""),
        }
    }
    Ok(())
}

/// The content, if it is text of a length that can be compared.
fn content(file: &FileNode, path: &[u8]) -> Result<Option<Vec<u8>>> {
    if file.stat.size > LONGEST {
        return Ok(None);
    }
    let fd = open_content(file.data_loc()).context("can't open the file", path)?;
    let mut content = Vec::new();
    let read = File::from(fd).take(LONGEST).read_to_end(&mut content);
    read.context("can't read", path)?;
    Ok((!content.contains(&0)).then_some(content))
}

fn hunks(text: &mut Vec<u8>, old: &[u8], new: &[u8]) {
    let lines = |content: &[u8]| -> Vec<Vec<u8>> {
        let lines = content.split_inclusive(|&byte| byte == b'\n');
        lines.map(<[u8]>::to_vec).collect()
    };
    let (old, new) = (lines(old), lines(new));
    let until = Instant::now().checked_add(PATIENCE);
    let ops = capture_diff_slices_deadline(Algorithm::Myers, &old, &new, until);
    for hunk in group_diff_ops(ops, AROUND) {
        let (Some(first), Some(last)) = (hunk.first(), hunk.last()) else {
            continue;
        };
        let span = |start: usize, end: usize| {
            let length = end - start;
            // Lines are counted from 1; of no lines the one before is told.
            format!("{},{length}", if length == 0 { start } else { start + 1 })
        };
        let one = span(first.old_range().start, last.old_range().end);
        let two = span(first.new_range().start, last.new_range().end);
        push(text, &format!("@@ -{one} +{two} @@\n"));
        for op in &hunk {
            rows(text, op, &old, &new);
        }
    }
}

fn rows(text: &mut Vec<u8>, op: &DiffOp, old: &[Vec<u8>], new: &[Vec<u8>]) {
    let mut put = |sign: u8, lines: &[Vec<u8>]| {
        for line in lines {
            text.push(sign);
            text.extend_from_slice(line);
            if !line.ends_with(b"\n") {
                text.extend_from_slice(b"\n\\ No newline at end of file\n");
            }
        }
    };
    let before = old.get(op.old_range()).unwrap_or_default();
    let after = new.get(op.new_range()).unwrap_or_default();
    match op.tag() {
        DiffTag::Equal => put(b' ', before),
        DiffTag::Delete | DiffTag::Insert | DiffTag::Replace => {
            put(b'-', before);
            put(b'+', after);
        }
    }
}

fn stat(found: &Found) -> Option<&Stat> {
    match found {
        Found::Absent | Found::Whiteout => None,
        Found::Dir(dir) => Some(&dir.stat),
        Found::File(file) => Some(&file.stat),
    }
}

fn owner(stat: &Stat) -> String {
    format!("{}:{}", stat.uid, stat.gid)
}

fn kind(stat: &Stat) -> String {
    let device = |what: &str| {
        let (major, minor) = (rustix::fs::major(stat.rdev), rustix::fs::minor(stat.rdev));
        format!("{what} device {major}:{minor}")
    };
    match stat.kind() {
        FileKind::Regular => "file".to_owned(),
        FileKind::Directory => "folder".to_owned(),
        FileKind::Symlink => "symbolic link".to_owned(),
        FileKind::Fifo => "named pipe".to_owned(),
        FileKind::Socket => "socket".to_owned(),
        FileKind::CharDevice => device("character"),
        FileKind::BlockDevice => device("block"),
    }
}

/// A line that programs pass over.
fn remark(text: &mut Vec<u8>, path: &[u8], said: &str) {
    push(text, &format!("# {}: {said}\n", named("/", path)));
}

fn push(text: &mut Vec<u8>, words: &str) {
    text.extend_from_slice(words.as_bytes());
}

/// A name as patches have it: in quotes with escapes, where it is not plain.
fn named(before: &str, path: &[u8]) -> String {
    let plain = |byte: &u8| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\');
    if path.iter().all(plain) {
        return path.iter().fold(before.to_owned(), |mut name, &byte| {
            name.push(char::from(byte));
            name
        });
    }
    let mut name = format!("\"{before}");
    for &byte in path {
        match byte {
            b'"' | b'\\' => name.extend(['\\', char::from(byte)]),
            b' '..=b'~' => name.push(char::from(byte)),
            // Writing into a string can't fail.
            _ => write!(name, "\\{byte:03o}").unwrap_or_default(),
        }
    }
    name.push('"');
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(old: &str, new: &str) -> String {
        let mut text = Vec::new();
        hunks(&mut text, old.as_bytes(), new.as_bytes());
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn hunks_are_counted_as_patch_counts() {
        assert_eq!(said("", "a\n"), "@@ -0,0 +1,1 @@\n+a\n");
        assert_eq!(said("a\n", ""), "@@ -1,1 +0,0 @@\n-a\n");
        assert_eq!(said("a\n", "a\n"), "");
        assert_eq!(
            said("a\nb", "a\nb\n"),
            "@@ -1,2 +1,2 @@\n a\n-b\n\\ No newline at end of file\n+b\n"
        );
        // Only a newline ends a line.
        assert_eq!(said("a\rb\n", "a\rc\n"), "@@ -1,1 +1,1 @@\n-a\rb\n+a\rc\n");
        let long: String = (0..20).map(|n| format!("{n}\n")).collect();
        let other = long.replace("10\n", "ten\n");
        let shown = said(&long, &other);
        assert!(shown.starts_with("@@ -8,7 +8,7 @@\n 7\n"), "{shown}");
    }

    #[test]
    fn names_that_are_not_plain_are_quoted() {
        assert_eq!(named("a/", b"etc/fstab"), "a/etc/fstab");
        assert_eq!(named("a/", b"x y"), "\"a/x y\"");
        assert_eq!(named("a/", b"\"\\\n\xff"), "\"a/\\\"\\\\\\012\\377\"");
    }
}
