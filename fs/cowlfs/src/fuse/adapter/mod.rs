//! Turns each request of the protocol into one call of the overlay, and its result into one reply. It decides nothing.
//!
//! `filesystem` has the handlers; `listing` and `opening` have those of more than a few lines, `attributes` and
//! `admission` the rules for attributes that the kernel caches.

mod admission;
mod attributes;
mod blame;
mod convert;
mod filesystem;
mod handles;
mod listing;
mod new_files;
mod open_requests;
mod opening;
mod preload;
mod recovered;
mod reply;
mod rewrites;
mod state;

use std::ffi::OsStr;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fuser::{Generation, INodeNo, Notifier, Request};

use self::admission::RefusedOpens;
use self::blame::Blame;
use self::handles::{Handles, OpenFile};
use self::new_files::NewFiles;
use self::open_requests::{Begin, OpenRequests};
use self::preload::FirstOpens;
pub(crate) use self::recovered::RecoveredValues;
use self::rewrites::Rewrites;
pub(crate) use self::state::Negotiated;
pub(super) use self::state::{AdapterRecord, AdapterState, Origin};
use super::passthrough::{BackingDevice, BackingFiles, Contents, Policy};
use super::settings::SessionSettings;
use super::workers::{BusyPoll, Gate, RequestSpan, WorkerPool};
use crate::choices::Mounter;
use crate::requests::{Opcode, Requests};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::panics;
use cowl_layers::points::point;
use cowl_overlay::inode::Inode;
use cowl_overlay::{Caller, Ledger, Op, Overlay, RequestSlot};

/// The number of requests after which another one proves that no request ends the process at once.
const PROOF: u32 = 2;

const GENERATION: Generation = Generation(0);

/// The handlers of requests, with the state that they share.
#[derive(Debug)]
pub(crate) struct Adapter {
    overlay: Arc<Overlay>,
    files: Arc<Handles>,
    cache_timeout: Duration,
    /// Whether the kernel may cache listings. It must support directories that are not opened.
    cache_listings: bool,
    backing: Arc<BackingFiles>,
    refused: Arc<RefusedOpens>,
    first_opens: FirstOpens,
    new_files: NewFiles,
    begin: Begin,
    /// The outcome of the handshake.
    opens: OpenRequests,
    rewrites: Arc<Rewrites>,
    gate: Arc<Gate>,
    negotiated: Arc<OnceLock<Negotiated>>,
    max_stack_depth: u32,
    mounter: Mounter,
    /// Whether another process may change the layers, so that the kernel must cache nothing that does not expire.
    live_layers: bool,
    /// The notifier of the session, set once the session exists.
    pub(super) notifier: Arc<OnceLock<Notifier>>,
    requests: Arc<Requests>,
    pool: Arc<WorkerPool>,
    busy_poll: BusyPoll,
    /// The number of requests begun, up to [`PROOF`].
    begun: AtomicU32,
}

/// A request, until after its reply.
pub(super) struct Span<'a> {
    // Dropped in this order: the request has ended once the reply was sent.
    _replied: Option<Replied>,
    _blame: Blame,
    /// For a request that must not be executed twice.
    _slot: Option<RequestSlot>,
    span: RequestSpan<'a>,
}

/// The end of a change after its reply.
struct Replied;

impl Drop for Replied {
    fn drop(&mut self) {
        point("after a reply");
    }
}

impl Adapter {
    pub(super) fn new(
        overlay: Arc<Overlay>,
        settings: &SessionSettings,
        pool: Arc<WorkerPool>,
        busy_poll: BusyPoll,
        origin: Origin,
    ) -> Self {
        let policy = if settings.may_use_passthrough {
            let contents = match overlay.layers() {
                (Some(_), _) => Contents::Writable,
                (None, _) => Contents::ReadOnly,
            };
            let stack = (settings.stack, contents);
            Policy::new(settings.passthrough, settings.coherence, stack)
        } else {
            Policy::OFF
        };
        let writers = overlay.passthrough_writers();
        let (files, refused, backing) = match origin {
            Origin::New(device) => {
                let device = BackingDevice::new(device);
                let backing = BackingFiles::new(policy, writers, device);
                (Handles::default(), RefusedOpens::default(), backing)
            }
            Origin::Predecessor(device, record, files, next) => {
                let AdapterRecord {
                    refused,
                    backing,
                    node_ids,
                    ..
                } = *record;
                let files = node_ids.into_iter().filter_map(|(number, node_id)| {
                    let file = files.get(&number)?.clone();
                    Some((number, OpenFile { node_id, file }))
                });
                let files = files.collect();
                let device = BackingDevice::of_predecessor(device);
                let backing = BackingFiles::from_record(backing, policy, writers, device);
                let files = Handles::continued(files, next);
                (files, RefusedOpens::from_record(refused), backing)
            }
        };
        // The kernel limits the depth of stacked file systems. Passthrough to files on an overlayfs needs a depth of
        // two. Otherwise one is enough, and leaves the most for a kernel overlayfs on this mount.
        let max_stack_depth = if overlay.is_on_overlayfs() { 2 } else { 1 };
        Self {
            rewrites: Rewrites::new(&overlay),
            overlay,
            backing: Arc::new(backing),
            refused: Arc::new(refused),
            first_opens: FirstOpens::default(),
            new_files: NewFiles::default(),
            begin: Begin::new_session(settings),
            opens: OpenRequests::Sent,
            gate: Arc::default(),
            negotiated: Arc::default(),
            max_stack_depth,
            mounter: settings.mounter,
            live_layers: settings.live_layers,
            files: Arc::new(files),
            cache_timeout: settings.cache_timeout,
            cache_listings: settings.cache_listings,
            notifier: Arc::default(),
            requests: settings.requests.clone(),
            pool,
            busy_poll,
            begun: AtomicU32::new(0),
        }
    }

    /// Continues the session of another process, with this outcome of its handshake.
    pub(super) fn continuing(self, negotiated: Negotiated) -> Self {
        Self {
            begin: Begin::Continued(negotiated),
            ..self
        }
    }

    /// Returns the process that sent a request, with its umask.
    fn caller(&self, request: &Request, umask: u32) -> Caller {
        convert::caller(request, umask, self.mounter)
    }

    fn ledger(&self) -> Option<&Arc<Ledger>> {
        self.overlay.ledger()
    }

    /// Like [`Self::begin_request`], for a request that must not be executed twice.
    fn begin_change(&self, opcode: Opcode, req: &Request) -> Span<'_> {
        let span = self.begin_request(opcode, req);
        let slot = self.ledger().map(|ledger| ledger.begin(req.unique().0));
        point("before a request");
        Span {
            _replied: Some(Replied),
            _slot: slot,
            ..span
        }
    }

    /// Returns the shared state, for a handover to another process.
    pub(super) fn state(&self) -> AdapterState {
        AdapterState {
            files: self.files.clone(),
            backing: self.backing.clone(),
            refused: self.refused.clone(),
            gate: self.gate.clone(),
            rewrites: self.rewrites.clone(),
            negotiated: self.negotiated.clone(),
        }
    }

    /// Counts a request and begins its span, which the handler must drop after the reply.
    fn begin_request(&self, opcode: Opcode, req: &Request) -> Span<'_> {
        let span = RequestSpan::begin(&self.pool, &self.busy_poll, &self.gate);
        if let Some(ledger) = self.ledger()
            && self.begun.load(Ordering::Relaxed) <= PROOF
            && self.begun.fetch_add(1, Ordering::Relaxed) == PROOF
        {
            ledger.note_answered();
        }
        // Counted only when the gate is open, because otherwise another process counts it.
        self.requests.count(opcode);
        Span {
            _replied: None,
            _blame: Blame::begin(req.unique().0, self.requests.crashes()),
            _slot: None,
            span,
        }
    }

    /// Like [`Self::begin_request`], for a request after which the next listing is prepared.
    fn begin_listing(&self, opcode: Opcode, req: &Request) -> Span<'_> {
        let mut span = self.begin_request(opcode, req);
        span.span.set_idle_work(self);
        span
    }

    /// Whether the request of this thread must not be executed, because it has ended two daemons. Logs and counts it.
    fn is_refused(&self, request: &str, ino: INodeNo, name: Option<&OsStr>) -> bool {
        let is_refused = blame::is_refused();
        if is_refused {
            self.requests.count_refused();
            reply::log_refused(request, ino, name);
        }
        is_refused
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
        if self.is_refused(request, ino, name) {
            return Err(Error::Errno(Errno::IO));
        }
        let op = self.overlay.begin();
        let done = panics::request(|| {
            #[cfg(debug_assertions)]
            blame::injected::end_at(request, name);
            run(&op)
        });
        // Also after an error: a failed operation may have copied up a file.
        let stale = op.take_stale();
        drop(op);
        self.invalidate_stale(&stale);
        point("before a reply");
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
