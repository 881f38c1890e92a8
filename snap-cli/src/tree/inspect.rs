//! Directory listings and file contents of a state that is not mounted.
//!
//! Symbolic links are resolved as for a program in the container, never outside of it.

use std::fs::File;

use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::{Found, View};

use super::error::{Context as _, ErrorKind, Result, TreeError};
use super::find::{self, LastLink};
use super::path;
use super::walk::{Walk, WalkStep, open_content};

/// An entry of a listing.
#[derive(Clone, Debug)]
pub struct ListedEntry {
    /// The path relative to the listed directory.
    pub path: Vec<u8>,
    /// The attributes.
    pub stat: Stat,
    /// The target of a symbolic link.
    pub target: Option<Vec<u8>>,
}

/// The depth of a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// The entries of the directory.
    Entries,
    /// Everything below it.
    Recursive,
}

/// Lists the directory at `path`, sorted, each directory before its entries; lists another object itself.
///
/// A symbolic link in the last component is followed if `last` is [`LastLink::Follow`] and the link is not dangling.
pub fn list<E: From<TreeError>>(
    view: &View,
    path: &[u8],
    (last, depth): (LastLink, Depth),
    visit: &mut dyn FnMut(ListedEntry) -> Result<(), E>,
) -> Result<(), E> {
    let (real, found) = match find::resolve(view, path, last) {
        Err(error) if last == LastLink::Follow && error.kind() == ErrorKind::NotFound => {
            find::resolve(view, path, LastLink::NoFollow)?
        }
        other => other?,
    };
    let Found::Dir(top) = found else {
        let name = path::split(&real).1.to_vec();
        return entry(name, &found, &real)?.map_or(Ok(()), visit);
    };
    let prefix = match real.len() {
        0 => 0,
        length => length + 1,
    };
    let mut walk = Walk::new(view, &real);
    walk.enter(top)?;
    while let Some(step) = walk.next()? {
        let WalkStep::Entry(found) = step else {
            continue;
        };
        let path = walk.path().get(prefix..).unwrap_or_default().to_vec();
        if let Some(entry) = entry(path, &found, walk.path())? {
            visit(entry)?;
        }
        if let (Depth::Recursive, Found::Dir(dir)) = (depth, found) {
            walk.enter(dir)?;
        }
    }
    Ok(())
}

/// Creates the entry of an object; `None` if there is no object. `real` is its path in the state, for messages.
fn entry(path: Vec<u8>, found: &Found, real: &[u8]) -> Result<Option<ListedEntry>> {
    let (stat, target) = match found {
        Found::Absent | Found::Whiteout => return Ok(None),
        Found::Dir(dir) => (dir.stat, None),
        Found::File(file) if file.stat.kind() == FileKind::Symlink => {
            let target = file.loc.readlink();
            let target = target.context("cannot read the symbolic link", real)?;
            (file.stat, Some(target))
        }
        Found::File(file) => (file.stat, None),
    };
    Ok(Some(ListedEntry { path, stat, target }))
}

/// Opens the regular file at `path` for reading, and returns it with its size.
pub fn open(view: &View, path: &[u8]) -> Result<(File, u64)> {
    let (real, found) = find::resolve(view, path, LastLink::Follow)?;
    let refused = |message: &str| Err(TreeError::new(ErrorKind::Refused, message).at(path));
    match found {
        Found::File(file) if file.stat.kind() == FileKind::Regular => {
            let fd = open_content(file.data_loc()).context("cannot open the file", &real)?;
            Ok((fd.into(), file.stat.size))
        }
        Found::Dir(_) => refused("is a directory"),
        Found::File(_) => refused("is not a regular file"),
        Found::Absent | Found::Whiteout => refused("there is no such path"),
    }
}
