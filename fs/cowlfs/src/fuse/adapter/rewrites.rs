//! Starts writeback of files that a program has truncated and written, on a mount without open requests.
//!
//! ext4, XFS and btrfs start it when such a file is closed, and so does the daemon when it is notified of the close
//! (docs/decisions/0012). Without that request, it starts the writeback when the file has not been written for a moment.

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustc_hash::FxHashMap;

use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::sys::early;
use cowl_overlay::Overlay;
use cowl_overlay::unopened::truncated_descriptor;

/// The time without a write after which a file counts as closed.
const QUIET: Duration = Duration::from_millis(200);

/// The maximum number of pending files. For any further file, the first write starts the writeback.
const MAX_PENDING: usize = 1024;

/// Truncated files that are being written, by node id, with the times at which they count as closed.
pub(super) struct Rewrites {
    start: Start,
    state: Mutex<State>,
    changed: Condvar,
}

/// Starts the writeback of files, by node id. Returns false if the overlay was dropped.
type Start = Box<dyn Fn(&[u64]) -> bool + Send + Sync>;

#[derive(Debug, Default)]
struct State {
    pending: FxHashMap<u64, Instant>,
    /// The files whose writeback the thread starts at the moment.
    due: Vec<u64>,
    has_thread: bool,
}

impl fmt::Debug for Rewrites {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rewrites")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Rewrites {
    pub(super) fn new(overlay: &Arc<Overlay>) -> Arc<Self> {
        let overlay = Arc::downgrade(overlay);
        Self::starting(Box::new(move |files| match overlay.upgrade() {
            Some(overlay) => {
                start_each(&overlay, files);
                true
            }
            None => false,
        }))
    }

    fn starting(start: Start) -> Arc<Self> {
        Arc::new(Self {
            start,
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Records a write to a truncated file. Returns whether the caller must start the writeback itself.
    pub(super) fn note_write(self: &Arc<Self>, ino: u64) -> bool {
        let mut state = self.state.lock();
        if state.pending.len() >= MAX_PENDING && !state.pending.contains_key(&ino) {
            return true;
        }
        if !state.has_thread {
            let rewrites = self.clone();
            let thread = thread::Builder::new().name("rewrites".to_owned());
            if let Err(error) = thread.spawn(move || rewrites.run()) {
                log::warn!("cannot start a thread: {error}");
                return true;
            }
            state.has_thread = true;
        }
        if state.pending.is_empty() {
            self.changed.notify_one();
        }
        state.pending.insert(ino, Instant::now() + QUIET);
        false
    }

    /// Starts the writeback of a pending file that the kernel is about to forget: its node id is unknown afterwards.
    pub(super) fn note_forget(&self, ino: u64) {
        let is_pending = {
            let mut state = self.state.lock();
            state.pending.remove(&ino).is_some() || state.due.contains(&ino)
        };
        if is_pending {
            (self.start)(&[ino]);
        }
    }

    /// Waits until files are no longer written, and starts their writeback. Ends at the first such file after the overlay
    /// was dropped, otherwise with the process.
    fn run(&self) {
        loop {
            let due = self.wait();
            if !(self.start)(&due) {
                return;
            }
        }
    }

    /// Starts the writeback of all pending files.
    pub(super) fn start_pending(&self) {
        let pending = std::mem::take(&mut self.state.lock().pending);
        let files: Vec<u64> = pending.into_keys().collect();
        (self.start)(&files);
    }

    /// Returns the files that are no longer written, at least one.
    fn wait(&self) -> Vec<u64> {
        let mut state = self.state.lock();
        loop {
            let now = Instant::now();
            let due: Vec<u64> = (state.pending.extract_if(|_, at| *at <= now))
                .map(|(ino, _)| ino)
                .collect();
            state.due.clone_from(&due);
            if !due.is_empty() {
                return due;
            }
            match state.pending.values().min().copied() {
                None => self.changed.wait(&mut state),
                Some(next) => {
                    let _timed_out = self.changed.wait_until(&mut state, next);
                }
            }
        }
    }
}

fn start_each(overlay: &Overlay, files: &[u64]) {
    for ino in files {
        if let Err(error) = start(overlay, *ino) {
            log::debug!("cannot start writeback of inode {ino}: {error}");
        }
    }
}

/// Starts the writeback of a file that was truncated, as its close would.
fn start(overlay: &Overlay, ino: u64) -> Result<()> {
    match truncated_descriptor(overlay, ino) {
        // The kernel has forgotten it.
        Err(Error::Errno(Errno::STALE)) => Ok(()),
        found => {
            // Neither the operation nor the inode is held during the writeback.
            found?.iter().for_each(early::start);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use cowl_layers::format::XattrSpace;
    use cowl_layers::layer::Layer;
    use cowl_overlay::OverlayOptions;

    use super::*;

    #[test]
    fn nothing_is_pending_when_another_process_takes_over() {
        let dir = tempfile::tempdir().unwrap();
        let layer = Layer::open(dir.path(), XattrSpace::detect()).unwrap();
        let overlay = Overlay::new(None, vec![layer], OverlayOptions::default()).unwrap();
        let overlay = Arc::new(overlay);
        let rewrites = Rewrites::new(&overlay);
        assert!(!rewrites.note_write(77));
        rewrites.start_pending();
        assert!(rewrites.state.lock().pending.is_empty());
        for ino in 0..MAX_PENDING as u64 {
            // It would be due in a year, and is not started by the thread.
            let at = Instant::now() + Duration::from_secs(31_536_000);
            rewrites.state.lock().pending.insert(ino, at);
        }
        assert!(rewrites.note_write(u64::MAX), "one too many");
        rewrites.start_pending();
        assert!(!rewrites.note_write(u64::MAX));
    }

    /// Returns rewrites that only record the files whose writeback they start.
    fn recording() -> (Arc<Rewrites>, std::sync::mpsc::Receiver<Vec<u64>>) {
        let (sender, started) = std::sync::mpsc::channel();
        let start = move |files: &[u64]| sender.send(files.to_vec()).is_ok();
        (Rewrites::starting(Box::new(start)), started)
    }

    #[test]
    fn writeback_of_a_pending_file_starts_when_the_kernel_forgets_it() {
        let (rewrites, started) = recording();
        let at = Instant::now() + Duration::from_secs(31_536_000);
        rewrites.state.lock().pending.extend([(77, at), (78, at)]);
        rewrites.note_forget(77);
        assert_eq!(started.try_recv(), Ok(vec![77]));
        let pending: Vec<u64> = rewrites.state.lock().pending.keys().copied().collect();
        assert_eq!(pending, [78]);
        // The thread may not have found the file yet.
        rewrites.state.lock().due = vec![80];
        rewrites.note_forget(80);
        assert_eq!(started.try_recv(), Ok(vec![80]));
        for not_pending in [77, 79] {
            rewrites.note_forget(not_pending);
            assert!(started.try_recv().is_err(), "{not_pending}");
        }
    }

    #[test]
    fn writeback_starts_once_a_file_is_no_longer_written() {
        let (rewrites, started) = recording();
        // An earlier write, after which it would be due. A further write postpones that.
        let begin = Instant::now();
        rewrites.state.lock().pending.insert(5, begin);
        assert!(!rewrites.note_write(5));
        assert_eq!(started.recv(), Ok(vec![5]));
        assert!(begin.elapsed() >= QUIET);
        assert!(rewrites.state.lock().pending.is_empty());
    }
}
