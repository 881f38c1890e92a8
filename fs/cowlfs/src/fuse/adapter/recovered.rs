//! The state of the predecessor that was killed.

use std::collections::HashMap;
use std::sync::Arc;

use super::Adapter;
use super::handles::{HandleValue, OpenFile, UNCOUNTED};
use cowl_overlay::{Kind, Ledger};

/// The values of the ledger that belong to the protocol.
#[derive(Debug, Default)]
pub(crate) struct RecoveredValues {
    /// The open files, by handle number.
    pub(crate) handles: Vec<(u64, Vec<u8>)>,
    /// The states for passthrough, by node id.
    pub(crate) backing: Vec<(u64, Vec<u8>)>,
}

impl Adapter {
    /// Takes over the open files of the predecessor.
    pub(in crate::fuse) fn restore(&self, values: &RecoveredValues, ledger: &Arc<Ledger>) {
        let mut opens: HashMap<u64, u32> = HashMap::new();
        for (number, bytes) in &values.handles {
            let value: Option<HandleValue> = postcard::from_bytes(bytes).ok();
            let found = value.and_then(|value| {
                let file = self.overlay.reopen(&value.file)?;
                let node_id = value.node_id;
                Some(OpenFile { node_id, file })
            });
            let Some(open) = found else {
                log::error!("the open file with the handle {number} was not found again");
                ledger.delete(Kind::Handle, *number);
                continue;
            };
            if open.node_id != UNCOUNTED {
                *opens.entry(open.node_id).or_default() += 1;
            }
            self.files.inherit(*number, open, ledger);
        }
        // A number that the predecessor assigned in a request without recording the open file is not assigned again, or
        // the request would close another file.
        self.files
            .leave_generation_of(ledger.last_unanswered_handle());
        self.backing.restore(&values.backing, &opens, ledger);
    }
}
