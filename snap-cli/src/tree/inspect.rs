//! Reading a state without mounting it: listings of directories and the content of files. Symbolic links are resolved
//! as for a program in the container, never outside of it.

use std::fs::File;

use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::{Found, View};

use super::error::{Context as _, ErrorKind, Result, TreeError};
use super::find::{self, LastLink};
use super::path;
use super::walk::{Step, Walk, open_content};

/// An entry of a listing.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The path relative to the listed directory.
    pub path: Vec<u8>,
    /// The attributes.
    pub stat: Stat,
    /// The target of a symbolic link.
    pub target: Option<Vec<u8>>,
}

/// How deep a listing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// The entries of the directory.
    Entries,
    /// Everything below it.
    Recursive,
}

/// Lists the directory at `path`, sorted, each directory before its entries; for another object, the object itself.
/// A link in the last component is followed if `last` says so and it is not dangling.
pub fn list<E: From<TreeError>>(
    view: &View,
    path: &[u8],
    (last, depth): (LastLink, Depth),
    visit: &mut dyn FnMut(Entry) -> Result<(), E>,
) -> Result<(), E> {
    let (real, found) = match find::follow(view, path, last) {
        Err(error) if last == LastLink::Follow && error.kind() == ErrorKind::NotFound => {
            find::follow(view, path, LastLink::Keep)?
        }
        other => other?,
    };
    let Found::Dir(top) = found else {
        let name = path::split(&real).1.to_vec();
        return entry(name, &found, &real)?.map_or(Ok(()), visit);
    };
    let shown = match real.len() {
        0 => 0,
        length => length + 1,
    };
    let mut walk = Walk::new(view, &real);
    walk.enter(top)?;
    while let Some(step) = walk.next()? {
        let Step::Entry(found) = step else {
            continue;
        };
        let path = walk.path().get(shown..).unwrap_or_default().to_vec();
        if let Some(entry) = entry(path, &found, walk.path())? {
            visit(entry)?;
        }
        if let (Depth::Recursive, Found::Dir(dir)) = (depth, found) {
            walk.enter(dir)?;
        }
    }
    Ok(())
}

fn entry(path: Vec<u8>, found: &Found, real: &[u8]) -> Result<Option<Entry>> {
    let (stat, target) = match found {
        Found::Absent | Found::Whiteout => return Ok(None),
        Found::Dir(dir) => (dir.stat, None),
        Found::File(file) if file.stat.kind() == FileKind::Symlink => {
            let target = file.loc.readlink();
            let target = target.context("can't read the symbolic link", real)?;
            (file.stat, Some(target))
        }
        Found::File(file) => (file.stat, None),
    };
    Ok(Some(Entry { path, stat, target }))
}

/// Opens the regular file at `path` for reading. Returns its size too.
pub fn open(view: &View, path: &[u8]) -> Result<(File, u64)> {
    let (real, found) = find::follow(view, path, LastLink::Follow)?;
    let refused = |what: &str| Err(TreeError::new(ErrorKind::Refused, what).at(path));
    match found {
        Found::File(file) if file.stat.kind() == FileKind::Regular => {
            let fd = open_content(file.data_loc()).context("can't open the file", &real)?;
            Ok((fd.into(), file.stat.size))
        }
        Found::Dir(_) => refused("it is a folder"),
        Found::File(_) => refused("it is no regular file, so it has no content"),
        Found::Absent | Found::Whiteout => refused("it is not there"),
    }
}
