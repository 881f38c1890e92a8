//! Reads the markers of fuse-overlayfs and of container image layers.
//!
//! fuse-overlayfs uses them if it can neither create devices nor set trusted xattrs: `.wh.NAME` hides NAME, and
//! `.wh..wh..opq` or an xattr makes a directory opaque. They are read only if the mount option requests it, because
//! in other directories these are ordinary names.

use std::os::fd::{AsFd, BorrowedFd};

use super::{Layer, LayerDir, Upper};
use crate::error::Result;
use crate::format::OPAQUE;
use crate::format::foreign::{OPAQUE_NAME, OPAQUE_XATTR, hidden_name, is_marker, whiteout_name};
use crate::sys;
use crate::sys::dir::RawEntry;
use crate::sys::stat::{FileKind, Stat};

/// Returns the attributes of the whiteout `.wh.NAME` in `dir`, if it exists.
pub(super) fn stat_whiteout(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Stat>> {
    match whiteout_name(name) {
        Some(whiteout) => stat_if_present(dir, &whiteout),
        None => Ok(None),
    }
}

/// Whether the directory `name` in `dir` is opaque.
pub(super) fn is_opaque(dir: &LayerDir, name: &[u8]) -> Result<bool> {
    let fd = dir.fd()?;
    let fd = (*fd).as_fd();
    if dir.may_have_foreign_markers() && stat_whiteout(fd, name)?.is_some() {
        return Ok(true);
    }
    has_opaque_marker(sys::dir::open_dir(fd, name)?.as_fd())
}

/// Whether a directory has an opaque marker of its own.
fn has_opaque_marker(dir: BorrowedFd<'_>) -> Result<bool> {
    let xattr = sys::xattr::get(dir, OPAQUE_XATTR)?;
    Ok(xattr.is_some_and(|value| value == b"y") || stat_if_present(dir, OPAQUE_NAME)?.is_some())
}

/// Removes the markers from a listing, and returns the names that they hide.
pub(super) fn remove_markers(names: &mut Vec<RawEntry>) -> Vec<Box<[u8]>> {
    let markers: Vec<_> = names
        .extract_if(.., |entry| is_marker(&entry.name))
        .collect();
    markers
        .iter()
        .filter_map(|marker| hidden_name(&marker.name))
        .filter(|hidden| !names.iter().any(|entry| *entry.name == **hidden))
        .map(Into::into)
        .collect()
}

impl Layer {
    /// Whether the layer's root directory is opaque, so that the layers below are not part of the stack.
    pub fn hides_layers_below(&self) -> Result<bool> {
        Ok(self.is_foreign()
            && has_opaque_marker(sys::dir::open_dir(self.root_fd(), b".")?.as_fd())?)
    }
}

impl Upper {
    /// Replaces a foreign whiteout of `name` in `dir` with one in overlayfs's format.
    ///
    /// To be called before `name` is changed: the steps of removals and renames assume that a whiteout is at the name
    /// that it hides.
    pub fn settle(&self, dir: &LayerDir, name: &[u8]) -> Result<()> {
        let Some(whiteout) = whiteout_name(name) else {
            return Ok(());
        };
        let fd = dir.fd()?;
        let fd = (*fd).as_fd();
        if stat_if_present(fd, &whiteout)?.is_none() {
            return Ok(());
        }
        match stat_if_present(fd, name)? {
            None => self.whiteout_new(fd, name)?,
            // Beside a directory, the whiteout makes it opaque. It would also apply to the next directory of that
            // name, so it is replaced with an xattr on this one.
            Some(stat) if stat.kind() == FileKind::Directory => {
                let inner = sys::dir::open_path(fd, name)?;
                let opaque = self.layer.space().opaque().as_bytes();
                sys::xattr::set(inner.as_fd(), opaque, OPAQUE)?;
            }
            Some(_) => {}
        }
        sys::remove::remove_tree(fd, &whiteout)
    }
}

fn stat_if_present(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Stat>> {
    match sys::stat::stat_at(dir, name) {
        Ok(stat) => Ok(Some(stat)),
        Err(error) if error.is_absent() => Ok(None),
        Err(error) => Err(error),
    }
}
