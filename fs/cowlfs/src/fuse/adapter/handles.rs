//! Numbers for open files and folders, as the protocol carries them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use cowl_layers::error::{Errno, Error, Result};

/// Open things by number; a number is never used twice.
#[derive(Debug)]
pub(super) struct Handles<T> {
    open: RwLock<HashMap<u64, Arc<T>>>,
    next: AtomicU64,
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self {
            open: RwLock::default(),
            next: AtomicU64::new(1),
        }
    }
}

impl<T> Handles<T> {
    pub(super) fn insert(&self, thing: Arc<T>) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.write().insert(number, thing);
        number
    }

    pub(super) fn get(&self, number: u64) -> Result<Arc<T>> {
        let open = self.open.read();
        open.get(&number).cloned().ok_or(Error::Errno(Errno::BADF))
    }

    pub(super) fn remove(&self, number: u64) -> Option<Arc<T>> {
        self.open.write().remove(&number)
    }
}
