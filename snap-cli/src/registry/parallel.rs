//! Several transfers at a time.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::tree::error::{OnProgress, Progress};

/// The number of simultaneous transfers.
const PARALLEL: usize = 3;

/// The time between two reports of progress.
const REPORT: Duration = Duration::from_millis(100);

/// Runs `transfer` for each object, several at a time, until one fails. Reports the number of bytes that it adds to its
/// counter.
pub(super) fn in_parallel<T: Sync, R: Send>(
    objects: &[T],
    total: u64,
    progress: OnProgress<'_>,
    transfer: impl Fn(&T, &Transfer) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let state = Transfer::default();
    let next = AtomicUsize::new(0);
    let mut done: Vec<(usize, R)> = Vec::new();
    let mut failed = None;
    std::thread::scope(|scope| {
        let (send, results) = mpsc::channel();
        for _ in 0..PARALLEL.min(objects.len()) {
            let (send, state, next, transfer) = (send.clone(), &state, &next, &transfer);
            scope.spawn(move || {
                while !state.stop.load(Ordering::Acquire) {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(object) = objects.get(at) else {
                        return;
                    };
                    let result = transfer(object, state);
                    let is_failed = result.is_err();
                    if send.send((at, result)).is_err() {
                        return;
                    }
                    // After the error was sent: those of the others are its consequences.
                    if is_failed {
                        state.stop.store(true, Ordering::Release);
                    }
                }
            });
        }
        drop(send);
        loop {
            match results.recv_timeout(REPORT) {
                Ok((at, Ok(result))) => done.push((at, result)),
                // The first error is the cause of the others.
                Ok((_, Err(error))) => failed = failed.take().or(Some(error)),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
            progress(Progress {
                entries: done.len() as u64,
                bytes: state.bytes.load(Ordering::Relaxed),
                total: Some(total),
            });
        }
    });
    if let Some(error) = failed {
        return Err(error);
    }
    done.sort_by_key(|(at, _)| *at);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

/// The state of simultaneous transfers.
#[derive(Debug, Default)]
pub(super) struct Transfer {
    /// The number of bytes that were transferred.
    pub(super) bytes: AtomicU64,
    /// Whether another transfer has failed.
    stop: AtomicBool,
}

impl Transfer {
    /// Returns an error if another transfer has failed: then this one is useless.
    pub(super) fn check(&self) -> Result<()> {
        match self.stop.load(Ordering::Acquire) {
            true => Err(Error::failed("another transfer has failed")),
            false => Ok(()),
        }
    }

    /// Waits before the next attempt, unless another transfer fails.
    pub(super) fn wait(&self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(REPORT));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_stops_the_others() {
        let objects = [0, 1, 2, 3, 4];
        let done = in_parallel(&objects, 0, &mut |_| {}, |object, transfer| match object {
            1 => Err(Error::failed("the cause")),
            // Without the failure, these would never end.
            _ => loop {
                transfer.wait(Duration::from_millis(1))?;
            },
        });
        let error: Error = done.map(|_: Vec<()>| ()).unwrap_err();
        assert_eq!(error.to_string(), "the cause");
    }
}
