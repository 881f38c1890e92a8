//! The interpretation of the entries of an archive, and the operations that depend on it.

use std::os::fd::BorrowedFd;

use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;
use cowl_layers::sys::node;
use cowl_layers::sys::stat::{self, FileKind};

use crate::tree::attrs::Attrs;
use crate::tree::create;
use crate::tree::error::{Context as _, ErrorKind, Result, TreeError};
use crate::tree::omissions::{Omissions, SourceOwners, Unsupported};

/// The interpretation of the entries of an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UnpackMode {
    /// A tree of files, unpacked into a layer with markers in this xattr namespace.
    Tree(XattrSpace),
    /// An exported layer with its markers, converted from the first xattr namespace to the second.
    Raw(XattrSpace, XattrSpace),
    /// An image layer, whose whiteouts are file names, unpacked into a layer over others.
    Changeset(XattrSpace),
}

impl UnpackMode {
    /// Returns the xattr namespace of the markers in the new layer.
    pub(super) fn space(self) -> XattrSpace {
        match self {
            Self::Raw(_, space) | Self::Tree(space) | Self::Changeset(space) => space,
        }
    }

    /// Returns the omissions that an import permits.
    pub(super) fn omissions(self, unsupported: Unsupported) -> Omissions {
        let omissions = match self {
            Self::Raw(..) => Omissions::none(),
            Self::Tree(_) | Self::Changeset(_) => Omissions::foreign(unsupported),
        };
        omissions.with_records(self.space(), SourceOwners::Exact)
    }

    /// Creates a device, a fifo or a socket.
    pub(super) fn create_node(
        self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        node: (FileKind, u64),
        attrs: (&Attrs, &mut Omissions),
        path: &[u8],
    ) -> Result<()> {
        match self {
            Self::Tree(space) | Self::Changeset(space) => {
                create::special(parent, name, node, attrs, space, path)
            }
            Self::Raw(..) => create::node(parent, name, node, attrs, path),
        }
    }

    /// Refuses a second entry for an existing object of a raw layer.
    ///
    /// An exported layer has no duplicates, and the memory that is used for each entry must be bounded by the objects
    /// on disk.
    pub(super) fn refuse_duplicate(
        self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
    ) -> Result<()> {
        if !matches!(self, Self::Raw(..)) {
            return Ok(());
        }
        match stat::stat_at(parent, name) {
            Err(error) if error.errno() == Errno::NOENT => Ok(()),
            Err(error) => Err(error).context("cannot read", path),
            Ok(_) => Err(duplicate_entry(path)),
        }
    }

    /// Creates a hard link.
    pub(super) fn create_link(
        self,
        source: BorrowedFd<'_>,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
    ) -> Result<()> {
        match self {
            Self::Tree(space) | Self::Changeset(space) => {
                create::link(source, parent, name, space, path)
            }
            Self::Raw(..) => {
                let linked = node::link_fd(source, parent, name);
                create::created(linked, "cannot create the hard link", path)
            }
        }
    }
}

/// Returns the error for a second entry for an object of an exported layer.
pub(super) fn duplicate_entry(path: &[u8]) -> TreeError {
    let what = "the archive has two entries for the same object of a layer";
    TreeError::new(ErrorKind::Refused, what).at(path)
}
