//! What a stream holds: a tree of files, or a whole container with its snapshots.

use std::io::Read;

use super::bundle::{MANIFEST, Whole};
use super::checksum::ChecksumReader;
use super::compress;
use super::member::{Member, What};
use super::stream::Members;
use crate::tree::error::Result;

/// A stream that was looked into.
#[derive(Debug)]
pub enum Input<'a> {
    /// A tree of files.
    Tree(Tree<'a>),
    /// A whole container.
    Whole(Whole<'a>),
}

/// A tar archive, read up to its first entry's header.
pub struct Tree<'a> {
    pub(super) first: Option<Member>,
    pub(super) members: Members<ChecksumReader<'a>>,
}

impl std::fmt::Debug for Tree<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tree").finish_non_exhaustive()
    }
}

/// Looks into a stream, plain or compressed with gzip, zstd or xz.
pub fn open<'a>(input: impl Read + 'a) -> Result<Input<'a>> {
    let mut members = Members::new(ChecksumReader::new(compress::decode(input)?));
    let first = members.next()?;
    let whole = |member: &Member| member.path == MANIFEST && member.what == What::File;
    if let Some(first) = first.as_ref().filter(|first| whole(first)) {
        return Whole::new(first, members).map(Input::Whole);
    }
    // Only archives of whole containers hold checksums.
    members.input().sum = None;
    Ok(Input::Tree(Tree { first, members }))
}
