//! Handle numbers of open files, as the protocol carries them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cowl_layers::locks::RwLock;

use cowl_layers::error::{Errno, Error, Result};

/// Open files by handle number. A number is never reused.
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
    /// Continues with these open files and the next number of another process.
    pub(super) fn continued(open: HashMap<u64, Arc<T>>, next: u64) -> Self {
        Self {
            open: RwLock::new(open),
            next: AtomicU64::new(next),
        }
    }

    /// Returns all open files, and the next number.
    pub(super) fn record(&self) -> (Vec<(u64, Arc<T>)>, u64) {
        let open = self.open.read();
        let mut files: Vec<_> = open.iter().map(|(n, file)| (*n, file.clone())).collect();
        files.sort_unstable_by_key(|(number, _)| *number);
        (files, self.next.load(Ordering::Relaxed))
    }

    /// Assigns a number to an open file.
    pub(super) fn insert(&self, file: Arc<T>) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.write().insert(number, file);
        number
    }

    /// Returns the open file with this number, or EBADF.
    pub(super) fn get(&self, number: u64) -> Result<Arc<T>> {
        let open = self.open.read();
        open.get(&number).cloned().ok_or(Error::Errno(Errno::BADF))
    }

    /// Removes a number and returns its open file, if there is one.
    pub(super) fn remove(&self, number: u64) -> Option<Arc<T>> {
        self.open.write().remove(&number)
    }
}
