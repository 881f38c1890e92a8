//! Changes as unified diffs, which `patch -p1` and `git apply` accept.
//!
//! Changes that a unified diff cannot express (owners, directories, devices, binary content) are written as comment
//! lines, which those programs ignore.

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

/// The maximum size of a file that is compared line by line, in bytes.
const MAX_TEXT_SIZE: u64 = 16 << 20;
/// The time after which the search for the shortest diff of a file is given up; the result is still correct.
const SEARCH_TIME: Duration = Duration::from_secs(5);
/// The number of context lines around a difference.
const CONTEXT_LINES: usize = 3;

/// Formats one change between two states. A rename is written as a removal and an addition, because patch(1) cannot
/// rename directories.
pub fn format_change(a: &mut Finder<'_>, b: &mut Finder<'_>, change: &Change) -> Result<Vec<u8>> {
    let path = match change.path.as_slice() {
        b"." => b"",
        path => path,
    };
    let mut text = Vec::new();
    match change.status {
        Status::Added => write_one_sided(&mut text, &b.find(path)?, path, Side::Added)?,
        Status::Deleted => write_one_sided(&mut text, &a.find(path)?, path, Side::Removed)?,
        Status::TypeChanged | Status::Renamed => {
            let from = change.from.as_deref().unwrap_or(path);
            write_one_sided(&mut text, &a.find(from)?, from, Side::Removed)?;
            write_one_sided(&mut text, &b.find(path)?, path, Side::Added)?;
        }
        Status::Modified => write_modified(&mut text, a, b, change, path)?,
    }
    Ok(text)
}

/// Writes the differences of an object that both states have.
fn write_modified(
    text: &mut Vec<u8>,
    a: &mut Finder<'_>,
    b: &mut Finder<'_>,
    change: &Change,
    path: &[u8],
) -> Result<()> {
    let (old, new) = (a.find(path)?, b.find(path)?);
    let (Some(before), Some(after)) = (stat(&old), stat(&new)) else {
        return Ok(());
    };
    if change.differences.owner {
        let (from, to) = (format_owner(before), format_owner(after));
        push_comment(text, path, &format!("owner {from} -> {to}"));
    }
    if change.differences.xattrs {
        push_comment(text, path, "extended attributes differ");
    }
    let special = (before.mode | after.mode) & 0o7000 != 0;
    if change.differences.mode && (special || before.kind() != FileKind::Regular) {
        let (from, to) = (before.perm(), after.perm());
        push_comment(text, path, &format!("mode {from:04o} -> {to:04o}"));
    }
    match (&old, &new) {
        (Found::File(one), Found::File(two)) if one.stat.kind() == FileKind::Regular => {
            let modes = (before.mode & 0o777, after.mode & 0o777);
            let contents = match change.differences.content {
                true => Some((read_text(one, path)?, read_text(two, path)?)),
                false => None,
            };
            if modes.0 == modes.1 && contents.is_none() {
                return Ok(());
            }
            let (from, to) = (quoted_name("a/", path), quoted_name("b/", path));
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
                    write_hunks(text, &one, &two);
                }
                Some(_) => {
                    if !head.is_empty() {
                        push(text, &format!("diff --git {from} {to}\n{head}"));
                    }
                    push(text, &format!("Binary files {from} and {to} differ\n"));
                }
            }
        }
        (Found::File(_), Found::File(_)) if change.differences.content => {
            write_one_sided(text, &old, path, Side::Removed)?;
            write_one_sided(text, &new, path, Side::Added)?;
        }
        _ => {}
    }
    Ok(())
}

/// Writes an object that only one of the two states has.
fn write_one_sided(text: &mut Vec<u8>, found: &Found, path: &[u8], side: Side) -> Result<()> {
    let is_added = side == Side::Added;
    let Some(stat) = stat(found) else {
        return Ok(());
    };
    let action = if is_added { "added" } else { "removed" };
    let file = match found {
        Found::File(file) if matches!(stat.kind(), FileKind::Regular | FileKind::Symlink) => file,
        _ => {
            let mode = stat.perm();
            let comment = format!(
                "{} {action}, mode {mode:04o}, owner {}",
                describe_kind(stat),
                format_owner(stat)
            );
            push_comment(text, path, &comment);
            return Ok(());
        }
    };
    if is_added && (stat.uid, stat.gid) != (0, 0) {
        push_comment(text, path, &format!("owner {}", format_owner(stat)));
    }
    if is_added && stat.mode & 0o7000 != 0 {
        push_comment(text, path, &format!("mode {:04o}", stat.perm()));
    }
    let (from, to) = (quoted_name("a/", path), quoted_name("b/", path));
    let (content, mode) = match stat.kind() {
        FileKind::Symlink => {
            let target = file.loc.readlink();
            let target = target.context("cannot read the symbolic link", path)?;
            (Some(target), 0o120_000)
        }
        _ => (read_text(file, path)?, stat.mode & 0o100_777),
    };
    let sides = match is_added {
        true => ("/dev/null", to.as_str()),
        false => (from.as_str(), "/dev/null"),
    };
    let Some(content) = content else {
        let line = format!("Binary files {} and {} differ\n", sides.0, sides.1);
        push(text, &line);
        return Ok(());
    };
    let word = if is_added { "new" } else { "deleted" };
    push(
        text,
        &format!("diff --git {from} {to}\n{word} file mode {mode:06o}\n"),
    );
    if !content.is_empty() {
        push(text, &format!("--- {}\n+++ {}\n", sides.0, sides.1));
        match is_added {
            true => write_hunks(text, b"", &content),
            false => write_hunks(text, &content, b""),
        }
    }
    Ok(())
}

/// Reads the content of a file; `None` if it is binary, or larger than [`MAX_TEXT_SIZE`].
fn read_text(file: &FileNode, path: &[u8]) -> Result<Option<Vec<u8>>> {
    if file.stat.size > MAX_TEXT_SIZE {
        return Ok(None);
    }
    let fd = open_content(file.data_loc()).context("cannot open the file", path)?;
    let mut content = Vec::new();
    let read = File::from(fd).take(MAX_TEXT_SIZE).read_to_end(&mut content);
    read.context("cannot read", path)?;
    Ok((!content.contains(&0)).then_some(content))
}

/// Writes the hunks that turn `old` into `new`.
fn write_hunks(text: &mut Vec<u8>, old: &[u8], new: &[u8]) {
    let lines = |content: &[u8]| -> Vec<Vec<u8>> {
        let lines = content.split_inclusive(|&byte| byte == b'\n');
        lines.map(<[u8]>::to_vec).collect()
    };
    let (old, new) = (lines(old), lines(new));
    let deadline = Instant::now().checked_add(SEARCH_TIME);
    let ops = capture_diff_slices_deadline(Algorithm::Myers, &old, &new, deadline);
    for hunk in group_diff_ops(ops, CONTEXT_LINES) {
        let (Some(first), Some(last)) = (hunk.first(), hunk.last()) else {
            continue;
        };
        let span = |start: usize, end: usize| {
            let length = end - start;
            // Lines are counted from 1. An empty range is at the line before it.
            format!("{},{length}", if length == 0 { start } else { start + 1 })
        };
        let one = span(first.old_range().start, last.old_range().end);
        let two = span(first.new_range().start, last.new_range().end);
        push(text, &format!("@@ -{one} +{two} @@\n"));
        for op in &hunk {
            write_lines(text, op, &old, &new);
        }
    }
}

/// Writes the lines of one operation of a hunk.
fn write_lines(text: &mut Vec<u8>, op: &DiffOp, old: &[Vec<u8>], new: &[Vec<u8>]) {
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

fn format_owner(stat: &Stat) -> String {
    format!("{}:{}", stat.uid, stat.gid)
}

/// Returns the file type for a comment line.
fn describe_kind(stat: &Stat) -> String {
    let device = |kind: &str| {
        let (major, minor) = (rustix::fs::major(stat.rdev), rustix::fs::minor(stat.rdev));
        format!("{kind} device {major}:{minor}")
    };
    match stat.kind() {
        FileKind::Regular => "file".to_owned(),
        FileKind::Directory => "directory".to_owned(),
        FileKind::Symlink => "symbolic link".to_owned(),
        FileKind::Fifo => "named pipe".to_owned(),
        FileKind::Socket => "socket".to_owned(),
        FileKind::CharDevice => device("character"),
        FileKind::BlockDevice => device("block"),
    }
}

/// Appends a line that patch(1) and git-apply(1) ignore.
fn push_comment(text: &mut Vec<u8>, path: &[u8], comment: &str) {
    push(text, &format!("# {}: {comment}\n", quoted_name("/", path)));
}

fn push(text: &mut Vec<u8>, addition: &str) {
    text.extend_from_slice(addition.as_bytes());
}

/// Returns a path with a prefix as it is written in a patch: quoted and escaped if necessary.
fn quoted_name(prefix: &str, path: &[u8]) -> String {
    let plain = |byte: &u8| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\');
    if path.iter().all(plain) {
        return path.iter().fold(prefix.to_owned(), |mut name, &byte| {
            name.push(char::from(byte));
            name
        });
    }
    let mut name = format!("\"{prefix}");
    for &byte in path {
        match byte {
            b'"' | b'\\' => name.extend(['\\', char::from(byte)]),
            b' '..=b'~' => name.push(char::from(byte)),
            // Writing to a string cannot fail.
            _ => write!(name, "\\{byte:03o}").unwrap_or_default(),
        }
    }
    name.push('"');
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hunks(old: &str, new: &str) -> String {
        let mut text = Vec::new();
        write_hunks(&mut text, old.as_bytes(), new.as_bytes());
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn hunk_headers_count_lines_as_patch_does() {
        assert_eq!(hunks("", "a\n"), "@@ -0,0 +1,1 @@\n+a\n");
        assert_eq!(hunks("a\n", ""), "@@ -1,1 +0,0 @@\n-a\n");
        assert_eq!(hunks("a\n", "a\n"), "");
        assert_eq!(
            hunks("a\nb", "a\nb\n"),
            "@@ -1,2 +1,2 @@\n a\n-b\n\\ No newline at end of file\n+b\n"
        );
        // A carriage return does not end a line.
        assert_eq!(hunks("a\rb\n", "a\rc\n"), "@@ -1,1 +1,1 @@\n-a\rb\n+a\rc\n");
        let long: String = (0..20).map(|n| format!("{n}\n")).collect();
        let other = long.replace("10\n", "ten\n");
        let shown = hunks(&long, &other);
        assert!(shown.starts_with("@@ -8,7 +8,7 @@\n 7\n"), "{shown}");
    }

    #[test]
    fn names_with_special_characters_are_quoted() {
        assert_eq!(quoted_name("a/", b"etc/fstab"), "a/etc/fstab");
        assert_eq!(quoted_name("a/", b"x y"), "\"a/x y\"");
        assert_eq!(quoted_name("a/", b"\"\\\n\xff"), "\"a/\\\"\\\\\\012\\377\"");
    }
}
