//! The layers of the moment.

use std::sync::Arc;

use crate::inode::{DirState, FileState};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::{Layer, LayerDir, Upper};
use cowl_layers::view::View;

/// The merged view and the layer that is written.
#[derive(Debug)]
pub(crate) struct Stack {
    view: View,
    upper: Option<Arc<Upper>>,
}

impl Stack {
    /// A view whose topmost layer is `upper`, where there is one.
    pub(crate) fn new(view: View, upper: Option<Arc<Upper>>) -> Self {
        Self { view, upper }
    }

    pub(crate) fn view(&self) -> &View {
        &self.view
    }

    /// Puts data-only layers below, topmost first.
    pub(crate) fn add_data_layers(&mut self, data: Vec<Arc<Layer>>) {
        self.view = self.view.clone().with_data_layers(data);
    }

    /// Returns the layer that is written; EROFS without one.
    pub(crate) fn upper(&self) -> Result<&Arc<Upper>> {
        self.upper.as_ref().ok_or(Error::Errno(Errno::ROFS))
    }

    /// Returns the layer that is written, where there is one.
    pub(crate) fn writable(&self) -> Option<&Arc<Upper>> {
        self.upper.as_ref()
    }

    /// Releases the upper: nothing can be written from here on.
    pub(crate) fn release_upper(&mut self) {
        self.upper = None;
    }

    /// Whether this is the layer that is written.
    pub(crate) fn is_upper(&self, layer: &Arc<Layer>) -> bool {
        let upper = self.upper.as_ref();
        upper.is_some_and(|upper| Arc::ptr_eq(&upper.layer, layer))
    }

    /// Returns a directory's location in the upper, where it has one.
    pub(crate) fn upper_dir<'d>(&self, dir: &'d DirState) -> Option<&'d Arc<LayerDir>> {
        dir.locs.first().filter(|loc| self.is_upper(loc.layer()))
    }

    /// Whether a file lies in the upper.
    pub(crate) fn is_in_upper(&self, file: &FileState) -> bool {
        self.is_upper(file.loc.dir.layer())
    }

    /// Returns those of a directory's locations that are not in the upper.
    pub(crate) fn below_upper<'d>(&self, locs: &'d [Arc<LayerDir>]) -> &'d [Arc<LayerDir>] {
        match locs {
            [first, below @ ..] if self.is_upper(first.layer()) => below,
            all => all,
        }
    }

    /// Returns the namespace of the topmost layer's marker xattrs.
    pub(crate) fn space(&self) -> XattrSpace {
        let first = self.view.layers().first();
        first.map_or(XattrSpace::User, |layer| layer.space())
    }

    /// Whether markers of fuse-overlayfs count in any layer.
    pub(crate) fn has_foreign_layers(&self) -> bool {
        let mut layers = self.view.layers().iter();
        layers.any(|layer| layer.is_foreign())
    }
}
