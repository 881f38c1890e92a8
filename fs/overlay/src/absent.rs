//! The name that was last looked for in vain. A program that makes a file has the kernel look its name up
//! first; that it is free below need not be found out twice.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;

/// The name, and in which folder it was looked for: by its places, all but the topmost of which never change.
/// (What is added in the topmost is found by the attempt to make it there.)
#[derive(Debug, Default)]
pub(super) struct Absent(Mutex<Option<Last>>);

/// The folder's places, and the name.
type Last = (Weak<[Arc<LayerDir>]>, Name);

impl Absent {
    /// Notes it. A folder that is merged from one layer alone is none that there is a question about.
    pub(super) fn note(&self, locs: &Arc<[Arc<LayerDir>]>, name: &Name) {
        if locs.len() > 1 {
            *self.0.lock() = Some((Arc::downgrade(locs), name.clone()));
        }
    }

    /// Whether it is this one. (As long as the weak reference is kept no other folder's places can get the same
    /// address.)
    pub(super) fn was(&self, locs: &Arc<[Arc<LayerDir>]>, name: &Name) -> bool {
        let last = self.0.lock();
        last.as_ref().is_some_and(|(of, absent)| {
            std::ptr::addr_eq(of.as_ptr(), Arc::as_ptr(locs)) && absent == name
        })
    }
}
