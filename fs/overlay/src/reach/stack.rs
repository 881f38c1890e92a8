//! The current stack of layers.

use std::sync::Arc;

use crate::inode::{DirState, FileState};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::{Layer, LayerDir, Upper};
use cowl_layers::view::View;

/// The current layers: the merged view of all, and the upper.
#[derive(Debug)]
pub(crate) struct Stack {
    view: View,
    upper: Option<Arc<Upper>>,
}

impl Stack {
    /// Creates a stack from a view, whose topmost layer must be `upper` if there is one.
    pub(crate) fn new(view: View, upper: Option<Arc<Upper>>) -> Self {
        Self { view, upper }
    }

    /// Returns the merged view of all layers.
    pub(crate) fn view(&self) -> &View {
        &self.view
    }

    /// Adds data-only layers below the lower layers, topmost first.
    pub(crate) fn add_data_layers(&mut self, data: Vec<Arc<Layer>>) {
        self.view = self.view.clone().with_data_layers(data);
    }

    /// Returns the upper. Fails with EROFS if there is none.
    pub(crate) fn upper(&self) -> Result<&Arc<Upper>> {
        self.upper.as_ref().ok_or(Error::Errno(Errno::ROFS))
    }

    /// Returns the upper; `None` if the overlay is read-only.
    pub(crate) fn writable(&self) -> Option<&Arc<Upper>> {
        self.upper.as_ref()
    }

    /// Drops the upper, after which the overlay is read-only.
    pub(crate) fn release_upper(&mut self) {
        self.upper = None;
    }

    /// Whether `layer` is the upper.
    pub(crate) fn is_upper(&self, layer: &Arc<Layer>) -> bool {
        let upper = self.upper.as_ref();
        upper.is_some_and(|upper| Arc::ptr_eq(&upper.layer, layer))
    }

    /// Returns the location of a directory in the upper; `None` if it is only in lower layers.
    pub(crate) fn upper_dir<'d>(&self, dir: &'d DirState) -> Option<&'d Arc<LayerDir>> {
        dir.locs.first().filter(|loc| self.is_upper(loc.layer()))
    }

    /// Whether the name and the attributes of a file are in the upper.
    pub(crate) fn is_in_upper(&self, file: &FileState) -> bool {
        self.is_upper(file.loc.dir.layer())
    }

    /// Returns those of `locs`, the locations of a directory, that are in lower layers.
    pub(crate) fn below_upper<'d>(&self, locs: &'d [Arc<LayerDir>]) -> &'d [Arc<LayerDir>] {
        match locs {
            [first, below @ ..] if self.is_upper(first.layer()) => below,
            all => all,
        }
    }

    /// Returns the namespace of the marker xattrs in the topmost layer.
    pub(crate) fn space(&self) -> XattrSpace {
        let first = self.view.layers().first();
        first.map_or(XattrSpace::User, |layer| layer.space())
    }

    /// Whether markers of fuse-overlayfs are read in any layer.
    pub(crate) fn has_foreign_layers(&self) -> bool {
        let mut layers = self.view.layers().iter();
        layers.any(|layer| layer.is_foreign())
    }
}
