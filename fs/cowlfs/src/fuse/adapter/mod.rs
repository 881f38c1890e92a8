//! The overlay as the protocol sees it: a request becomes one call of the overlay, and its result one reply. Nothing
//! is decided here.
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
mod reply;

use std::ffi::OsStr;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fuser::{Generation, INodeNo, Notifier};

use self::admission::Refused;
use self::handles::Handles;
use super::passthrough::{Passing, Policy};
use super::serving::Serving;
use super::workers::{Crew, Lookout, Turn};
use crate::requests::{Opcode, Requests};
use cowl_layers::error::Result;
use cowl_overlay::inode::Inode;
use cowl_overlay::{FileHandle, Op, Overlay};

const GENERATION: Generation = Generation(0);

/// The overlay as the protocol sees it.
#[derive(Debug)]
pub(crate) struct Adapter {
    overlay: Arc<Overlay>,
    files: Handles<FileHandle>,
    keep: Duration,
    /// Whether the kernel may keep listings, and knows what it means that folders are not opened.
    keep_listings: bool,
    passing: Passing,
    refused: Refused,
    max_stack_depth: u32,
    /// There once the session is.
    pub(super) notifier: Arc<OnceLock<Notifier>>,
    requests: Arc<Requests>,
    crew: Arc<Crew>,
    lookout: Lookout,
}

impl Adapter {
    pub(super) fn new(
        overlay: Arc<Overlay>,
        serving: &Serving,
        crew: Arc<Crew>,
        lookout: Lookout,
    ) -> Self {
        let policy = if serving.may_pass {
            Policy::new(
                serving.passthrough,
                serving.coherence,
                serving.may_be_pushed,
            )
        } else {
            Policy::OFF
        };
        let passing = Passing::new(policy, overlay.passthrough_writers());
        // An overlayfs of the kernel on this mount wants as little as there is; files of one below it need
        // two.
        let max_stack_depth = if overlay.is_on_overlayfs() { 2 } else { 1 };
        Self {
            overlay,
            passing,
            refused: Refused::default(),
            max_stack_depth,
            files: Handles::default(),
            keep: serving.keep,
            keep_listings: serving.keep_listings,
            notifier: Arc::default(),
            requests: serving.requests.clone(),
            crew,
            lookout,
        }
    }

    /// Begins a request; what this returns is dropped after the reply.
    fn turn(&self, opcode: Opcode) -> Turn<'_> {
        self.requests.count(opcode);
        Turn::begin(&self.crew, &self.lookout)
    }

    /// Runs one operation and invalidates what the kernel caches wrongly since; an error that speaks of a
    /// damaged layer or of the machine is logged once, here.
    fn run<T>(
        &self,
        what: &str,
        ino: INodeNo,
        name: Option<&OsStr>,
        run: impl FnOnce(&Op<'_>) -> Result<T>,
    ) -> Result<T> {
        let op = self.overlay.begin();
        let done = run(&op);
        // A failed call may have copied something up.
        let stale = op.take_stale();
        drop(op);
        self.invalidate_stale(&stale);
        done.inspect_err(|error| reply::log_failure(what, ino, name, *error))
    }

    /// Has the kernel drop the cached attributes of objects that an operation lists. It must happen before the
    /// reply: the caller may rely on them directly after it.
    fn invalidate_stale(&self, stale: &[Arc<Inode>]) {
        for inode in stale {
            let number = self.overlay.inodes().node_id(inode);
            self.invalidate_attr(number);
            if number != inode.ino() {
                self.invalidate_attr(inode.ino());
            }
        }
    }

    /// Has the kernel drop the cached attributes of what it knows by this number.
    ///
    /// A handler may do so: with a negative offset the kernel takes no page lock and no directory lock, and the
    /// request holds a reference to the inode, so that the notification never drops the last one.
    fn invalidate_attr(&self, number: u64) {
        let Some(notifier) = self.notifier.get() else {
            return;
        };
        match notifier.inval_inode(INodeNo(number), -1, 0) {
            Ok(()) => {}
            // The kernel does not know it, and has cached nothing.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => log::warn!("attributes of {number} may be out of date: {error}"),
        }
    }

    /// Neither waits for anything: no request holds a page of a listing while it is on its way.
    fn drop_listing(&self, ino: u64) {
        let Some(notifier) = self.notifier.get() else {
            return;
        };
        match notifier.inval_inode(INodeNo(ino), 0, 0) {
            // The kernel does not know it any more.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => log::warn!("cannot have a listing of {ino} dropped: {error}"),
            Ok(()) => {}
        }
    }
}
