//! Where an entry of an archive goes: its path is checked, and what is in its way removed.

use std::os::fd::BorrowedFd;

use cowl_layers::error::Errno;
use cowl_layers::name::Name;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::{node, stat};

use crate::tree::error::{Context as _, ErrorKind, Result, TreeError};

/// A path of an archive in its one clean form: no leading "./", no empty or "." components.
/// The root itself is the empty path.
pub(super) fn clean(path: &[u8]) -> Result<Vec<u8>> {
    let refuse = |what: &str| Err(TreeError::new(ErrorKind::Refused, what).at(path));
    if path.is_empty() {
        return refuse("the archive has an entry without a name");
    }
    if path.starts_with(b"/") {
        return refuse("the archive has an absolute path");
    }
    let mut clean = Vec::with_capacity(path.len());
    for part in path.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return refuse("the archive has a path with '..'"),
            name => match Name::new(name) {
                Ok(name) => {
                    if !clean.is_empty() {
                        clean.push(b'/');
                    }
                    clean.extend_from_slice(&name);
                }
                Err(error) if error.errno() == Errno::NAMETOOLONG => {
                    return refuse("the archive has a name of more than 255 bytes");
                }
                Err(_) => return refuse("the archive has a name that no file can have"),
            },
        }
    }
    Ok(clean)
}

/// The kind of an entry that needs a name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum NewEntry {
    Directory,
    Other,
}

/// Clears the way for an entry: removes what has its name already, as a later entry of an archive
/// replaces an earlier one. A folder stays when the new entry is one as well (then `true`); a folder
/// with something in it is not replaced by anything else.
pub(super) fn make_room(
    parent: BorrowedFd<'_>,
    name: &[u8],
    new: NewEntry,
    path: &[u8],
) -> Result<bool> {
    let found = match stat::stat_at(parent, name) {
        Ok(found) => found,
        Err(error) if error.errno() == Errno::NOENT => return Ok(false),
        Err(error) => return Err(error).context("can't read", path),
    };
    if found.kind() != FileKind::Directory {
        return node::unlink(parent, name)
            .context("can't replace", path)
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
                "the archive replaces a folder that is not empty by something else",
            )
            .at(path))
        }
        Err(error) => Err(error).context("can't replace", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clean_paths() {
        for (path, want) in [
            (&b"./a/b"[..], &b"a/b"[..]),
            (b".", b""),
            (b"./", b""),
            (b"a//b/./c/", b"a/b/c"),
            (b"...", b"..."),
            (b"\xff/\n", b"\xff/\n"),
        ] {
            assert_eq!(clean(path).unwrap(), want);
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
            assert_eq!(clean(bad).unwrap_err().kind(), ErrorKind::Refused);
        }
    }
}
