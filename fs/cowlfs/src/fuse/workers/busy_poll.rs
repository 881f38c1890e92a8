//! Busy-polling: a thread that has answered a request polls for the next one before it sleeps.
//!
//! Most of the cost of a request is wakeups: the program's CPU wakes the daemon on another one, and the daemon wakes
//! the program again, 10 to 40 microseconds each if the idle CPU was halted. A program that waits for an answer sends
//! its next request a few microseconds after it. So a thread that has answered polls the device for a moment before
//! it sleeps in read(2). Only one thread polls at a time, and only as long as polling finds requests: if they are
//! rare, it costs nothing.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::gate::{Gate, Passage};
use super::pool::WorkerPool;
use cowl_layers::sys;

/// The number of unsuccessful polls in a row after which threads stop polling...
const MAX_MISSES: u32 = 8;
/// ...except after one request in this many, to detect that requests have become frequent again.
const PROBE_INTERVAL: u32 = 64;

/// Polls the device for requests.
#[derive(Debug)]
pub(in crate::fuse) struct BusyPoll {
    device: OwnedFd,
    window: Duration,
    /// A thread is polling.
    is_polling: AtomicBool,
    /// The number of unsuccessful polls in a row.
    misses: AtomicU32,
    /// The number of polls skipped since there were too many misses.
    skipped: AtomicU32,
}

impl BusyPoll {
    /// Creates a poller of `device`. One poll lasts at most `window`; zero disables polling.
    pub(in crate::fuse) fn new(device: OwnedFd, window: Duration) -> Self {
        Self {
            device,
            window,
            is_polling: AtomicBool::new(false),
            misses: AtomicU32::new(0),
            skipped: AtomicU32::new(0),
        }
    }

    /// Polls until a request arrives or the window is over, unless polling is not worthwhile.
    ///
    /// Returns whether a request was pending at the start.
    fn poll(&self) -> bool {
        if self.window.is_zero()
            || !self.is_worthwhile()
            || self.is_polling.swap(true, Ordering::Acquire)
        {
            return false;
        }
        let was_pending = sys::process::is_readable(&self.device);
        let until = Instant::now() + self.window;
        let mut found = was_pending;
        while !found && Instant::now() < until {
            found = sys::process::is_readable(&self.device);
        }
        if found {
            self.misses.store(0, Ordering::Relaxed);
        } else {
            self.misses.fetch_add(1, Ordering::Relaxed);
        }
        self.is_polling.store(false, Ordering::Release);
        was_pending
    }

    fn is_worthwhile(&self) -> bool {
        self.misses.load(Ordering::Relaxed) < MAX_MISSES
            || self
                .skipped
                .fetch_add(1, Ordering::Relaxed)
                .is_multiple_of(PROBE_INTERVAL)
    }
}

/// The time that a thread spends on one request, from its arrival until after its reply.
///
/// When it is dropped, the thread polls for the next request, or is parked.
pub(in crate::fuse) struct RequestSpan<'a> {
    pool: &'a WorkerPool,
    busy_poll: &'a BusyPoll,
    gate: &'a Gate,
    /// Work that the next request may interrupt.
    idle_work: Option<&'a dyn IdleWork>,
    /// `None` once the reply was sent.
    passage: Option<Passage<'a>>,
}

impl<'a> RequestSpan<'a> {
    /// Begins the span of a request that the calling thread has read, when the gate is open.
    pub(in crate::fuse) fn begin(
        pool: &'a Arc<WorkerPool>,
        busy_poll: &'a BusyPoll,
        gate: &'a Gate,
    ) -> Self {
        pool.begin_request();
        Self {
            pool,
            busy_poll,
            gate,
            idle_work: None,
            passage: Some(gate.pass()),
        }
    }

    /// Sets the work that the thread does after the reply, before it polls for the next request.
    ///
    /// During that work, the thread counts as waiting for a request. If it counted as busy, the monitor would wake
    /// another one.
    pub(in crate::fuse) fn set_idle_work(&mut self, work: &'a dyn IdleWork) {
        self.idle_work = Some(work);
    }
}

/// Work that a thread does while it has no request.
pub(in crate::fuse) trait IdleWork {
    /// Does a part of the work. Returns whether there is more.
    ///
    /// A part delays a request that arrives meanwhile. The next part may never be requested.
    fn step(&self) -> bool;
}

impl Drop for RequestSpan<'_> {
    fn drop(&mut self) {
        // Before the thread polls or is parked.
        drop(self.passage.take());
        // A thread that panics exits, and its exit releases the parked threads: it must not be parked itself.
        if std::thread::panicking() {
            return;
        }
        if !self.pool.end_request() {
            return;
        }
        if let Some(work) = self.idle_work {
            let _working = self.pool.begin_idle_work();
            while !sys::process::is_readable(&self.busy_poll.device)
                && let Some(_passage) = self.gate.try_pass()
                && work.step()
            {}
        }
        if self.busy_poll.poll() {
            self.pool.count_queued();
        }
    }
}
