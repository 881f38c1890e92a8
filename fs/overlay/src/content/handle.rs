//! Open files.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use crate::inode::{Inode, OpenOptions};
use crate::reach::Caller;
use rustix::fs::OFlags;

/// The origin of a write, which decides what it removes from the file besides changing its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// A system call of a process that may keep setuid and setgid; capabilities are removed.
    Privileged,
    /// A system call of any other process: setuid, setgid and capabilities are removed.
    Unprivileged(Caller),
    /// The kernel, with data that was stored through a mapping: on a plain directory nothing is removed.
    Mapping,
}

/// The flags of open(2).
pub(super) fn open_flags(how: OpenOptions) -> OFlags {
    let access = if how.write || how.truncate {
        OFlags::RDWR
    } else {
        OFlags::RDONLY
    };
    access
        | if how.keep_atime {
            OFlags::NOATIME
        } else {
            OFlags::empty()
        }
}

/// A descriptor of a file's content, and the version of the content.
pub(super) type Versioned = (Arc<OwnedFd>, u32);

/// An open file. A descriptor that was opened before the file was copied up follows it.
#[derive(Debug)]
pub struct FileHandle {
    pub(super) inode: Arc<Inode>,
    pub(super) how: OpenOptions,
    /// Opened when a request first needs it.
    pub(super) open: Mutex<Option<Versioned>>,
    /// The number of pushed layers for which the content is known to lie in the upper.
    pub(super) pushes: AtomicU32,
}

impl FileHandle {
    /// Returns the file.
    pub fn inode(&self) -> &Arc<Inode> {
        &self.inode
    }

    /// Whether it can be written through.
    pub fn writes(&self) -> bool {
        self.how.write
    }

    /// Returns how it was opened.
    pub fn how(&self) -> OpenOptions {
        self.how
    }

    /// Returns the descriptor of the content, if it is open, and the version of the content.
    pub fn opened(&self) -> Option<(Arc<OwnedFd>, u32)> {
        self.open.lock().clone()
    }
}

/// The open files of a mount, and the pushed layers.
#[derive(Debug, Default)]
pub(crate) struct OpenCounts {
    writers: AtomicU32,
    readers: AtomicU32,
    /// The number of pushed layers; it changes only with the stack.
    pushes: AtomicU32,
}

impl OpenCounts {
    fn counter(&self, how: OpenOptions) -> &AtomicU32 {
        if how.write {
            &self.writers
        } else {
            &self.readers
        }
    }

    /// Counts an open, and returns its handle.
    pub(super) fn open(
        &self,
        inode: &Arc<Inode>,
        opened: Option<(OwnedFd, u32)>,
        how: OpenOptions,
    ) -> Arc<FileHandle> {
        self.counter(how).fetch_add(1, Ordering::AcqRel);
        inode.count_open(how);
        Arc::new(FileHandle {
            inode: inode.clone(),
            how,
            open: Mutex::new(opened.map(|(fd, version)| (Arc::new(fd), version))),
            pushes: AtomicU32::new(self.pushes()),
        })
    }

    /// Counts the close of a handle.
    pub(crate) fn close(&self, handle: &FileHandle) {
        self.counter(handle.how).fetch_sub(1, Ordering::AcqRel);
        handle.inode.count_close(handle.how);
    }

    /// Returns the number of open descriptors for writing.
    pub(crate) fn writers(&self) -> u32 {
        self.writers.load(Ordering::Acquire)
    }

    /// Returns the number of open descriptors for reading only.
    pub(crate) fn readers(&self) -> u32 {
        self.readers.load(Ordering::Acquire)
    }

    /// Returns the number of pushed layers.
    pub(super) fn pushes(&self) -> u32 {
        self.pushes.load(Ordering::Acquire)
    }

    /// Counts a pushed layer; the caller must hold the stack's exclusive lock.
    pub(crate) fn count_push(&self) {
        self.pushes.fetch_add(1, Ordering::AcqRel);
    }
}
