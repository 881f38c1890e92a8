//! Memory that other processes can map, and that therefore survives the process that writes it.

#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

use crate::error::{Errno, Error, Result};

const WORD: usize = size_of::<u64>();

/// A shared mapping of a memory file (memfd_create(2)), as words that are accessed atomically.
///
/// Only the pages that were written use memory, so the size may be far above the memory that is needed.
#[derive(Debug)]
pub struct SharedMemory {
    file: OwnedFd,
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: all accesses to the mapping are atomic, and nothing else refers to it.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Creates a memory file of `bytes` zero bytes, and maps it. Fails with EFBIG if RLIMIT_FSIZE is lower, and with
    /// ENOMEM if RLIMIT_AS is.
    pub fn create(name: &str, bytes: usize) -> Result<Self> {
        let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, bytes as u64)?;
        Self::map(file, bytes)
    }

    /// Maps a memory file that [`Self::create`] created, in this or in another process.
    pub fn open(file: OwnedFd) -> Result<Self> {
        let size = rustix::fs::fstat(&file)?.st_size;
        let bytes = usize::try_from(size).map_err(|_| Error::Errno(Errno::INVAL))?;
        Self::map(file, bytes)
    }

    fn map(file: OwnedFd, bytes: usize) -> Result<Self> {
        let words = bytes / WORD;
        if words == 0 {
            return Err(Error::Errno(Errno::INVAL));
        }
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses an unused range of addresses, so the mapping replaces nothing.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), words * WORD, access, flags, &file, 0)?
        };
        let start = NonNull::new(start.cast()).ok_or(Error::Errno(Errno::NOMEM))?;
        Ok(Self { file, start, words })
    }

    /// Returns the words.
    ///
    /// The process gets SIGBUS if the file is truncated, which only a process can do that got the descriptor.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has this many words, is aligned to a page, and exists as long as `self`. Other processes
        // may change a word at any time, which atomic types permit.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }

    /// Returns a word; 0 beyond the end.
    pub fn load(&self, at: usize) -> u64 {
        let word = self.words().get(at);
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Stores a word, after everything that this thread stored before. Has no effect beyond the end.
    pub fn store(&self, at: usize, value: u64) {
        if let Some(word) = self.words().get(at) {
            word.store(value, Ordering::Release);
        }
    }

    /// Stores bytes from the word `at` on, padded with zero bytes.
    pub fn store_bytes(&self, at: usize, bytes: &[u8]) {
        let words = self.words().get(at..).unwrap_or_default();
        for (word, chunk) in words.iter().zip(bytes.chunks(WORD)) {
            let mut value = [0; WORD];
            for (to, from) in value.iter_mut().zip(chunk) {
                *to = *from;
            }
            word.store(u64::from_le_bytes(value), Ordering::Relaxed);
        }
    }

    /// Returns `length` bytes from the word `at` on; fewer at the end.
    pub fn load_bytes(&self, at: usize, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length.next_multiple_of(WORD));
        self.load_into(at, length, &mut bytes);
        bytes
    }

    /// Replaces the content of `bytes` by `length` bytes from the word `at` on; fewer at the end.
    pub fn load_into(&self, at: usize, length: usize, bytes: &mut Vec<u8>) {
        bytes.clear();
        let words = self.words().get(at..).unwrap_or_default();
        for word in words.iter().take(length.div_ceil(WORD)) {
            bytes.extend(word.load(Ordering::Acquire).to_le_bytes());
        }
        bytes.truncate(length);
    }

    /// Returns the number of words.
    pub fn len(&self) -> usize {
        self.words
    }

    /// Whether there are no words.
    pub fn is_empty(&self) -> bool {
        self.words == 0
    }

    /// Frees the memory of all pages; the words are zero afterwards.
    pub fn erase(&self) -> Result<()> {
        let (mode, end) = (
            rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
            (self.words * WORD) as u64,
        );
        Ok(rustix::fs::fallocate(&self.file, mode, 0, end)?)
    }
}

/// Returns zero words in memory that this process shares with those that it forks. They are never unmapped.
pub fn inherited(words: usize) -> Result<&'static [AtomicU64]> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses an unused range of addresses, so the mapping replaces nothing.
    let start = unsafe {
        rustix::mm::mmap_anonymous(std::ptr::null_mut(), words * WORD, access, MapFlags::SHARED)?
    };
    // SAFETY: the mapping has this many words, is aligned to a page, and is never unmapped. Other processes may change a
    // word at any time, which atomic types permit.
    Ok(unsafe { std::slice::from_raw_parts(start.cast(), words) })
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more, because `words` borrows `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.words * WORD) };
        if let Err(error) = unmapped {
            log::error!("munmap: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_mapping_sees_what_was_stored() {
        let memory = SharedMemory::create("test", 1 << 20).unwrap();
        memory.store(3, 7);
        memory.store_bytes(10, b"twelve bytes");
        let other = SharedMemory::open(memory.as_fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(other.len(), memory.len());
        assert_eq!(other.load(3), 7);
        assert_eq!(other.load_bytes(10, 12), b"twelve bytes");
        assert_eq!(other.load_bytes(10, 9), b"twelve by");
        other.erase().unwrap();
        assert_eq!(memory.load(3), 0);
    }

    #[test]
    fn accesses_beyond_the_end_have_no_effect() {
        let memory = SharedMemory::create("test", 4096).unwrap();
        memory.store(memory.len(), 7);
        memory.store_bytes(memory.len() - 1, b"longer than one word");
        assert_eq!(memory.load(memory.len()), 0);
        assert_eq!(memory.load_bytes(memory.len() - 1, 20).len(), 8);
    }
}
