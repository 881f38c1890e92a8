//! What fuse-overlayfs leaves in layers where it may neither make devices nor set trusted attributes,
//! and what tar layers hold: `.wh.NAME` hides NAME, `.wh..wh..opq` and an attribute make a folder opaque.
//! Read only where the mount is told to: on a plain folder these are ordinary names.

use std::os::fd::{AsFd, BorrowedFd};

use super::{LayerDir, Upper};
use crate::error::Result;
use crate::format::OPAQUE;
use crate::format::foreign::{OPAQUE_ATTRIBUTE, OPAQUE_NAME, hidden_name, is_mark, whiteout_name};
use crate::sys;
use crate::sys::dir::RawEntry;
use crate::sys::stat::{FileKind, Stat};

/// The name beside `name` that hides it in the layers below, if the layer's folder `dir` has it.
pub(super) fn whiteout_of(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Stat>> {
    match whiteout_name(name) {
        Some(mark) => there(dir, &mark),
        None => Ok(None),
    }
}

/// Whether the folder `name` in `dir` hides what lies below it.
pub(super) fn is_opaque(dir: BorrowedFd<'_>, name: &[u8]) -> Result<bool> {
    let attribute = sys::xattr::get_at(dir, name, OPAQUE_ATTRIBUTE)?;
    if attribute.is_some_and(|value| value == b"y") || whiteout_of(dir, name)?.is_some() {
        return Ok(true);
    }
    let inner = sys::dir::open_dir(dir, name)?;
    Ok(there(inner.as_fd(), OPAQUE_NAME)?.is_some())
}

/// Takes the marks out of a listing, and returns the names that they hide.
pub(super) fn take_marks(names: &mut Vec<RawEntry>) -> Vec<Box<[u8]>> {
    let marks: Vec<_> = names.extract_if(.., |entry| is_mark(&entry.name)).collect();
    marks
        .iter()
        .filter_map(|mark| hidden_name(&mark.name))
        .filter(|hidden| !names.iter().any(|entry| *entry.name == **hidden))
        .map(Into::into)
        .collect()
}

impl Upper {
    /// Puts a whiteout of our own in the place of a foreign one, before a change of `name` in `dir`: our
    /// plans are made for whiteouts that stand where the name stands.
    pub fn settle(&self, dir: &LayerDir, name: &[u8]) -> Result<()> {
        let Some(mark) = whiteout_name(name) else {
            return Ok(());
        };
        let fd = dir.fd()?;
        let fd = (*fd).as_fd();
        if there(fd, &mark)?.is_none() {
            return Ok(());
        }
        match there(fd, name)? {
            None => self.whiteout_new(fd, name)?,
            // The mark says that this folder is opaque, and would say it of the next one with its name.
            Some(stat) if stat.kind() == FileKind::Directory => {
                let folder = sys::dir::open_path(fd, name)?;
                let opaque = self.layer.space().opaque().as_bytes();
                sys::xattr::set(folder.as_fd(), opaque, OPAQUE)?;
            }
            Some(_) => {}
        }
        sys::remove::remove_tree(fd, &mark)
    }
}

fn there(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Stat>> {
    match sys::stat::stat_at(dir, name) {
        Ok(stat) => Ok(Some(stat)),
        Err(error) if error.is_absent() => Ok(None),
        Err(error) => Err(error),
    }
}
