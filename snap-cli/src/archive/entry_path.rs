//! The path of an archive entry: its validation, and the removal of an existing object at the path.

use std::os::fd::BorrowedFd;

use cowl_layers::error::Errno;
use cowl_layers::name::Name;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::{node, stat};

use crate::tree::error::{Context as _, ErrorKind, Result, TreeError};

/// Returns the normalized form of an archive path: no leading "./", no empty or "." components.
///
/// The path of the root is empty. An absolute path and a path with ".." are refused.
pub(super) fn normalize(path: &[u8]) -> Result<Vec<u8>> {
    let refuse = |what: &str| Err(TreeError::new(ErrorKind::Refused, what).at(path));
    if path.is_empty() {
        return refuse("the archive has an entry without a name");
    }
    if path.starts_with(b"/") {
        return refuse("the archive has an absolute path");
    }
    let mut normalized = Vec::with_capacity(path.len());
    for component in path.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return refuse("the archive has a path with '..'"),
            name => match Name::new(name) {
                Ok(name) => {
                    if !normalized.is_empty() {
                        normalized.push(b'/');
                    }
                    normalized.extend_from_slice(&name);
                }
                Err(error) if error.errno() == Errno::NAMETOOLONG => {
                    return refuse("the archive has a name of more than 255 bytes");
                }
                Err(_) => return refuse("the archive has an invalid file name"),
            },
        }
    }
    Ok(normalized)
}

/// The kind of an entry that replaces an existing object.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum NewEntry {
    Directory,
    Other,
}

/// Removes an existing object with the name of a new entry, because a later entry of an archive replaces an earlier
/// one.
///
/// An existing directory is retained if the new entry is a directory, too: then the result is `true`. A directory that
/// is not empty is not replaced by another kind of entry: that is an error.
pub(super) fn remove_existing(
    parent: BorrowedFd<'_>,
    name: &[u8],
    new: NewEntry,
    path: &[u8],
) -> Result<bool> {
    let found = match stat::stat_at(parent, name) {
        Ok(found) => found,
        Err(error) if error.errno() == Errno::NOENT => return Ok(false),
        Err(error) => return Err(error).context("cannot read", path),
    };
    if found.kind() != FileKind::Directory {
        return node::unlink(parent, name)
            .context("cannot replace", path)
            .map(|()| false);
    }
    if new == NewEntry::Directory {
        return Ok(true);
    }
    match node::rmdir(parent, name) {
        Ok(()) => Ok(false),
        Err(error) if matches!(error.errno(), Errno::NOTEMPTY | Errno::EXIST) => {
            Err(TreeError::new(
                ErrorKind::Refused,
                "the archive replaces a non-empty directory by another kind of file",
            )
            .at(path))
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
            assert_eq!(normalize(path).unwrap(), want);
        }
        for bad in [
            &b""[..],
            b"/etc",
            b"a/../b",
            b"..",
            b"./..",
            b"a\0b",
            &[b'x'; 256],
        ] {
            assert_eq!(normalize(bad).unwrap_err().kind(), ErrorKind::Refused);
        }
    }
}
