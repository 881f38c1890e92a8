//! The part of the record of state about open files (docs/format.md).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use super::descriptors::ContentDescriptors;
use super::handle::{FileHandle, OpenCounts};
use crate::inode::{Inode, OpenOptions};

/// An open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileRecord {
    /// The number of its inode.
    pub(crate) ino: u64,
    write: bool,
    truncate: bool,
    exec: bool,
    keep_atime: bool,
    errors_seen: u32,
    pushes: u32,
}

impl FileRecord {
    /// Returns the record with content that was last in the upper layer before the latest of `pushes` pushed layers.
    pub(crate) fn before_push(self, pushes: u32) -> Self {
        Self {
            pushes: pushes.wrapping_sub(1),
            ..self
        }
    }
}

impl FileHandle {
    /// Returns the record of the open file.
    pub(crate) fn record(&self) -> FileRecord {
        let Self {
            inode,
            options:
                OpenOptions {
                    write,
                    truncate,
                    exec,
                    keep_atime,
                },
            // A handle for one request is not recorded.
            origin: _,
            errors_seen,
            pushes,
        } = self;
        FileRecord {
            ino: inode.ino(),
            write: *write,
            truncate: *truncate,
            exec: *exec,
            keep_atime: *keep_atime,
            errors_seen: errors_seen.load(Ordering::Acquire),
            pushes: pushes.load(Ordering::Acquire),
        }
    }

    /// Creates the open file of a record, and counts it.
    pub(crate) fn from_record(
        record: &FileRecord,
        inode: &Arc<Inode>,
        opens: &OpenCounts,
        descriptors: &ContentDescriptors,
    ) -> Arc<Self> {
        let options = OpenOptions {
            write: record.write,
            truncate: record.truncate,
            exec: record.exec,
            keep_atime: record.keep_atime,
        };
        let handle = opens.count_open(inode, options);
        descriptors.add_user(&handle, None);
        handle
            .errors_seen
            .store(record.errors_seen, Ordering::Release);
        handle.pushes.store(record.pushes, Ordering::Release);
        handle
    }
}

impl OpenCounts {
    /// Returns the number of pushed layers, for the record of state. The open files determine the other counts.
    pub(crate) fn record(&self) -> u32 {
        let Self {
            writers: _,
            readers: _,
            pushes,
            // Follows from the handshake with the kernel, which is recorded elsewhere.
            are_unknown: _,
            device: _,
        } = self;
        pushes.load(Ordering::Acquire)
    }

    /// Creates the counters of a record, without open files.
    pub(crate) fn from_record(pushes: u32) -> Self {
        Self {
            pushes: AtomicU32::new(pushes),
            ..Self::default()
        }
    }
}
