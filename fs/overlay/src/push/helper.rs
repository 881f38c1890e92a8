//! Work that may wait for the lock of a file, in a thread of its own.
//!
//! A program that writes by passthrough holds the lock of its file, and may wait for a request: its buffer can be a
//! mapping of another file of the mount. Code that waits for that lock while requests wait therefore needs a limit.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::sys::fault::{self, Injection};

/// Work in another thread.
#[derive(Debug)]
pub(super) struct Helper<T>(Receiver<(T, Injection)>);

/// The state of work at a deadline: completed, or still in progress.
#[derive(Debug)]
pub(super) enum Ran<T> {
    Done(T),
    Late(Helper<T>),
}

/// Does work, and returns at the deadline at the latest.
pub(super) fn run_until<T: Send + 'static>(
    deadline: Instant,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Ran<T>> {
    let (send, receive) = channel();
    let injection = fault::take();
    let started = Builder::new().name("cowlfs-push".into()).spawn(move || {
        fault::give(injection);
        let done = work();
        // The receiver may no longer wait.
        drop(send.send((done, fault::take())));
    });
    started.map_err(|error| Error::Errno(Errno::from_io_error(&error).unwrap_or(Errno::AGAIN)))?;
    Helper(receive).wait(Some(deadline))
}

impl<T> Helper<T> {
    /// Waits for the end of the work, or for the deadline.
    pub(super) fn wait(self, deadline: Option<Instant>) -> Result<Ran<T>> {
        let ended = match deadline {
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                self.0.recv_timeout(left.max(Duration::from_millis(1)))
            }
            None => self.0.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match ended {
            Ok((done, injection)) => {
                fault::give(injection);
                Ok(Ran::Done(done))
            }
            Err(RecvTimeoutError::Timeout) => Ok(Ran::Late(self)),
            // It panicked.
            Err(RecvTimeoutError::Disconnected) => Err(Error::Errno(Errno::IO)),
        }
    }

    /// Waits for the end of the work.
    pub(super) fn join(self) -> Result<T> {
        match self.wait(None)? {
            Ran::Done(done) => Ok(done),
            Ran::Late(_) => Err(Error::Errno(Errno::IO)),
        }
    }
}
