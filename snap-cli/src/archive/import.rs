//! Fills the tree of a new layer from a tar stream or a directory.
//!
//! The target is an empty directory. After an error it is incomplete, and the caller must remove it. The module does
//! not depend on layers or containers.

use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::format::XattrSpace;

use super::copy_dir;
use super::input::{self, Input, TreeArchive};
use super::report::TransferReport;
use super::unpack::{UnpackMode, Unpacker};
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Result, TreeError};

/// Fills `target` from `source`: copies a directory, and unpacks anything else as a tar archive.
pub fn from_path(
    source: &Path,
    target: &Path,
    space: XattrSpace,
    progress: OnProgress<'_>,
) -> Result<TransferReport> {
    let name = source.as_os_str().as_bytes();
    let file = File::open(source).context("cannot open the source", name)?;
    let kind = file
        .metadata()
        .context("cannot read the source", name)?
        .file_type();
    if kind.is_dir() {
        return copy_dir::copy(source, target, Some(space), progress);
    }
    from_stream(file, target, space, progress)
}

/// Copies the directory `source` into the empty directory `target`, without any conversion of xattrs.
///
/// For directories that are not layers, and for layers of other programs.
pub fn copy_plain(
    source: &Path,
    target: &Path,
    progress: OnProgress<'_>,
) -> Result<TransferReport> {
    copy_dir::copy(source, target, None, progress)
}

/// Unpacks a tar stream, which is plain or compressed with gzip, zstd or xz, into `target`.
pub fn from_stream(
    input: impl Read,
    target: &Path,
    space: XattrSpace,
    progress: OnProgress<'_>,
) -> Result<TransferReport> {
    match input::open(input)? {
        Input::Tree(tree) => from_archive(tree, target, space, progress),
        Input::Container(_) => Err(TreeError::new(
            ErrorKind::WholeContainer,
            "the archive is not a tree of files but a whole container with its snapshots",
        )),
    }
}

/// Unpacks a tar archive whose content was detected by [`input::open`] into `target`.
pub fn from_archive(
    tree: TreeArchive<'_>,
    target: &Path,
    space: XattrSpace,
    progress: OnProgress<'_>,
) -> Result<TransferReport> {
    let mut unpacker = Unpacker::new(target, UnpackMode::Tree(space), progress)?;
    let TreeArchive { first, mut members } = tree;
    let mut next = first;
    while let Some(member) = next {
        unpacker.unpack_entry(member, &mut members)?;
        next = members.next()?;
    }
    let mut imported = unpacker.finish()?.0;
    if members.is_followed() {
        let why = "another archive follows this one and was ignored (see tar --concatenate)";
        imported.notes.push((b"archive".to_vec(), why));
    }
    Ok(imported)
}

/// Applies a layer of an image to the tree in `target`, which is a layer in a store with this xattr namespace.
pub fn apply_changeset(
    input: impl Read,
    target: &Path,
    space: XattrSpace,
    progress: OnProgress<'_>,
) -> Result<TransferReport> {
    let Input::Tree(TreeArchive { first, mut members }) = input::open(input)? else {
        let what = "a layer of the image is an archive of a whole container";
        return Err(TreeError::new(ErrorKind::WholeContainer, what));
    };
    let mut unpacker = Unpacker::new(target, UnpackMode::Changeset(space), progress)?;
    let mut next = first;
    while let Some(member) = next {
        unpacker.unpack_entry(member, &mut members)?;
        next = members.next()?;
    }
    Ok(unpacker.finish()?.0)
}
