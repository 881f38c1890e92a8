//! Lists of inode numbers: the objects of a layer whose numbers other layers have borrowed, with their paths.
//!
//! A bundle contains the list of each layer that it refers to without containing it. The reader finds the objects in its
//! own copy of the layer, where they have other numbers.
//!
//! A list consists of the layer's id, and for each object its inode number, the length of its path, and the path. Numbers
//! are little endian, of 64, 64 and 32 bits.

use std::collections::{HashMap, HashSet};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::error::Errno;
use cowl_layers::format::InodeNumberXattr;
use cowl_layers::layer::Layer;
use cowl_layers::sys::{dir, stat};

use super::entry_path::{self, PathRole, TreePath};
use super::limits;
use crate::tree::dir_cursor::DirCursor;
use crate::tree::error::{Context as _, ErrorKind, Result, TreeError};
use crate::tree::path;
use crate::tree::walk::{self, Item};

/// The new numbers of inodes, by the id of their layer and their number when it was exported.
pub(super) type LentNumbers = HashMap<(u64, u64), InodeNumberXattr>;

/// Returns the list of the objects of a layer that have these inode numbers, as if the layer had the id `id`.
///
/// Objects beyond the limits of a list are omitted: references to their numbers are dropped by the reader.
pub(super) fn list(layer: &Layer, id: u64, numbers: &HashSet<u64>) -> Result<Vec<u8>> {
    let mut data = id.to_le_bytes().to_vec();
    if numbers.is_empty() {
        return Ok(data);
    }
    let mut left = numbers.clone();
    walk::visit_dir(layer.path(), &mut |item: &Item<'_>| {
        let length = item.path.len();
        let fits = data.len() + length + 12 <= limits::NUMBERS && length as u64 <= limits::PATH;
        if fits && left.remove(&item.stat.ino) {
            data.extend_from_slice(&item.stat.ino.to_le_bytes());
            data.extend_from_slice(&u32::try_from(length).unwrap_or_default().to_le_bytes());
            data.extend_from_slice(item.path);
        }
        Ok(())
    })?;
    Ok(data)
}

/// Reads a list, and adds the numbers that the objects have in the layer at `tree`.
pub(super) fn resolve(
    mut data: &[u8],
    tree: &Path,
    layer: &Layer,
    lent: &mut LentNumbers,
) -> Result<()> {
    let damaged = || {
        TreeError::new(
            ErrorKind::Damaged,
            "the archive has an invalid list of numbers",
        )
    };
    let exported = u64::from_le_bytes(*take(&mut data).ok_or_else(damaged)?);
    let root =
        dir::open_root(tree).context("cannot open the layer", tree.as_os_str().as_bytes())?;
    let mut dirs = DirCursor::new(root);
    while !data.is_empty() {
        let ino = u64::from_le_bytes(*take(&mut data).ok_or_else(damaged)?);
        let length = u32::from_le_bytes(*take(&mut data).ok_or_else(damaged)?) as usize;
        let (path, rest) = data.split_at_checked(length).ok_or_else(damaged)?;
        data = rest;
        if lent.len() >= limits::LENT_NUMBERS {
            let what = "the archive lists too many inode numbers";
            return Err(limits::exceeded(what, path));
        }
        if let Some(number) = number_at(&mut dirs, path)? {
            let mark = InodeNumberXattr {
                layer: layer.id(),
                ino: number,
            };
            lent.insert((exported, ino), mark);
        }
    }
    Ok(())
}

fn take<'d, const N: usize>(data: &mut &'d [u8]) -> Option<&'d [u8; N]> {
    let (first, rest) = data.split_first_chunk()?;
    *data = rest;
    Some(first)
}

/// Returns the inode number of the object at a path of an archive; `None` if there is none.
fn number_at(dirs: &mut DirCursor, raw: &[u8]) -> Result<Option<u64>> {
    let path = match raw {
        b"" => Vec::new(),
        raw => match entry_path::convert(raw, PathRole::Name) {
            TreePath::Same(path) if path == raw => path,
            TreePath::Same(_) | TreePath::Changed(..) | TreePath::Unstorable(_) => {
                let what = "the archive has an invalid path in a list of numbers";
                return Err(TreeError::new(ErrorKind::Refused, what).at(raw));
            }
        },
    };
    let (parent, name) = path::split(&path);
    if dirs.reach(parent)?.is_some() {
        return Ok(None);
    }
    let found = match name {
        b"" => stat::stat_fd(dirs.here()),
        name => stat::stat_at(dirs.here(), name),
    };
    match found {
        Ok(found) => Ok(Some(found.ino)),
        Err(error) if error.errno() == Errno::NOENT => Ok(None),
        Err(error) => Err(error).context("cannot read", &path),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt as _;

    use cowl_layers::format::XattrSpace;

    use super::*;

    fn open(path: &Path) -> std::sync::Arc<Layer> {
        Layer::open(path, XattrSpace::User).unwrap()
    }

    #[test]
    fn numbers_are_found_in_another_copy_of_the_layer() {
        let dir = tempfile::tempdir().unwrap();
        let [old, new] = ["old", "new"].map(|name| dir.path().join(name));
        for tree in [&old, &new] {
            fs::create_dir_all(tree.join("a/b")).unwrap();
            fs::write(tree.join("a/b/f"), b"").unwrap();
            fs::write(tree.join("g"), b"").unwrap();
        }
        let ino = |tree: &Path, path: &str| fs::symlink_metadata(tree.join(path)).unwrap().ino();
        let lent = ["", "a/b", "a/b/f", "g"];
        let numbers = lent.map(|path| ino(&old, path)).into();
        let data = list(&open(&old), 7, &numbers).unwrap();
        fs::remove_file(new.join("g")).unwrap();
        let mut found = LentNumbers::new();
        resolve(&data, &new, &open(&new), &mut found).unwrap();
        assert_eq!(found.len(), 3);
        for path in ["", "a/b", "a/b/f"] {
            let mark = found[&(7, ino(&old, path))];
            assert_eq!(
                (mark.layer, mark.ino),
                (open(&new).id(), ino(&new, path)),
                "{path}"
            );
        }
    }

    #[test]
    fn lists_do_not_lead_out_of_the_layer() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        std::os::unix::fs::symlink("/etc", tree.join("link")).unwrap();
        let entry = |path: &[u8]| {
            let length = u32::try_from(path.len()).unwrap();
            [
                &1_u64.to_le_bytes()[..],
                &2_u64.to_le_bytes(),
                &length.to_le_bytes(),
                path,
            ]
            .concat()
        };
        let read = |data: &[u8]| {
            let mut lent = LentNumbers::new();
            resolve(data, &tree, &open(&tree), &mut lent).map(|()| lent.len())
        };
        for path in [
            &b"../tree"[..],
            b"/etc",
            b"a//b",
            b"./link",
            b"a/../link",
            b"a\0b",
        ] {
            assert_eq!(read(&entry(path)).unwrap_err().kind(), ErrorKind::Refused);
        }
        assert_eq!(read(&entry(b"link/passwd")).unwrap(), 0);
        assert_eq!(read(&entry(b"link")).unwrap(), 1);
        let whole = entry(b"link");
        for cut in (1..whole.len()).filter(|cut| *cut != 8) {
            assert_eq!(
                read(&whole[..cut]).unwrap_err().kind(),
                ErrorKind::Damaged,
                "{cut}"
            );
        }
    }
}
