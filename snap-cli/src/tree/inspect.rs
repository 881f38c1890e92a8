//! Looking into a state without mounting it: what lies in a folder, and the content of a file. Symbolic
//! links lead where they would lead a program in the container, never outside.

use std::fs::File;

use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::{Found, View};

use super::error::{Context as _, ErrorKind, Result, TreeError};
use super::find::{self, LastLink};
use super::path;
use super::walk::{Step, Walk, open_content};

/// Something that was found.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its path, from the folder that was asked for.
    pub path: Vec<u8>,
    /// What is known of it.
    pub stat: Stat,
    /// Where a symbolic link leads.
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

/// The regular file at `path`, open for reading, and its size.
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
