//! Fills the tree of a new layer from a tar stream or a directory.
//!
//! The target is an empty directory. After an error it is incomplete, and the caller must remove it. The module does
//! not depend on layers or containers.

use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::format::XattrSpace;
use cowl_layers::view::View;

use super::checksum::{ChecksumReader, hex};
use super::compress;
use super::copy_dir;
use super::image_source::Digest;
use super::input::{self, Input, TreeArchive};
use super::report::TransferReport;
use super::stream::{Members, UnusualEnd};
use super::unpack::Unpacker;
use super::unpack_mode::UnpackMode;
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Result, TreeError};
use crate::tree::omissions::{Omissions, SourceOwners, Unsupported};

/// Fills `target` from `source`: copies a directory, and unpacks anything else as a tar archive.
pub fn from_path(
    source: &Path,
    target: &Path,
    space: XattrSpace,
    unsupported: Unsupported,
    progress: OnProgress<'_>,
) -> Result<TransferReport> {
    let name = source.as_os_str().as_bytes();
    let file = File::open(source).context("cannot open the source", name)?;
    let kind = file
        .metadata()
        .context("cannot read the source", name)?
        .file_type();
    if kind.is_dir() {
        let omissions = Omissions::foreign(unsupported).with_records(space, SourceOwners::Mapped);
        return copy_dir::copy(source, target, Some(space), omissions, progress);
    }
    from_stream(file, target, space, unsupported, progress)
}

/// Copies the directory `source` into the empty directory `target`, without any conversion of xattrs.
///
/// For directories that are not layers, and for layers of other programs.
pub fn copy_plain(
    source: &Path,
    target: &Path,
    progress: OnProgress<'_>,
) -> Result<TransferReport> {
    copy_dir::copy(source, target, None, Omissions::none(), progress)
}

/// Unpacks a tar stream, which is plain or compressed with gzip, zstd or xz, into `target`.
pub fn from_stream(
    input: impl Read,
    target: &Path,
    space: XattrSpace,
    unsupported: Unsupported,
    progress: OnProgress<'_>,
) -> Result<TransferReport> {
    match input::open(input).map_err(with_hint)? {
        Input::Tree(tree) => from_archive(tree, target, space, unsupported, progress),
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
    unsupported: Unsupported,
    progress: OnProgress<'_>,
) -> Result<TransferReport> {
    let mut unpacker = Unpacker::new(target, UnpackMode::Tree(space), unsupported, progress)?;
    let TreeArchive { first, mut members } = tree;
    let mut next = first;
    while let Some(member) = next {
        (unpacker.unpack_entry(member, &mut members)).map_err(with_hint)?;
        next = members.next().map_err(with_hint)?;
    }
    let mut imported = unpacker.finish()?.0;
    if let Some(end) = members.unusual_end() {
        let why = match end {
            UnusualEnd::Followed => {
                "another archive follows this one and was ignored (see tar --concatenate)"
            }
            UnusualEnd::Missing => "the end marker is missing, but the compressed file is complete",
        };
        imported.notes.add(why, b"archive");
    }
    Ok(imported)
}

/// Adds a hint to the error of a damaged archive of a tree.
fn with_hint(error: TreeError) -> TreeError {
    match error.kind() {
        ErrorKind::Damaged => error.hint(
            "download or create the archive again; for the entries that tar can read from it, \
             unpack it with tar and pass the directory: --from DIR",
        ),
        _ => error,
    }
}

/// Unpacks a layer of an image into `target`, the empty tree of a layer over the state `below`, with whiteouts and opaque
/// markers of an overlay. Returns the digest of the uncompressed layer as well.
pub fn image_layer(
    input: impl Read,
    target: &Path,
    (below, space): (Option<View>, XattrSpace),
    unsupported: Unsupported,
    progress: OnProgress<'_>,
) -> Result<(TransferReport, Digest)> {
    let compress::Decoded { input, end, .. } = compress::decode(input)?;
    let mut members = Members::new(ChecksumReader::new(input));
    members.set_end(end);
    let mode = UnpackMode::Changeset(space);
    let mut unpacker = Unpacker::new(target, mode, unsupported, progress)?.over(below)?;
    let mut next = match members.next() {
        // Not every writer adds a block of zeros to a layer without changes.
        Err(error) if error.kind() == ErrorKind::Empty => None,
        other => other?,
    };
    while let Some(member) = next {
        unpacker.unpack_entry(member, &mut members)?;
        next = members.next()?;
    }
    let rest = members.input();
    std::io::copy(rest, &mut std::io::sink())
        .map_err(|error| TreeError::io("cannot read the layer", error))?;
    let sum = rest.sum.take().map(hex).unwrap_or_default();
    let sum = Digest::from_hex(&sum);
    Ok((unpacker.finish()?.0, sum))
}
