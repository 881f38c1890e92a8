//! Handing a session over to another process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use cowl_overlay::{Handover, Ledger, Overlay, PassthroughFile, RecordError};
use serde::{Deserialize, Serialize};

use super::adapter::{AdapterRecord, AdapterState, Negotiated};
#[cfg(test)]
use super::passthrough::{BackingDevice, Policy};
use super::passthrough::{BackingFiles, PassthroughRefusal};
use super::workers::ClosedGate;

/// The files that the kernel reads or writes without requests.
#[derive(Clone, Debug)]
pub(crate) struct PassthroughFiles {
    backing: Arc<BackingFiles>,
    negotiated: Option<Negotiated>,
}

impl PassthroughFiles {
    /// Returns the files that are in use.
    pub(crate) fn in_use(&self) -> Vec<PassthroughFile> {
        self.backing.in_use()
    }

    /// Ends the registrations of files that are not in use, and returns those that are.
    pub(crate) fn end_unused(&self, ledger: Option<&Arc<Ledger>>) -> Vec<PassthroughFile> {
        self.backing.end_unused(ledger);
        self.backing.in_use()
    }

    /// Returns why the kernel does not use passthrough for files of the upper layer, if it was requested.
    pub(crate) fn refusal(&self, overlay: &Overlay) -> Option<PassthroughRefusal> {
        if self
            .negotiated
            .is_some_and(|negotiated| !negotiated.has_passthrough())
        {
            return Some(PassthroughRefusal::Absent);
        }
        let upper = overlay.layers().0;
        self.backing.refusal(upper.map(|upper| upper.layer.dev()))
    }

    #[cfg(test)]
    pub(crate) fn for_test() -> Self {
        let device = std::fs::File::open("/dev/null").unwrap().into();
        let device = BackingDevice::new(device);
        Self {
            backing: Arc::new(BackingFiles::new(Policy::OFF, Arc::default(), device)),
            negotiated: None,
        }
    }
}

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

    /// Returns the files that the kernel reads or writes without requests.
    pub(crate) fn passthrough(&self) -> PassthroughFiles {
        PassthroughFiles {
            backing: self.state.backing.clone(),
            negotiated: self.state.negotiated(),
        }
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
