//! Detection of a stream's content: a tree of files, or a whole container with its snapshots.

use std::io::Read;

use super::bundle::{BundleReader, MANIFEST};
use super::checksum::ChecksumReader;
use super::compress;
use super::member::{EntryKind, Member};
use super::stream::Members;
use crate::tree::error::Result;

/// A stream whose content was detected.
#[derive(Debug)]
pub enum Input<'a> {
    /// A tree of files.
    Tree(TreeArchive<'a>),
    /// A whole container.
    Container(BundleReader<'a>),
}

/// A tar archive, read up to the header of its first entry.
pub struct TreeArchive<'a> {
    pub(super) first: Option<Member>,
    pub(super) members: Members<ChecksumReader<'a>>,
}

impl std::fmt::Debug for TreeArchive<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TreeArchive").finish_non_exhaustive()
    }
}

/// Detects the content of a stream, which is plain or compressed with gzip, zstd or xz.
pub fn open<'a>(input: impl Read + 'a) -> Result<Input<'a>> {
    let compress::Decoded { input, end, rest } = compress::decode(input)?;
    let mut members = Members::new(ChecksumReader::new(input));
    members.set_rest(rest);
    let first = members.next()?;
    let is_manifest = |member: &Member| member.path == MANIFEST && member.kind == EntryKind::File;
    if let Some(first) = first.as_ref().filter(|first| is_manifest(first)) {
        return BundleReader::new(first, members).map(Input::Container);
    }
    // Only archives of whole containers contain checksums.
    members.input().sum = None;
    members.set_end(end);
    Ok(Input::Tree(TreeArchive { first, members }))
}
