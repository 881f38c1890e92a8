//! Handle numbers of open files, as the protocol carries them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::locks::RwLock;
use cowl_layers::points::point;
use cowl_overlay::{FileHandle, Kind, Ledger};
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

/// The handle numbers of a process and those of its successor differ in the bits from this one up, so that a late
/// RELEASE of the predecessor's handle closes no other one.
const GENERATION_BIT: u32 = 40;

/// The node id of an open that is not counted for passthrough.
pub(super) const UNCOUNTED: u64 = 0;

/// An open file, under the node id with which it was opened.
#[derive(Clone, Debug)]
pub(super) struct OpenFile {
    /// Or [`UNCOUNTED`].
    pub(super) node_id: u64,
    pub(super) file: Arc<FileHandle>,
}

/// An open file in the ledger.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct HandleValue {
    pub(super) node_id: u64,
    pub(super) file: Vec<u8>,
}

/// Open files by handle number. A number is never reused.
#[derive(Debug)]
pub(super) struct Handles {
    open: RwLock<FxHashMap<u64, OpenFile>>,
    next: AtomicU64,
}

impl Default for Handles {
    fn default() -> Self {
        Self {
            open: RwLock::default(),
            next: AtomicU64::new(1),
        }
    }
}

impl Handles {
    /// Continues with these open files and the next number of another process.
    pub(super) fn continued(open: FxHashMap<u64, OpenFile>, next: u64) -> Self {
        Self {
            open: RwLock::new(open),
            next: AtomicU64::new(next),
        }
    }

    /// Returns all open files, and the next number.
    pub(super) fn record(&self) -> (Vec<(u64, OpenFile)>, u64) {
        let open = self.open.read();
        let mut files: Vec<_> = open.iter().map(|(n, open)| (*n, open.clone())).collect();
        files.sort_unstable_by_key(|(number, _)| *number);
        (files, self.next.load(Ordering::Relaxed))
    }

    /// Writes all open files to a new ledger.
    pub(super) fn note_all(&self, ledger: &Arc<Ledger>) {
        for (number, open) in &*self.open.read() {
            note(ledger, *number, open);
        }
    }

    /// Assigns a number to an open file, and records it in the ledger.
    pub(super) fn insert(
        &self,
        node_id: u64,
        file: Arc<FileHandle>,
        ledger: Option<&Arc<Ledger>>,
    ) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        // Before the open file is recorded: a successor would not close a handle that no request names.
        if let Some(ledger) = ledger {
            ledger.note_handle(number);
        }
        point("before a handle is recorded");
        self.insert_as(number, OpenFile { node_id, file }, ledger);
        point("after a handle is recorded");
        number
    }

    /// Inserts an open file of the predecessor under its number.
    pub(super) fn inherit(&self, number: u64, open: OpenFile, ledger: &Arc<Ledger>) {
        self.leave_generation_of(number);
        self.insert_as(number, open, Some(ledger));
    }

    /// Assigns only numbers of a later generation from now on.
    pub(super) fn leave_generation_of(&self, number: u64) {
        let first = ((number >> GENERATION_BIT) + 1) << GENERATION_BIT;
        self.next.fetch_max(first, Ordering::Relaxed);
    }

    fn insert_as(&self, number: u64, open: OpenFile, ledger: Option<&Arc<Ledger>>) {
        if let Some(ledger) = ledger {
            note(ledger, number, &open);
        }
        self.open.write().insert(number, open);
    }

    /// Returns the open file with this number, or EBADF.
    pub(super) fn get(&self, number: u64) -> Result<Arc<FileHandle>> {
        let open = self.open.read();
        let found = open.get(&number).map(|open| open.file.clone());
        found.ok_or(Error::Errno(Errno::BADF))
    }

    /// Removes a number and returns its open file, if there is one.
    pub(super) fn remove(&self, number: u64, ledger: Option<&Arc<Ledger>>) -> Option<OpenFile> {
        let removed = self.open.write().remove(&number)?;
        point("before a handle is removed");
        if let Some(ledger) = ledger {
            ledger.delete(Kind::Handle, number);
        }
        Some(removed)
    }
}

/// Writes an open file to the ledger.
fn note(ledger: &Ledger, number: u64, open: &OpenFile) {
    let value = HandleValue {
        node_id: open.node_id,
        file: open.file.to_ledger(),
    };
    // More than twice the largest encoding.
    let mut buffer = [0; 128];
    match postcard::to_slice(&value, &mut buffer) {
        Ok(value) => ledger.put(Kind::Handle, number, value),
        Err(error) => ledger.give_up(&format!("cannot record an open file: {error}")),
    }
}
