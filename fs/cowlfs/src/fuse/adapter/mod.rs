//! Turns each request of the protocol into one call of the overlay, and its result into one reply. It decides nothing.
//!
//! `filesystem` has the handlers; `listing` and `opening` have those of more than a few lines, `attributes` and
//! `admission` the rules for attributes that the kernel caches.

mod admission;
mod attributes;
mod convert;
mod filesystem;
mod handles;
mod listing;
mod opening;
mod recovered;
mod reply;

use std::ffi::OsStr;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fuser::{Generation, INodeNo, Notifier, Request};

use self::admission::RefusedOpens;
use self::handles::Handles;
pub(crate) use self::recovered::RecoveredValues;
use super::passthrough::{BackingFiles, Policy};
use super::settings::SessionSettings;
use super::workers::{BusyPoll, RequestSpan, WorkerPool};
use crate::requests::{Opcode, Requests};
use cowl_layers::error::Result;
use cowl_layers::panics;
use cowl_overlay::inode::Inode;
use cowl_overlay::{Ledger, Op, Overlay, RequestSlot};

const GENERATION: Generation = Generation(0);

/// The handlers of requests, with the state that they share.
#[derive(Debug)]
pub(crate) struct Adapter {
    overlay: Arc<Overlay>,
    files: Handles,
    cache_timeout: Duration,
    /// Whether the kernel may cache listings. It must support directories that are not opened.
    cache_listings: bool,
    backing: BackingFiles,
    refused: RefusedOpens,
    max_stack_depth: u32,
    /// Whether another process may change the layers, so that the kernel must cache nothing that does not expire.
    live_layers: bool,
    /// The notifier of the session, set once the session exists.
    pub(super) notifier: Arc<OnceLock<Notifier>>,
    requests: Arc<Requests>,
    pool: Arc<WorkerPool>,
    busy_poll: BusyPoll,
    /// The kernel's offer in the handshake.
    pub(super) offered: Arc<OnceLock<InitOutcome>>,
    /// Whether a request was answered, which the ledger records once.
    has_answered: AtomicBool,
}

/// The kernel's offer in the handshake, for the same handshake in a successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InitOutcome {
    /// The flags of the INIT request, 64 bits.
    pub(crate) flags: u64,
}

/// A request that must not be executed twice, until after its reply.
pub(super) struct ChangeSpan<'a> {
    // Dropped first: the slot is free once the reply was sent.
    _slot: Option<RequestSlot>,
    _span: RequestSpan<'a>,
}

impl Adapter {
    pub(super) fn new(
        overlay: Arc<Overlay>,
        settings: &SessionSettings,
        pool: Arc<WorkerPool>,
        busy_poll: BusyPoll,
    ) -> Self {
        let policy = if settings.may_use_passthrough {
            Policy::new(settings.passthrough, settings.coherence, settings.stack)
        } else {
            Policy::OFF
        };
        let backing = BackingFiles::new(policy, overlay.passthrough_writers());
        // The kernel limits the depth of stacked file systems. Passthrough to files on an overlayfs needs a depth of
        // two. Otherwise one is enough, and leaves the most for a kernel overlayfs on this mount.
        let max_stack_depth = if overlay.is_on_overlayfs() { 2 } else { 1 };
        Self {
            overlay,
            backing,
            refused: RefusedOpens::default(),
            max_stack_depth,
            live_layers: settings.live_layers,
            files: Handles::default(),
            cache_timeout: settings.cache_timeout,
            cache_listings: settings.cache_listings,
            notifier: Arc::default(),
            requests: settings.requests.clone(),
            pool,
            busy_poll,
            offered: Arc::default(),
            has_answered: AtomicBool::new(false),
        }
    }

    fn ledger(&self) -> Option<&Arc<Ledger>> {
        self.overlay.ledger()
    }

    /// Like [`Self::begin_request`], for a request that must not be executed twice.
    fn begin_change(&self, opcode: Opcode, req: &Request) -> ChangeSpan<'_> {
        let span = self.begin_request(opcode);
        let slot = self.ledger().map(|ledger| ledger.begin(req.unique().0));
        ChangeSpan {
            _slot: slot,
            _span: span,
        }
    }

    /// Counts a request and begins its span, which the handler must drop after the reply.
    fn begin_request(&self, opcode: Opcode) -> RequestSpan<'_> {
        if let Some(ledger) = self.ledger()
            && !self.has_answered.load(Ordering::Relaxed)
        {
            // The second request proves that the first one did not end the process.
            if self.requests.counts().len() > 1 && !self.has_answered.swap(true, Ordering::Relaxed)
            {
                ledger.note_answered();
            }
        }
        self.requests.count(opcode);
        RequestSpan::begin(&self.pool, &self.busy_poll)
    }

    /// Runs one operation of the overlay, and invalidates the kernel's attributes that it made stale.
    ///
    /// A panic of the operation is an error of this request ([`panics::request`]). This is also
    /// the one place that logs errors caused by a damaged layer or by the machine.
    fn run<T>(
        &self,
        request: &str,
        ino: INodeNo,
        name: Option<&OsStr>,
        run: impl FnOnce(&Op<'_>) -> Result<T>,
    ) -> Result<T> {
        let op = self.overlay.begin();
        let done = panics::request(|| run(&op));
        // Also after an error: a failed operation may have copied up a file.
        let stale = op.take_stale();
        drop(op);
        self.invalidate_stale(&stale);
        done.inspect_err(|error| reply::log_failure(request, ino, name, *error))
    }

    /// Invalidates the kernel's cached attributes of these inodes.
    ///
    /// It must happen before the reply: the caller may rely on new attributes directly after it.
    fn invalidate_stale(&self, stale: &[Arc<Inode>]) {
        for inode in stale {
            let number = self.overlay.inodes().node_id(inode);
            self.invalidate_attr(number);
            if number != inode.ino() {
                self.invalidate_attr(inode.ino());
            }
        }
    }

    /// Invalidates the kernel's cached attributes of the inode with this number.
    ///
    /// A handler can do so without a deadlock: with a negative offset the kernel takes no page lock and no directory
    /// lock, and the request holds a reference to the inode, so that the notification never drops the last one.
    fn invalidate_attr(&self, number: u64) {
        let Some(notifier) = self.notifier.get() else {
            return;
        };
        match notifier.inval_inode(INodeNo(number), -1, 0) {
            Ok(()) => {}
            // The kernel has no such inode, and so no attributes of it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => log::warn!("cannot invalidate the attributes of inode {number}: {error}"),
        }
    }

    /// Invalidates the kernel's cached listing of a directory.
    ///
    /// This cannot deadlock: the kernel waits for locked pages, but a READDIR request holds no page of a listing.
    fn invalidate_listing(&self, ino: u64) {
        let Some(notifier) = self.notifier.get() else {
            return;
        };
        match notifier.inval_inode(INodeNo(ino), 0, 0) {
            Ok(()) => {}
            // The kernel has forgotten the directory, and its listing.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => log::warn!("cannot invalidate the listing of inode {ino}: {error}"),
        }
    }
}
