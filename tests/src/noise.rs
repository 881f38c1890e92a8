//! A thread that reads everything in a tree while a test changes it. Reads must not affect the results of the test, and
//! must not fail with unexpected errors.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;

use crate::random::{Caller, Op, Outcome, RelPath, Rng, Side};
use crate::tree;

/// A concurrent reader.
#[derive(Debug)]
pub struct Noise {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<String>>>,
}

impl Noise {
    /// Starts to read the tree at `root`.
    #[must_use]
    pub fn begin(root: &Path, seed: u64) -> Noise {
        let stop = Arc::new(AtomicBool::new(false));
        let (root, ended) = (root.to_owned(), stop.clone());
        let thread = std::thread::spawn(move || read_randomly(root, Rng::new(seed), &ended));
        Noise {
            stop,
            thread: Some(thread),
        }
    }

    /// Stops the thread, and returns an error if it got unexpected errors.
    pub fn end(mut self) -> Result<(), String> {
        self.stop.store(true, Ordering::Relaxed);
        let wrong = match self.thread.take() {
            Some(thread) => thread.join().unwrap_or_else(|_| vec!["a panic".to_owned()]),
            None => Vec::new(),
        };
        match wrong.first() {
            None => Ok(()),
            Some(first) => Err(format!(
                "the concurrent reader got {} unexpected errors: {first}",
                wrong.len()
            )),
        }
    }
}

impl Drop for Noise {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("the concurrent reader panicked");
        }
    }
}

fn read_randomly(root: PathBuf, mut rng: Rng, stop: &AtomicBool) -> Vec<String> {
    // `Side` sets the umask with every step.
    crate::conditions::own_umask();
    let mut side = Side::new(&root);
    let mut wrong = Vec::new();
    let mut known: Vec<RelPath> = Vec::new();
    let mut steps = 0;
    while !stop.load(Ordering::Relaxed) && wrong.len() < 10 {
        if steps % 64 == 0 {
            // If a directory is removed during the listing, the previous paths are used.
            known = tree::paths(&root).map_or(known, |paths| paths.all);
        }
        steps += 1;
        // Leaves CPU time to the test itself.
        std::thread::sleep(Duration::from_micros(200));
        if known.is_empty() {
            continue;
        }
        let path = rng.pick(&known);
        let op = match rng.below(6) {
            0 | 1 => Op::Stat {
                path,
                follow: false,
            },
            2 => Op::List { path },
            3 => Op::Read { path },
            4 => Op::Xattrs { path },
            _ => Op::Readlink { path },
        };
        if let Outcome::Failed(error) = side.perform(&op, Caller::ROOT)
            && !is_expected(error)
        {
            wrong.push(format!("{op:?}: {error}"));
        }
    }
    wrong
}

/// Returns whether an error is possible for a path that is removed or replaced concurrently, or that has another type.
fn is_expected(error: Errno) -> bool {
    matches!(
        error,
        Errno::NOENT
            | Errno::NOTDIR
            | Errno::ISDIR
            | Errno::LOOP
            | Errno::INVAL
            | Errno::NXIO
            | Errno::NODATA
            | Errno::NOTSUP
            | Errno::NAMETOOLONG
    )
}
