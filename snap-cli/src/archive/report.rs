//! The result of an import or an export.

use crate::tree::error::Progress;

/// The result of an import or an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TransferReport {
    /// The number of entries and bytes that were transferred.
    pub done: Progress,
    /// Entries that were skipped or changed: path (bytes) and reason.
    pub notes: Vec<(Vec<u8>, &'static str)>,
}
