//! Resolution of names over the locations of a directory.

use std::sync::Arc;

use super::deep::{DeepDirs, NamesFor};
use super::prefetched::Prefetched;
use crate::reach::Context;
use cowl_layers::error::Result;
use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;
use cowl_layers::view::{Found, MergedEntry, NameIndex, PartialIndex};

/// The search for names in the layers, with the caches of directories in many layers.
#[derive(Clone, Copy)]
pub(crate) struct Resolver<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) deep: &'o DeepDirs,
    pub(crate) prefetched: &'o Prefetched,
}

impl Resolver<'_> {
    /// Resolves `name` over the locations of a directory.
    pub(super) fn resolve(&self, locs: &[Arc<LayerDir>], name: &Name) -> Result<Found> {
        if let Some(found) = self.prefetched.take_name(locs, name) {
            return Ok(found);
        }
        let names = self.deep_names(locs, NamesFor::Lookup);
        let known = self.known(locs, names.as_ref());
        self.cx.stack.view().lookup_at(locs, name, known)
    }

    /// Returns the visible entries of a directory with these locations.
    pub(super) fn list(&self, locs: &[Arc<LayerDir>]) -> Result<Vec<MergedEntry>> {
        if let Some(entries) = self.prefetched.take_entries(locs) {
            return Ok(entries);
        }
        let names = self.deep_names(locs, NamesFor::Listing);
        let known = self.known(locs, names.as_ref());
        let mut entries = self.cx.stack.view().merged_entries(locs, known)?;
        entries.retain(|entry| !entry.whiteout);
        Ok(entries)
    }

    fn deep_names(&self, locs: &[Arc<LayerDir>], operation: NamesFor) -> Option<Arc<NameIndex>> {
        if self.cx.options.live_layers {
            return None;
        }
        let stack = &self.cx.stack;
        self.deep
            .names(stack.view(), stack.below_upper(locs), operation)
    }

    fn known<'a>(
        &self,
        locs: &[Arc<LayerDir>],
        names: Option<&'a Arc<NameIndex>>,
    ) -> Option<PartialIndex<'a>> {
        let above = locs.len() - self.cx.stack.below_upper(locs).len();
        names.map(|names| PartialIndex { above, names })
    }
}
