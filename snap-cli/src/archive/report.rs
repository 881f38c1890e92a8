//! The result of an import or an export.

use crate::tree::error::Progress;
use crate::tree::notes::Notes;

/// The result of an import or an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TransferReport {
    /// The number of entries and bytes that were transferred.
    pub done: Progress,
    /// Notes on entries that were skipped or changed.
    pub notes: Notes,
    /// Whether anything was omitted that another file system or user could store.
    pub is_incomplete: bool,
}
