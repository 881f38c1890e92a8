//! The state of the handlers, which another process can continue.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cowl_layers::sys::stat::Time;
use cowl_overlay::{FileHandle, Ledger};
use fuser::InitFlags;
use serde::{Deserialize, Serialize};

use super::admission::RefusedOpens;
use super::handles::Handles;
use super::rewrites::Rewrites;
use crate::fuse::passthrough::{BackingFiles, BackingRecord};
use crate::fuse::workers::{ClosedGate, Gate};

/// The outcome of the protocol handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Negotiated {
    /// The minor version of the kernel's protocol.
    minor: u32,
    /// The capabilities that the kernel offered and that were requested explicitly.
    requested: u64,
    /// The capabilities that the kernel offered and that need no request, or that the protocol library requests.
    passive: u64,
}

/// Capabilities that are not requested by the handlers, but change what they do.
const PASSIVE: InitFlags = InitFlags::FUSE_ASYNC_READ
    .union(InitFlags::FUSE_BIG_WRITES)
    .union(InitFlags::FUSE_MAX_PAGES)
    .union(InitFlags::FUSE_INIT_EXT)
    .union(InitFlags::FUSE_NO_OPEN_SUPPORT)
    .union(InitFlags::FUSE_NO_OPENDIR_SUPPORT)
    .union(InitFlags::FUSE_HAS_RESEND);

impl Negotiated {
    pub(super) fn new(minor: u32, offered: InitFlags, requested: InitFlags) -> Self {
        Self {
            minor,
            requested: (offered & requested).bits(),
            passive: (offered & PASSIVE).bits(),
        }
    }

    /// Whether the kernel can send requests again that a process has read and not answered (Linux 6.9).
    pub(crate) fn can_resend(self) -> bool {
        self.passive & InitFlags::FUSE_HAS_RESEND.bits() != 0
    }

    /// Whether the kernel can read and write backing files.
    pub(in crate::fuse) fn has_passthrough(self) -> bool {
        self.requested & InitFlags::FUSE_PASSTHROUGH.bits() != 0
    }

    /// Whether the kernel opens files without a request (docs/decisions/0044).
    pub(super) fn has_no_open_requests(self) -> bool {
        // Has no effect in any other session.
        self.requested & InitFlags::FUSE_NO_OPEN_SUPPORT.bits() != 0
    }

    /// Returns the capabilities of a kernel that offers exactly these.
    pub(super) fn offered(self) -> InitFlags {
        InitFlags::from_bits_retain(self.requested | self.passive)
    }

    /// Returns an INIT request of a kernel that offers exactly these capabilities.
    ///
    /// Handlers that request more find them missing. Otherwise they would rely on capabilities that the kernel does not
    /// have enabled.
    pub(in crate::fuse) fn to_init_request(self) -> Vec<u8> {
        /// The opcode FUSE_INIT, and the sizes of `struct fuse_in_header` and `struct fuse_init_in`.
        const INIT: u32 = 26;
        const HEADER: usize = 40;
        const BODY: usize = 64;
        const LENGTH: u32 = 104;
        const MAJOR: u32 = 7;
        /// The kernel's default; this request does not change the actual value.
        const READ_AHEAD: u32 = 128 << 10;
        let flags = (self.offered() | InitFlags::FUSE_INIT_EXT).bits();
        let halves = flags.to_le_bytes();
        let [a, b, c, d, e, f, g, h] = halves;
        let (low, high) = (
            u32::from_le_bytes([a, b, c, d]),
            u32::from_le_bytes([e, f, g, h]),
        );
        let mut request = Vec::with_capacity(HEADER + BODY);
        for field in [LENGTH, INIT, 1] {
            request.extend(field.to_ne_bytes());
        }
        request.resize(HEADER, 0);
        for field in [MAJOR, self.minor, READ_AHEAD, low, high] {
            request.extend(field.to_ne_bytes());
        }
        request.resize(HEADER + BODY, 0);
        request
    }
}

/// The shared state of the handlers.
#[derive(Debug)]
pub(in crate::fuse) struct AdapterState {
    pub(super) files: Arc<Handles>,
    pub(in crate::fuse) backing: Arc<BackingFiles>,
    pub(super) refused: Arc<RefusedOpens>,
    pub(super) gate: Arc<Gate>,
    pub(super) rewrites: Arc<Rewrites>,
    pub(super) negotiated: Arc<OnceLock<Negotiated>>,
}

/// The state of the handlers, apart from open files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::fuse) struct AdapterRecord {
    pub(in crate::fuse) negotiated: Negotiated,
    pub(super) refused: Vec<((u64, u32), Time)>,
    pub(super) backing: BackingRecord,
    /// The node ids with which the open files were opened, by handle number.
    pub(super) node_ids: Vec<(u64, u64)>,
}

#[cfg(test)]
impl AdapterRecord {
    pub(in crate::fuse) fn for_test() -> Self {
        Self {
            negotiated: Negotiated::new(45, InitFlags::all(), InitFlags::FUSE_POSIX_ACL),
            refused: vec![((7, 8), Time::default())],
            backing: BackingRecord::default(),
            node_ids: Vec::new(),
        }
    }
}

/// The open files by handle number, and the next number.
pub(in crate::fuse) type RecordedHandles = (Vec<(u64, Arc<FileHandle>)>, u64);

/// The state with which the handlers begin.
pub(in crate::fuse) enum Origin {
    /// A new session on this device.
    New(OwnedFd),
    /// The session of another process on this device, with its open files and the next handle number.
    Predecessor(
        OwnedFd,
        Box<AdapterRecord>,
        HashMap<u64, Arc<FileHandle>>,
        u64,
    ),
}

impl AdapterState {
    /// Stops all requests; see [`Gate::close`].
    pub(in crate::fuse) fn close_gate(&self, timeout: Duration) -> Option<ClosedGate<'_>> {
        self.gate.close(timeout)
    }

    /// Returns the outcome of the handshake.
    pub(in crate::fuse) fn negotiated(&self) -> Option<Negotiated> {
        self.negotiated.get().copied()
    }

    /// Records the state and the open files. The gate must be closed.
    pub(in crate::fuse) fn record(&self) -> Option<(AdapterRecord, RecordedHandles)> {
        // A successor does not know them.
        self.rewrites.start_pending();
        let (files, next) = self.files.record();
        let record = AdapterRecord {
            negotiated: self.negotiated()?,
            refused: self.refused.record(),
            backing: self.backing.record(),
            node_ids: (files.iter())
                .map(|(number, open)| (*number, open.node_id))
                .collect(),
        };
        let files = files.into_iter().map(|(number, open)| (number, open.file));
        Some((record, (files.collect(), next)))
    }

    /// Writes the open files and the states of passthrough to a new ledger.
    pub(in crate::fuse) fn note_all(&self, ledger: &Arc<Ledger>) {
        self.files.note_all(ledger);
        self.backing.note_all(ledger);
    }

    /// Makes registrations of backing files those of this process, whose predecessor has ended.
    pub(in crate::fuse) fn assume(&self) {
        self.backing.assume();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capability_that_was_not_enabled_is_not_offered() {
        let all = InitFlags::from_bits_retain(u64::MAX);
        let enabled = InitFlags::FUSE_POSIX_ACL | InitFlags::FUSE_PASSTHROUGH;
        let negotiated = Negotiated::new(45, all, enabled);
        assert!(negotiated.can_resend());
        let request = negotiated.to_init_request();
        assert_eq!(request.len(), 104);
        let field = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        assert_eq!([field(0), field(4), field(40), field(44)], [104, 26, 7, 45]);
        let flags = u64::from(field(52)) | u64::from(field(56)) << 32;
        let offered = InitFlags::from_bits_retain(flags);
        assert!(offered.contains(enabled | InitFlags::FUSE_NO_OPENDIR_SUPPORT));
        assert!(!offered.intersects(InitFlags::FUSE_WRITEBACK_CACHE));
    }
}
