//! Mounts on which the kernel opens and closes files without a request (docs/decisions/0044).
//!
//! All other requests have the handle number 0 there, so the file is found by its node id.

use std::sync::Arc;

use fuser::{FileHandle as Fh, INodeNo, InitFlags};

use super::Adapter;
use super::state::Negotiated;
use crate::fuse::passthrough::Policy;
use crate::fuse::settings::{SessionSettings, StackMode};
use cowl_layers::error::Result;
use cowl_layers::sys::kernel;
use cowl_layers::sys::stat::FileKind;
use cowl_overlay::inode::Inode;
use cowl_overlay::unopened::file_for_request;
use cowl_overlay::{Close, FileHandle, Op, OpenOptions};

/// Whether the kernel sends a request when a program opens a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OpenRequests {
    /// It sends OPEN and RELEASE.
    Sent,
    /// The daemon answers the first OPEN with ENOSYS, after which the kernel sends neither.
    Absent,
}

/// The kind of session whose handshake decides whether the kernel sends open requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begin {
    /// A new session, and what its settings permit.
    New {
        /// Whether open requests may be absent, unless the kernel uses passthrough.
        may_omit_opens: bool,
    },
    /// The session of another process.
    Continued(Negotiated),
}

impl Begin {
    /// Begins a new session.
    ///
    /// A push must know the files that are open for writing (docs/decisions/0007), and a layer to which another mount
    /// writes needs an open to notice a change.
    pub(super) fn new_session(settings: &SessionSettings) -> Self {
        Self::New {
            may_omit_opens: settings.stack == StackMode::Fixed
                && !settings.live_layers
                && is_safe_without_opens(kernel::version()),
        }
    }

    /// Decides whether the kernel sends open requests, given the capabilities that it offers.
    pub(super) fn decide(self, policy: Policy, offered: InitFlags) -> OpenRequests {
        let is_absent = match self {
            Self::New { may_omit_opens } => {
                let may_pass = policy.allows_any() && offered.contains(InitFlags::FUSE_PASSTHROUGH);
                may_omit_opens && !may_pass && offered.contains(InitFlags::FUSE_NO_OPEN_SUPPORT)
            }
            // The kernel does not return to open requests.
            Self::Continued(negotiated) => negotiated.has_no_open_requests(),
        };
        match is_absent {
            true => OpenRequests::Absent,
            false => OpenRequests::Sent,
        }
    }
}

/// Whether a kernel of this version retains an inode while it reads ahead without open requests.
///
/// Others can evict the inode while a READ is in progress. If the daemon's own allocation causes the eviction, it waits
/// for pages that only the daemon can complete (fixed by "fuse: fix readahead reclaim deadlock").
fn is_safe_without_opens(version: (u32, u32, u32)) -> bool {
    match version {
        (6, 6, patch) => patch >= 121,
        (6, 12, patch) => patch >= 65,
        (6, 18, patch) => patch >= 4,
        (major, minor, _) => (major, minor) >= (6, 19),
    }
}

impl OpenRequests {
    /// Returns the capability to request from the kernel.
    pub(super) fn capability(self) -> InitFlags {
        match self {
            Self::Sent => InitFlags::FUSE_ATOMIC_O_TRUNC,
            // No open can truncate a file: the kernel sends SETATTR instead. The kernel ignores this capability in the
            // reply; it is requested so that it is part of the outcome of the handshake, which a successor continues.
            Self::Absent => InitFlags::FUSE_NO_OPEN_SUPPORT,
        }
    }
}

impl Adapter {
    /// Whether the kernel opens files without a request.
    pub(super) fn has_no_open_requests(&self) -> bool {
        self.opens == OpenRequests::Absent
    }

    /// Returns the open file of a request. `options` are those with which the request uses it, if it was not opened.
    pub(super) fn file(
        &self,
        op: &Op<'_>,
        (ino, fh): (INodeNo, Fh),
        options: OpenOptions,
    ) -> Result<Arc<FileHandle>> {
        match self.opens {
            OpenRequests::Sent => self.files.get(fh.0),
            OpenRequests::Absent => file_for_request(op, &op.inode(ino.0)?, options),
        }
    }

    /// Returns a file to be truncated or extended, if it was not opened; `None` if its size does not change.
    pub(super) fn file_to_cut(
        &self,
        op: &Op<'_>,
        inode: &Arc<Inode>,
        size: Option<u64>,
    ) -> Result<Option<Arc<FileHandle>>> {
        let file = (size.is_some() && inode.kind() == FileKind::Regular)
            .then(|| file_for_request(op, inode, OpenOptions::WRITE));
        file.transpose()
    }

    /// Handles a write to a file that may have been truncated. The daemon will not be notified of its close.
    pub(super) fn note_rewrite(&self, op: &Op<'_>, ino: INodeNo, file: &FileHandle) {
        if self.has_no_open_requests()
            && file.inode().flags().is_truncated()
            && self.rewrites.note_write(ino.0)
            && let Err(error) = op.close_truncated(file, Close::NotLast)
        {
            log::debug!("cannot start writeback of inode {ino}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choices::{Coherence, Passthrough};
    use crate::fuse::passthrough::Contents;

    const FIXED: Begin = Begin::New {
        may_omit_opens: true,
    };
    const PUSHABLE: Begin = Begin::New {
        may_omit_opens: false,
    };

    #[test]
    fn only_a_session_that_never_passes_a_file_to_the_kernel_lacks_open_requests() {
        use OpenRequests::{Absent, Sent};
        let stack = (StackMode::Fixed, Contents::Writable);
        let passing = Policy::new(Passthrough::default(), Coherence::default(), stack);
        let all = InitFlags::from_bits_retain(u64::MAX);
        let old = all - InitFlags::FUSE_PASSTHROUGH;
        let older = old - InitFlags::FUSE_NO_OPEN_SUPPORT;
        for (begin, policy, offered, wanted) in [
            (FIXED, Policy::OFF, all, Absent),
            (FIXED, passing, all, Sent),
            (FIXED, passing, old, Absent),
            (FIXED, Policy::OFF, older, Sent),
            (PUSHABLE, Policy::OFF, all, Sent),
            (PUSHABLE, passing, old, Sent),
        ] {
            assert_eq!(
                begin.decide(policy, offered),
                wanted,
                "{begin:?} {offered:?}"
            );
        }
    }

    #[test]
    fn kernels_that_can_evict_an_inode_during_a_read_have_open_requests() {
        for (release, wanted) in [
            ("5.15.0-91-generic", false),
            ("6.1.0-18-amd64", false),
            ("6.6.120", false),
            ("6.6.121-1", true),
            ("6.12.64+deb13", false),
            ("6.12.65+deb13", true),
            ("6.17.9", false),
            ("6.18", false),
            ("6.18.3", false),
            ("6.18.44-fc-v769", true),
            ("6.19-rc1", true),
            ("7.0.1", true),
            ("", false),
        ] {
            assert_eq!(
                is_safe_without_opens(kernel::parse(release)),
                wanted,
                "{release}"
            );
        }
    }

    /// A successor continues the session even if its own settings differ: the kernel does not change its mode.
    #[test]
    fn a_continued_session_stays_as_it_is() {
        let all = InitFlags::from_bits_retain(u64::MAX);
        for wanted in [OpenRequests::Sent, OpenRequests::Absent] {
            let negotiated = Negotiated::new(45, all, wanted.capability());
            let offered = InitFlags::from_bits_retain(u64::MAX);
            let begin = Begin::Continued(negotiated);
            assert_eq!(begin.decide(Policy::OFF, offered), wanted);
        }
    }

    /// A program that does not know such sessions does not request the capability, and the handover is refused.
    #[test]
    fn a_program_that_expects_open_requests_does_not_continue_a_session_without_them() {
        let all = InitFlags::from_bits_retain(u64::MAX);
        let common = InitFlags::FUSE_POSIX_ACL | InitFlags::FUSE_DONT_MASK;
        let without = Negotiated::new(45, all, common | OpenRequests::Absent.capability());
        let offered = without.offered();
        let older = Negotiated::new(45, offered, common | OpenRequests::Sent.capability());
        assert_ne!(older, without);
        let same = Negotiated::new(45, offered, common | OpenRequests::Absent.capability());
        assert_eq!(same, without);
    }
}
