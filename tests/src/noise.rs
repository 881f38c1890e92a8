//! Somebody who looks at everything in a tree, all the time, beside what a test does in it. Looking changes
//! nothing, so the test's results must not change; and whoever looks must not meet errors that are no
//! answer.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;

use crate::random::{Op, Outcome, RelPath, Rng, Side, Who};
use crate::tree;

/// A thread that looks.
#[derive(Debug)]
pub struct Noise {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<String>>>,
}

impl Noise {
    /// Begins to look at what is in `root`.
    #[must_use]
    pub fn begin(root: &Path, seed: u64) -> Noise {
        let stop = Arc::new(AtomicBool::new(false));
        let (root, ended) = (root.to_owned(), stop.clone());
        let thread = std::thread::spawn(move || look(root, Rng::new(seed), &ended));
        Noise {
            stop,
            thread: Some(thread),
        }
    }

    /// Ends it, and says what it met that it should not.
    pub fn end(mut self) -> Result<(), String> {
        self.stop.store(true, Ordering::Relaxed);
        let wrong = match self.thread.take() {
            Some(thread) => thread.join().unwrap_or_else(|_| vec!["a panic".to_owned()]),
            None => Vec::new(),
        };
        match wrong.first() {
            None => Ok(()),
            Some(first) => Err(format!("who looks on met {} errors: {first}", wrong.len())),
        }
    }
}

impl Drop for Noise {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("who looked on panicked");
        }
    }
}

fn look(root: PathBuf, mut rng: Rng, stop: &AtomicBool) -> Vec<String> {
    // `Side` sets the umask with every step.
    crate::conditions::own_umask();
    let mut side = Side::new(&root);
    let mut wrong = Vec::new();
    let mut known: Vec<RelPath> = Vec::new();
    let mut steps = 0;
    while !stop.load(Ordering::Relaxed) && wrong.len() < 10 {
        if steps % 64 == 0 {
            // Names may go while they are listed.
            known = tree::paths(&root).map_or(known, |paths| paths.all);
        }
        steps += 1;
        // Leave some of the machine to the test itself.
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
        if let Outcome::Failed(error) = side.perform(&op, Who::ROOT)
            && !is_answer(error)
        {
            wrong.push(format!("{op:?}: {error}"));
        }
    }
    wrong
}

/// What a look at a name that goes or changes meanwhile may meet, or at what is no file or folder.
fn is_answer(error: Errno) -> bool {
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
