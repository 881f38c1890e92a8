//! The names of a folder's places together: which of them has which name. Made once of their listings,
//! where a folder lies in many layers and they do not change, so that a name costs as much as it has places.

use std::collections::HashMap;
use std::sync::Arc;

use smallvec::SmallVec;

use super::View;
use crate::error::Result;
use crate::layer::{LayerDir, LayerEntry, list};
use crate::name::Name;

/// One name: what the topmost place that has it says, and which places those are.
#[derive(Debug)]
pub(super) struct Places {
    pub(super) top: LayerEntry,
    at: SmallVec<[u16; 4]>,
}

/// The names of the lower places of a folder.
#[derive(Debug, Default)]
pub struct PlaceNames(HashMap<Name, Places>);

/// The same for a folder with `above` places above those.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// How many places come before the first of those.
    pub above: usize,
    /// Their names.
    pub names: &'a PlaceNames,
}

impl PlaceNames {
    /// How many names there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Places> {
        self.0.values()
    }
}

impl Places {
    pub(super) fn first(&self) -> usize {
        self.at.first().map_or(0, |at| usize::from(*at))
    }
}

impl Known<'_> {
    /// The first place from `from` on that may have `name`: any of those above, and of the others those that
    /// do.
    pub(super) fn next(&self, from: usize, name: &Name) -> Option<usize> {
        if from < self.above {
            return Some(from);
        }
        let places = self.names.0.get(name)?;
        let mut at = places.at.iter().map(|at| usize::from(*at) + self.above);
        at.find(|at| *at >= from)
    }
}

impl View {
    /// Reads the names of places that do not change.
    pub fn place_names(&self, places: &[Arc<LayerDir>]) -> Result<PlaceNames> {
        let mut names = PlaceNames::default();
        for (at, place) in (0_u16..).zip(places) {
            for entry in list(place, self.markers(place.layer()))? {
                let known = names.0.entry(entry.name.clone()).or_insert_with(|| Places {
                    top: entry,
                    at: SmallVec::new(),
                });
                known.at.push(at);
            }
        }
        Ok(names)
    }
}
