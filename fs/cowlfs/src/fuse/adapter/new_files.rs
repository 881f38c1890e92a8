//! Predicts whether a program will write little to a file that it creates.
//!
//! For a small file, the registration of a backing file takes longer than the requests that passthrough saves.
//! Programs that create many small files create them one after another, so the last files of a thread predict the
//! next one.

use std::num::NonZeroUsize;

use cowl_layers::locks::Mutex;
use lru::LruCache;
use rustc_hash::FxHashMap;

/// The maximum number of threads that have a score.
const MAX_THREADS: NonZeroUsize = NonZeroUsize::new(64).expect("not zero");

/// The number of small files in a row after which the next one is expected to be small.
const ENOUGH: i32 = 8;

/// The size in bytes up to which a file is small.
const SMALL: u64 = 16 << 10;

/// The number of writes by the daemon that take about as long as a registration.
const FEW_WRITES: u32 = 4;

/// The score of a thread after a wrong prediction. Each small file adds one.
const AFTER_MISTAKE: i32 = -64;

/// The expected size of a file that is being created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// A small file, with a few writes.
    Small,
    /// Nothing is known.
    Unknown,
}

/// A new file that is open.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewFile {
    thread: u32,
    expected: Expected,
    writes: u32,
}

impl NewFile {
    /// Returns the new score of the thread that created the file, whose score was `before`. `size` is the final one.
    fn score(self, before: i32, size: u64) -> i32 {
        let is_small = size <= SMALL && self.writes <= FEW_WRITES;
        match (is_small, self.expected) {
            (true, _) => (before + 1).min(ENOUGH),
            (false, Expected::Unknown) => before.min(0),
            (false, Expected::Small) => AFTER_MISTAKE,
        }
    }
}

#[derive(Debug)]
struct Table {
    scores: LruCache<u32, i32>,
    /// The new files that are open, by handle number.
    open: FxHashMap<u64, NewFile>,
}

/// The new files that are open, and the scores of the threads that create files.
#[derive(Debug)]
pub(super) struct NewFiles(Mutex<Table>);

impl Default for NewFiles {
    fn default() -> Self {
        Self(Mutex::new(Table {
            scores: LruCache::new(MAX_THREADS),
            open: FxHashMap::default(),
        }))
    }
}

impl NewFiles {
    /// Predicts the size of the next file of a thread.
    pub(super) fn expect(&self, thread: u32) -> Expected {
        match self.0.lock().scores.get(&thread) {
            Some(&score) if score >= ENOUGH => Expected::Small,
            _ => Expected::Unknown,
        }
    }

    /// Adds a new file that is open as `number`.
    pub(super) fn insert(&self, number: u64, thread: u32, expected: Expected) {
        let file = NewFile {
            thread,
            expected,
            writes: 0,
        };
        self.0.lock().open.insert(number, file);
    }

    /// Counts a write by the daemon.
    pub(super) fn count_write(&self, number: u64) {
        if let Some(file) = self.0.lock().open.get_mut(&number) {
            file.writes = file.writes.saturating_add(1);
        }
    }

    /// Removes a closed file from the table. Returns `None` if it is not a new one.
    pub(super) fn remove(&self, number: u64) -> Option<NewFile> {
        self.0.lock().open.remove(&number)
    }

    /// Updates the score of the thread that created `file`, a closed file whose final size is `size`.
    pub(super) fn learn(&self, file: NewFile, size: u64) {
        let mut table = self.0.lock();
        let before = table.scores.get(&file.thread).copied().unwrap_or(0);
        table.scores.put(file.thread, file.score(before, size));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Creates a file and closes it, and returns what was expected of it.
    fn create(files: &NewFiles, thread: u32, size: u64, writes: u32) -> Expected {
        let expected = files.expect(thread);
        files.insert(7, thread, expected);
        (0..writes).for_each(|_| files.count_write(7));
        let file = files.remove(7).unwrap();
        files.learn(file, size);
        expected
    }

    fn files_until_small(files: &NewFiles, thread: u32) -> usize {
        let created = (0..1000).map(|_| create(files, thread, SMALL, 1));
        created
            .take_while(|&expected| expected == Expected::Unknown)
            .count()
    }

    #[test]
    fn small_files_predict_small_ones_of_the_same_thread() {
        let files = NewFiles::default();
        assert_eq!(files_until_small(&files, 1), 8);
        assert_eq!(files.expect(1), Expected::Small);
        assert_eq!(files.expect(2), Expected::Unknown);
        assert!(files.remove(7).is_none(), "it is closed");
    }

    #[test]
    fn a_mistake_has_a_lasting_effect_and_a_known_large_file_a_short_one() {
        for (size, writes) in [(SMALL + 1, 1), (10, FEW_WRITES + 1)] {
            let files = NewFiles::default();
            files_until_small(&files, 1);
            assert_eq!(create(&files, 1, size, writes), Expected::Small);
            assert_eq!(files_until_small(&files, 1), 64 + 8);
        }
        let files = NewFiles::default();
        create(&files, 1, SMALL, 1);
        create(&files, 1, SMALL + 1, 0);
        assert_eq!(files_until_small(&files, 1), 8);
    }

    #[test]
    fn threads_are_bounded() {
        let files = NewFiles::default();
        files_until_small(&files, 1);
        for thread in 2..1000 {
            create(&files, thread, 1, 1);
        }
        assert_eq!(files.expect(1), Expected::Unknown);
        assert_eq!(files.0.lock().scores.len(), 64);
    }
}
