//! An index from the names in a merged directory to the layers that contain them.
//!
//! It is built once from the listings of the lower layers, which do not change. A lookup then accesses only the layers
//! that contain the name, instead of all layers of the directory.

use std::collections::HashMap;
use std::sync::Arc;

use smallvec::SmallVec;

use super::View;
use crate::error::Result;
use crate::layer::{LayerDir, LayerEntry, list};
use crate::name::Name;

/// A name in the index: the entry of the topmost directory that contains it, and the indices of all that do.
#[derive(Debug)]
pub(super) struct IndexedName {
    pub(super) top: LayerEntry,
    at: SmallVec<[u16; 4]>,
}

/// An index of the names in the lower directories of a merged directory.
#[derive(Debug, Default)]
pub struct NameIndex(HashMap<Name, IndexedName>);

/// An index of names, for a merged directory with `above` further directories that the index does not cover.
#[derive(Clone, Copy, Debug)]
pub struct PartialIndex<'a> {
    /// The number of directories above those that the index covers.
    pub above: usize,
    /// The index.
    pub names: &'a NameIndex,
}

impl NameIndex {
    /// Returns the number of names.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the index contains no names.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &IndexedName> {
        self.0.values()
    }
}

impl IndexedName {
    pub(super) fn first(&self) -> usize {
        self.at.first().map_or(0, |at| usize::from(*at))
    }
}

impl PartialIndex<'_> {
    /// Returns the index of the next directory, from `from` on, that may contain `name`.
    ///
    /// Any directory that the index of names does not cover may contain it.
    pub(super) fn next(&self, from: usize, name: &Name) -> Option<usize> {
        if from < self.above {
            return Some(from);
        }
        let indexed = self.names.0.get(name)?;
        let mut at = indexed.at.iter().map(|at| usize::from(*at) + self.above);
        at.find(|at| *at >= from)
    }
}

impl View {
    /// Builds the index of directories that do not change.
    pub fn index_names(&self, dirs: &[Arc<LayerDir>]) -> Result<NameIndex> {
        let mut names = NameIndex::default();
        for (at, dir) in (0_u16..).zip(dirs) {
            for entry in list(dir, self.markers(dir.layer()))? {
                let known = names
                    .0
                    .entry(entry.name.clone())
                    .or_insert_with(|| IndexedName {
                        top: entry,
                        at: SmallVec::new(),
                    });
                known.at.push(at);
            }
        }
        Ok(names)
    }
}
