//! A cache of the last negative lookup.
//!
//! Before open(2) with O_CREAT creates a file, the kernel looks its name up. The creation then need not check the lower
//! layers again for the name.

use std::sync::{Arc, Weak};

use cowl_layers::locks::Mutex;

use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;

/// The last name that a lookup did not find, and its directory, identified by its locations.
///
/// The entry cannot become stale: the lower locations never change, and if the name was created in the upper one, the
/// creation fails with EEXIST.
#[derive(Debug, Default)]
pub(crate) struct LastAbsent(Mutex<Option<Absent>>);

/// The locations of the directory, and the name.
type Absent = (Weak<[Arc<LayerDir>]>, Name);

impl LastAbsent {
    /// Records a negative lookup, unless the directory has only one location and so no lower layer to check.
    pub(super) fn note(&self, locs: &Arc<[Arc<LayerDir>]>, name: &Name) {
        if locs.len() > 1 {
            *self.0.lock() = Some((Arc::downgrade(locs), name.clone()));
        }
    }

    /// Drops the entry.
    pub(crate) fn clear(&self) {
        *self.0.lock() = None;
    }

    /// Whether the last negative lookup was of this name.
    ///
    /// Compares addresses: as long as the weak reference exists, the locations of another directory cannot have the
    /// same one.
    pub(crate) fn matches(&self, locs: &Arc<[Arc<LayerDir>]>, name: &Name) -> bool {
        let last = self.0.lock();
        last.as_ref().is_some_and(|(dir, absent)| {
            std::ptr::addr_eq(dir.as_ptr(), Arc::as_ptr(locs)) && absent == name
        })
    }
}
