//! Filling a new layer's tree from outside: a tar stream, or a folder of this machine.
//!
//! The target is an empty folder. On an error it is left half filled: whoever made it removes it.
//! Nothing here knows what a layer or a container is.

use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::format::XattrSpace;

use super::copy_dir;
use super::input::{self, Input, Tree};
use super::report::Report;
use super::unpack::{How, Unpack};
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Result, TreeError};

/// Fills `target` from `source`: a folder is copied, anything else is read as a tar archive.
pub fn path(
    source: &Path,
    target: &Path,
    space: XattrSpace,
    progress: OnProgress<'_>,
) -> Result<Report> {
    let name = source.as_os_str().as_bytes();
    let file = File::open(source).context("can't open the source", name)?;
    let kind = file
        .metadata()
        .context("can't read the source", name)?
        .file_type();
    if kind.is_dir() {
        return copy_dir::copy(source, target, Some(space), progress);
    }
    tar(file, target, space, progress)
}

/// Makes the empty folder `target` a copy of the folder `source`, as it is: for folders that are no layers,
/// and those of other programs that are.
pub fn plain(source: &Path, target: &Path, progress: OnProgress<'_>) -> Result<Report> {
    copy_dir::copy(source, target, None, progress)
}

/// Fills `target` from a tar stream, plain or compressed with gzip, zstd or xz.
pub fn tar(
    input: impl Read,
    target: &Path,
    space: XattrSpace,
    progress: OnProgress<'_>,
) -> Result<Report> {
    match input::open(input)? {
        Input::Tree(tree) => opened(tree, target, space, progress),
        Input::Whole(_) => Err(TreeError::new(
            ErrorKind::WholeContainer,
            "the archive is no tree of files, but a whole container with its snapshots",
        )),
    }
}

/// The same from a stream whose kind was looked at already.
pub fn opened(
    tree: Tree<'_>,
    target: &Path,
    space: XattrSpace,
    progress: OnProgress<'_>,
) -> Result<Report> {
    let mut unpack = Unpack::new(target, How::Shown(space), progress)?;
    let Tree { first, mut members } = tree;
    let mut next = first;
    while let Some(member) = next {
        unpack.entry(member, &mut members)?;
        next = members.next()?;
    }
    let mut imported = unpack.finish()?.0;
    if members.is_followed() {
        let why =
            "another archive follows the end of this one, and was not read (see tar --concatenate)";
        imported.notes.push((b"archive".to_vec(), why));
    }
    Ok(imported)
}

/// Changes the tree in `target`, the layer of a store with this space, as a layer of an image says.
pub fn changes(
    input: impl Read,
    target: &Path,
    space: XattrSpace,
    progress: OnProgress<'_>,
) -> Result<Report> {
    let Input::Tree(Tree { first, mut members }) = input::open(input)? else {
        let what = "a layer of an image is a whole container";
        return Err(TreeError::new(ErrorKind::WholeContainer, what));
    };
    let mut unpack = Unpack::new(target, How::Changes(space), progress)?;
    let mut next = first;
    while let Some(member) = next {
        unpack.entry(member, &mut members)?;
        next = members.next()?;
    }
    Ok(unpack.finish()?.0)
}
