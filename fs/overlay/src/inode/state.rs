//! Changes of an object's state.

use std::num::NonZeroU64;
use std::sync::Arc;

use super::identity::Identity;
use super::object::{DirState, FileState, InodeState};
use cowl_layers::error::{Error, Result};
use cowl_layers::layer::LayerDir;
use cowl_layers::view::Loc;

impl InodeState {
    /// Records that a directory lost its name.
    pub(crate) fn set_removed(&mut self) {
        if let Self::Dir(dir) = self {
            dir.removed = true;
            dir.alias = None;
        }
    }
}

impl FileState {
    /// Records the number of names that show, as counted while the file was `counted`. A copy-up may have ended
    /// meanwhile: a count from before it would be shown once the copy is frozen by a snapshot, whatever names
    /// were removed since.
    pub(crate) fn note_visible_names(&mut self, counted: Identity, visible: u64) {
        if self.identity == counted {
            self.visible = NonZeroU64::new(visible);
        }
    }

    /// Returns the location of the content.
    pub(crate) fn data_loc(&self) -> &Loc {
        self.data.as_deref().unwrap_or(&self.loc)
    }
}

impl DirState {
    /// Returns the topmost location. A directory always has one.
    pub(crate) fn top(&self) -> Result<&Arc<LayerDir>> {
        self.locs
            .first()
            .ok_or(Error::Damaged("a folder that lies nowhere"))
    }
}
