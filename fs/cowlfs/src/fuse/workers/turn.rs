//! A thread's turn at one request; after it, it looks out for the next one before it sleeps.
//!
//! Most of what a request costs is waking up: the program's CPU wakes the daemon on another one, and the
//! daemon wakes the program again, 10 to 40 microseconds each where an idle CPU has been halted. A
//! program that waits for an answer sends its next request a few microseconds after it. So a thread that
//! has answered looks at the device for a moment before it sleeps in read(2). One thread at a time does
//! so, and only as long as it pays: where requests come seldom it costs nothing.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::crew::Crew;
use cowl_layers::sys;

/// After so many vain looks none is taken...
const VAIN: u32 = 8;
/// ...but one in so many turns, to see whether times have changed.
const SELDOM: u32 = 64;

/// Looks out for requests.
#[derive(Debug)]
pub(in crate::fuse) struct Lookout {
    device: OwnedFd,
    window: Duration,
    taken: AtomicBool,
    /// How many looks in a row were in vain.
    vain: AtomicU32,
    /// Turns since that became too many.
    passed: AtomicU32,
}

impl Lookout {
    /// On this device, for `window` at a time; never when that is zero.
    pub(in crate::fuse) fn new(device: OwnedFd, window: Duration) -> Self {
        Self {
            device,
            window,
            taken: AtomicBool::new(false),
            vain: AtomicU32::new(0),
            passed: AtomicU32::new(0),
        }
    }

    /// Comes back when there is a request, when `window` is over, or at once. Says whether one was there
    /// already.
    fn look(&self) -> bool {
        if self.window.is_zero() || !self.pays() || self.taken.swap(true, Ordering::Acquire) {
            return false;
        }
        let at_once = sys::process::is_readable(&self.device);
        let until = Instant::now() + self.window;
        let mut found = at_once;
        while !found && Instant::now() < until {
            found = sys::process::is_readable(&self.device);
        }
        if found {
            self.vain.store(0, Ordering::Relaxed);
        } else {
            self.vain.fetch_add(1, Ordering::Relaxed);
        }
        self.taken.store(false, Ordering::Release);
        at_once
    }

    fn pays(&self) -> bool {
        self.vain.load(Ordering::Relaxed) < VAIN
            || self
                .passed
                .fetch_add(1, Ordering::Relaxed)
                .is_multiple_of(SELDOM)
    }
}

/// One request, from its arrival until after its reply.
pub(in crate::fuse) struct Turn<'a> {
    crew: &'a Crew,
    lookout: &'a Lookout,
}

impl<'a> Turn<'a> {
    /// The calling thread has a request.
    pub(in crate::fuse) fn begin(crew: &'a Arc<Crew>, lookout: &'a Lookout) -> Self {
        crew.begin();
        Self { crew, lookout }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        // A thread that panics ends, and must not be parked before.
        if std::thread::panicking() {
            return;
        }
        if self.crew.finish() && self.lookout.look() {
            self.crew.was_pressed();
        }
    }
}
