//! Handing a session over to another process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use cowl_overlay::{Handover, Ledger, Overlay, PassthroughFile, RecordError};
use serde::{Deserialize, Serialize};

use super::adapter::{AdapterRecord, AdapterState, Negotiated};
use super::workers::ClosedGate;

/// Lists the files that the kernel reads or writes without requests.
pub(crate) type PassthroughFiles = Box<dyn Fn() -> Vec<PassthroughFile> + Send + Sync>;

/// The state of a session, apart from the overlay and the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SessionRecord {
    pub(super) adapter: AdapterRecord,
    /// The number of the next open file.
    pub(super) next_handle: u64,
}

#[cfg(test)]
impl SessionRecord {
    /// Returns a record of a session without open files.
    pub(crate) fn for_test() -> Self {
        Self {
            adapter: AdapterRecord::for_test(),
            next_handle: 1,
        }
    }
}

/// A running session, for a handover.
#[derive(Debug)]
pub(crate) struct SessionSource {
    device: OwnedFd,
    state: AdapterState,
}

impl SessionSource {
    pub(super) fn new(device: OwnedFd, state: AdapterState) -> Self {
        Self { device, state }
    }

    pub(super) fn assume(&self) {
        self.state.assume();
    }

    pub(super) fn note_all(&self, ledger: &Arc<Ledger>) {
        self.state.note_all(ledger);
    }

    pub(super) fn negotiated(&self) -> Option<Negotiated> {
        self.state.negotiated()
    }

    /// Returns a function that lists the files that the kernel reads or writes without requests, and ends the
    /// registrations of all others.
    pub(crate) fn passthrough(&self, overlay: &Arc<Overlay>) -> PassthroughFiles {
        let (backing, overlay) = (self.state.backing.clone(), overlay.clone());
        Box::new(move || {
            backing.end_unused(overlay.ledger());
            backing.in_use()
        })
    }

    /// Returns the FUSE device.
    pub(crate) fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Whether the kernel can send requests again that this process has read and not answered.
    pub(crate) fn can_resend(&self) -> bool {
        let negotiated = self.state.negotiated();
        negotiated.is_some_and(|negotiated| negotiated.can_resend())
    }

    /// Waits until all requests are answered, and lets new ones wait; `None` if that takes too long.
    pub(crate) fn close_gate(&self, timeout: Duration) -> Option<ClosedGate<'_>> {
        self.state.close_gate(timeout)
    }

    /// Records the session and its overlay. The state remains valid as long as the gate is closed.
    pub(crate) fn record(
        &self,
        _closed: &ClosedGate<'_>,
        overlay: &Overlay,
    ) -> Result<(SessionRecord, Handover), RecordError> {
        let missing = RecordError::Damaged("the handshake has not ended");
        let (adapter, (files, next_handle)) = self.state.record().ok_or(missing)?;
        let record = SessionRecord {
            adapter,
            next_handle,
        };
        Ok((record, overlay.record(&files)?))
    }
}
