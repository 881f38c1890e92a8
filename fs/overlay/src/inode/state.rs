//! Access to the state of an inode.

use std::num::NonZeroU64;
use std::sync::Arc;

use super::identity::Identity;
use super::object::{DirState, FileState, Inode, InodeState};
use cowl_layers::error::{Error, Result};
use cowl_layers::layer::{Layer, LayerDir};
use cowl_layers::view::Loc;

/// Whether an object, or its content, is in a layer for which `is` returns true.
pub(crate) fn is_in_any(inode: &Inode, is: impl Fn(&Layer) -> bool) -> bool {
    match &*inode.state.read() {
        InodeState::Dir(dir) => dir.locs.iter().any(|loc| is(loc.layer())),
        InodeState::File(file) => {
            is(file.loc.dir.layer()) || file.data.as_ref().is_some_and(|data| is(data.dir.layer()))
        }
    }
}

/// Whether `is` returns true for the state of a file, which is not copied; `false` for a directory.
pub(crate) fn is_file_where(inode: &Inode, is: impl Fn(&FileState) -> bool) -> bool {
    match &*inode.state.read() {
        InodeState::Dir(_) => false,
        InodeState::File(file) => is(file),
    }
}

impl InodeState {
    /// Whether the object has no name any more.
    pub(super) fn is_removed(&self) -> bool {
        match self {
            Self::Dir(dir) => dir.removed,
            Self::File(file) => file.orphan,
        }
    }

    /// Records that a directory was removed. Has no effect on an object of any other type.
    pub(crate) fn set_removed(&mut self) {
        if let Self::Dir(dir) = self {
            dir.removed = true;
            dir.alias = None;
        }
    }
}

impl FileState {
    /// Caches the number of visible names, which was counted while the file had the identity `counted`.
    ///
    /// Discards the number if the file was copied up since. Otherwise the stale number would be reported after a
    /// snapshot freezes the copy, even if names were removed in between.
    pub(crate) fn note_visible_names(&mut self, counted: Identity, visible: u64) {
        if self.identity == counted {
            self.visible = NonZeroU64::new(visible);
        }
    }

    /// Returns the location of the content on disk.
    pub(crate) fn data_loc(&self) -> &Loc {
        self.data.as_deref().unwrap_or(&self.loc)
    }
}

impl DirState {
    /// Returns the topmost location. Every directory has one.
    pub(crate) fn top(&self) -> Result<&Arc<LayerDir>> {
        self.locs
            .first()
            .ok_or(Error::Damaged("a directory that is in no layer"))
    }
}
