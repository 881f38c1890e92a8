//! Several transfers at a time.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, mpsc};
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

/// Transfers the objects that `produce` adds to a queue, several at a time. `produce` runs in this thread, and reports its
/// own progress; the progress of the transfers is reported after it.
///
/// Returns the result of `produce`, and those of the transfers in any order.
pub(super) fn through_queue<T: Send, R: Send, P>(
    transfer: impl Fn(&T, &Transfer) -> Result<R> + Sync,
    produce: impl FnOnce(&Queue<T>) -> Result<P>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(P, Vec<R>)> {
    let queue = Queue::default();
    let results = Mutex::new(Vec::new());
    let produced = std::thread::scope(|scope| {
        for _ in 0..PARALLEL {
            scope.spawn(|| queue.work(&transfer, &results));
        }
        let produced = {
            let mut ending = Ending {
                queue: &queue,
                is_complete: false,
            };
            let produced = produce(&queue);
            ending.is_complete = produced.is_ok();
            produced
        };
        while queue.wait_for_end() {
            progress(Progress {
                entries: lock(&results).len() as u64,
                bytes: queue.transfer.bytes.load(Ordering::Relaxed),
                total: Some(queue.total.load(Ordering::Relaxed)),
            });
        }
        produced
    });
    // The failure of a transfer is the cause of that of `produce`.
    if let Some(error) = lock(&queue.state).failed.take() {
        return Err(error);
    }
    let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok((produced?, results))
}

/// A queue of objects to be transferred. It holds few of them, because each occupies space on the disk.
#[derive(Debug)]
pub struct Queue<T> {
    state: Mutex<QueueState<T>>,
    changed: Condvar,
    transfer: Transfer,
    /// The number of bytes of all objects so far.
    total: AtomicU64,
}

#[derive(Debug)]
struct QueueState<T> {
    waiting: VecDeque<T>,
    /// The number of objects that are being transferred.
    active: usize,
    is_closed: bool,
    failed: Option<Error>,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            state: Mutex::new(QueueState {
                waiting: VecDeque::new(),
                active: 0,
                is_closed: false,
                failed: None,
            }),
            changed: Condvar::new(),
            transfer: Transfer::default(),
            total: AtomicU64::new(0),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T> Queue<T> {
    /// Adds an object of `size` bytes. Waits while the maximum number of objects is in transfer. Fails if a transfer has
    /// failed.
    pub fn push(&self, object: T, size: u64) -> Result<()> {
        let mut state = lock(&self.state);
        while state.active + state.waiting.len() >= PARALLEL && state.failed.is_none() {
            state = self.wait(state);
        }
        self.transfer.check()?;
        self.total.fetch_add(size, Ordering::Relaxed);
        state.waiting.push_back(object);
        self.changed.notify_all();
        Ok(())
    }

    /// Returns an error if a transfer has failed: then further objects are useless.
    pub fn check(&self) -> Result<()> {
        self.transfer.check()
    }

    /// Waits for the transfers of all objects so far. Returns whether there were any.
    pub fn drain(&self) -> Result<bool> {
        let mut state = lock(&self.state);
        let mut waited = false;
        while state.active + state.waiting.len() > 0 && state.failed.is_none() {
            waited = true;
            state = self.wait(state);
        }
        self.transfer.check()?;
        Ok(waited)
    }

    fn wait<'s>(&self, state: MutexGuard<'s, QueueState<T>>) -> MutexGuard<'s, QueueState<T>> {
        let woken = self.changed.wait(state);
        woken.unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the queue after the objects in it; if it is not complete, at once.
    fn close(&self, is_complete: bool) {
        let mut state = lock(&self.state);
        state.is_closed = true;
        if !is_complete {
            state.waiting.clear();
            self.transfer.stop.store(true, Ordering::Release);
        }
        self.changed.notify_all();
    }

    /// Waits a moment. Returns whether transfers are left.
    fn wait_for_end(&self) -> bool {
        let state = lock(&self.state);
        if state.active + state.waiting.len() == 0 {
            return false;
        }
        let woken = self.changed.wait_timeout(state, REPORT);
        let (state, _) = woken.unwrap_or_else(PoisonError::into_inner);
        state.active + state.waiting.len() > 0
    }

    /// Transfers objects until the queue ends, or a transfer fails.
    fn work<R>(&self, transfer: impl Fn(&T, &Transfer) -> Result<R>, results: &Mutex<Vec<R>>) {
        let mut state = lock(&self.state);
        loop {
            let Some(object) = state.waiting.pop_front() else {
                if state.is_closed || state.failed.is_some() {
                    return;
                }
                state = self.wait(state);
                continue;
            };
            state.active += 1;
            drop(state);
            let active = Active(self);
            match transfer(&object, &self.transfer) {
                Ok(result) => lock(results).push(result),
                Err(error) => self.fail(error),
            }
            drop(active);
            state = lock(&self.state);
        }
    }

    fn fail(&self, error: Error) {
        let mut state = lock(&self.state);
        // Those after the stop are its consequences.
        if !self.transfer.stop.swap(true, Ordering::AcqRel) {
            state.failed = Some(error);
        }
        state.waiting.clear();
    }
}

/// Ends a queue on drop, also after a panic: the threads would wait for ever.
struct Ending<'q, T> {
    queue: &'q Queue<T>,
    is_complete: bool,
}

impl<T> Drop for Ending<'_, T> {
    fn drop(&mut self) {
        self.queue.close(self.is_complete);
    }
}

/// Counts an object that is being transferred, until it is dropped.
struct Active<'q, T>(&'q Queue<T>);

impl<T> Drop for Active<'_, T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(Error::failed("a transfer has panicked"));
        }
        lock(&self.0.state).active -= 1;
        self.0.changed.notify_all();
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

    #[test]
    fn a_queue_holds_few_objects_and_transfers_all() {
        let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let done = through_queue(
            |object: &u64, _| {
                most.fetch_max(now.load(Ordering::SeqCst), Ordering::SeqCst);
                now.fetch_sub(1, Ordering::SeqCst);
                Ok(*object)
            },
            |queue| {
                for object in 0..50 {
                    now.fetch_add(1, Ordering::SeqCst);
                    queue.push(object, 1)?;
                }
                queue.drain()?;
                assert!(!queue.drain()?);
                Ok("produced")
            },
            &mut |_| {},
        );
        let (produced, mut results) = done.unwrap();
        results.sort_unstable();
        assert_eq!((produced, results), ("produced", (0..50).collect()));
        assert!(most.load(Ordering::SeqCst) <= PARALLEL + 1);
    }

    #[test]
    fn a_failed_transfer_stops_the_producer() {
        let done: Result<((), Vec<()>)> = through_queue(
            |object: &u64, _| match object {
                3 => Err(Error::failed("the cause")),
                _ => Ok(()),
            },
            |queue| loop {
                queue.push(3, 1)?;
            },
            &mut |_| {},
        );
        assert_eq!(done.unwrap_err().to_string(), "the cause");
    }

    #[test]
    fn a_failed_producer_stops_the_transfers() {
        let done: Result<((), Vec<()>)> = through_queue(
            |_: &u64, transfer| loop {
                transfer.wait(Duration::from_millis(1))?;
            },
            |queue| {
                queue.push(1, 1)?;
                Err(Error::failed("the producer"))
            },
            &mut |_| {},
        );
        assert_eq!(done.unwrap_err().to_string(), "the producer");
    }
}
