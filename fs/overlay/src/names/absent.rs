//! The last name whose lookup failed. A program that creates a file has the kernel look its name up first;
//! then the creation need not check again that the name is free below.

use std::sync::{Arc, Weak};

use cowl_layers::locks::Mutex;

use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;

/// The name and its directory, identified by its locations. All of them but the topmost never change, and a
/// name that was added in the topmost makes the creation fail with EEXIST.
#[derive(Debug, Default)]
pub(crate) struct LastAbsent(Mutex<Option<Absent>>);

/// The directory's locations, and the name.
type Absent = (Weak<[Arc<LayerDir>]>, Name);

impl LastAbsent {
    /// Records a failed lookup. A directory that lies in one layer alone needs no check.
    pub(super) fn note(&self, locs: &Arc<[Arc<LayerDir>]>, name: &Name) {
        if locs.len() > 1 {
            *self.0.lock() = Some((Arc::downgrade(locs), name.clone()));
        }
    }

    /// Whether the last failed lookup was of this name. (While the weak reference exists, the locations of
    /// another directory cannot get the same address.)
    pub(crate) fn is(&self, locs: &Arc<[Arc<LayerDir>]>, name: &Name) -> bool {
        let last = self.0.lock();
        last.as_ref().is_some_and(|(of, absent)| {
            std::ptr::addr_eq(of.as_ptr(), Arc::as_ptr(locs)) && absent == name
        })
    }
}
