//! The path of an archive entry: its validation, and the removal of an existing object at the path.

use std::os::fd::BorrowedFd;

use cowl_layers::error::Errno;
use cowl_layers::name::Name;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::{node, stat};

use crate::tree::error::{Context as _, Result};

/// The use of a path in an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PathRole {
    /// The name of an entry.
    Name,
    /// The target of a hard link.
    LinkTarget,
}

/// A path of an archive, converted to a path in the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TreePath {
    /// The normalized path.
    Same(Vec<u8>),
    /// The normalized path without a part that leads outside, and the text of a note.
    Changed(Vec<u8>, &'static str),
    /// Linux cannot store such a path; the text of a note.
    Unstorable(&'static str),
}

/// Normalizes a path of an archive: no leading slashes, no empty or "." components. The path of the root is empty.
///
/// Like GNU tar, ignores everything up to the last ".." in the target of a hard link, and skips an entry with ".." in
/// its name: without it, the name could be that of another entry.
pub(super) fn convert(path: &[u8], role: PathRole) -> TreePath {
    let (mut normalized, mut change) = (Vec::with_capacity(path.len()), None);
    if path.is_empty() {
        return TreePath::Unstorable("skipped an entry without a name");
    }
    if path.starts_with(b"/") {
        change = Some(match role {
            PathRole::Name => "removed the leading slash of the name",
            PathRole::LinkTarget => "removed the leading slash of the target of the hard link",
        });
    }
    for component in path.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." if role == PathRole::LinkTarget => {
                change = Some("removed the part up to '..' from the target of the hard link");
                normalized.clear();
            }
            b".." => return TreePath::Unstorable("skipped an entry with '..' in its name"),
            name => match Name::new(name) {
                Ok(name) => {
                    if !normalized.is_empty() {
                        normalized.push(b'/');
                    }
                    normalized.extend_from_slice(&name);
                }
                Err(error) => {
                    return TreePath::Unstorable(match error.errno() {
                        Errno::NAMETOOLONG => "skipped an entry with a name of more than 255 bytes",
                        _ => "skipped an entry with a NUL byte in its name",
                    });
                }
            },
        }
    }
    match change {
        Some(change) => TreePath::Changed(normalized, change),
        None => TreePath::Same(normalized),
    }
}

/// The kind of an entry that replaces an existing object.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum NewEntry {
    Directory,
    Other,
}

/// The remainder of an object with the name of a new entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Existing {
    /// Nothing: the entry can be created.
    None,
    /// The directory, because the new entry is one, too.
    Directory,
    /// The directory, because it is not empty and the new entry is of another kind.
    FullDirectory,
}

/// Removes an existing object with the name of a new entry, because a later entry of an archive replaces an earlier
/// one. Directories with content are retained, as by GNU tar.
pub(super) fn remove_existing(
    parent: BorrowedFd<'_>,
    name: &[u8],
    new: NewEntry,
    path: &[u8],
) -> Result<Existing> {
    let found = match stat::stat_at(parent, name) {
        Ok(found) => found,
        Err(error) if error.errno() == Errno::NOENT => return Ok(Existing::None),
        Err(error) => return Err(error).context("cannot read", path),
    };
    if found.kind() != FileKind::Directory {
        return node::unlink(parent, name)
            .context("cannot replace", path)
            .map(|()| Existing::None);
    }
    if new == NewEntry::Directory {
        return Ok(Existing::Directory);
    }
    match node::rmdir(parent, name) {
        Ok(()) => Ok(Existing::None),
        Err(error) if matches!(error.errno(), Errno::NOTEMPTY | Errno::EXIST) => {
            Ok(Existing::FullDirectory)
        }
        Err(error) => Err(error).context("cannot replace", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalizes_paths() {
        for (path, want) in [
            (&b"./a/b"[..], &b"a/b"[..]),
            (b".", b""),
            (b"./", b""),
            (b"a//b/./c/", b"a/b/c"),
            (b"...", b"..."),
            (b"\xff/\n", b"\xff/\n"),
        ] {
            for role in [PathRole::Name, PathRole::LinkTarget] {
                let got = convert(path, role);
                assert_eq!(got, TreePath::Same(want.to_vec()));
            }
        }
    }

    #[test]
    fn paths_that_lead_outside_are_changed_and_unstorable_ones_reported() {
        use PathRole::{LinkTarget, Name};
        let long = [b"a/".as_slice(), &[b'x'; 256]].concat();
        for (path, role, want, note) in [
            (&b"/etc"[..], Name, Some("etc"), "leading slash of the name"),
            (b"///etc//x", Name, Some("etc/x"), "leading slash"),
            (b"/", Name, Some(""), "leading slash"),
            (b"/etc", LinkTarget, Some("etc"), "target of the hard link"),
            (b"a/../../b", LinkTarget, Some("b"), "'..'"),
            (b"/../b", LinkTarget, Some("b"), "'..'"),
            (b"..", LinkTarget, Some(""), "'..'"),
            (b"", Name, None, "without a name"),
            (b"a/../b", Name, None, "'..'"),
            (b"..", Name, None, "'..'"),
            (b"./..", Name, None, "'..'"),
            (b"/..", Name, None, "'..'"),
            (b"a/..", Name, None, "'..'"),
            (b"a\0b", Name, None, "NUL"),
            (&long, Name, None, "255"),
            (&long, LinkTarget, None, "255"),
        ] {
            let (got, text) = match convert(path, role) {
                TreePath::Changed(got, text) => (Some(String::from_utf8(got).unwrap()), text),
                TreePath::Unstorable(text) => (None, text),
                TreePath::Same(_) => panic!("{} was not changed", path.escape_ascii()),
            };
            assert_eq!(got.as_deref(), want);
            assert!(text.contains(note), "{text}");
        }
    }
}
