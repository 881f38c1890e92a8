//! Open files and their counters.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use crate::inode::{Inode, OpenOptions};
use crate::reach::Caller;
use cowl_layers::sys::users::{Device, writes_to};
use rustix::fs::OFlags;

/// The origin of a write, which decides whether it removes setuid, setgid and capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// A system call of a process with CAP_FSETID: only capabilities are removed.
    Privileged,
    /// A system call of any other process: setuid, setgid and capabilities are removed.
    Unprivileged(Caller),
    /// Write-back of a shared mapping by the kernel: nothing is removed, as on a plain directory.
    Mapping,
}

/// Returns the flags of open(2) for a file's content.
pub(super) fn open_flags(options: OpenOptions) -> OFlags {
    let access = if options.write || options.truncate {
        OFlags::RDWR
    } else {
        OFlags::RDONLY
    };
    access
        | if options.keep_atime {
            OFlags::NOATIME
        } else {
            OFlags::empty()
        }
}

/// A descriptor of a file's content, and the version of the content.
pub type VersionedDescriptor = (Arc<OwnedFd>, u32);

/// The origin of a handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// A request to open the file. The handle is counted until it is closed.
    Open,
    /// Another request for the file, on a mount without open requests (docs/decisions/0044). The handle exists for the
    /// duration of that request.
    Request,
}

/// An open file. It owns no descriptor: see [`super::descriptors`].
#[derive(Debug)]
pub struct FileHandle {
    pub(super) inode: Arc<Inode>,
    pub(super) options: OpenOptions,
    pub(super) origin: Origin,
    /// The number of the inode's writeback errors that were reported through this open file.
    pub(super) errors_seen: AtomicU32,
    /// The value of [`OpenCounts::pushes`] at which the content was last known to be in the upper layer.
    pub(super) pushes: AtomicU32,
}

impl FileHandle {
    /// Returns a handle for one request, on a mount without open requests.
    ///
    /// The content need not be in the upper layer, even if `options` include writing.
    pub(super) fn for_request(inode: &Arc<Inode>, options: OpenOptions) -> Arc<Self> {
        Arc::new(Self {
            inode: inode.clone(),
            options,
            origin: Origin::Request,
            errors_seen: AtomicU32::new(0),
            pushes: AtomicU32::new(0),
        })
    }

    /// Returns the inode of the file.
    pub fn inode(&self) -> &Arc<Inode> {
        &self.inode
    }

    /// Whether the file was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.options.write
    }

    /// Returns the options with which the file was opened.
    pub fn options(&self) -> OpenOptions {
        self.options
    }
}

/// The result of an open.
#[derive(Debug)]
pub struct Opened {
    /// The open file.
    pub handle: Arc<FileHandle>,
    /// The descriptor of its content; `None` if opening the content is deferred to the first request that needs it.
    pub descriptor: Option<VersionedDescriptor>,
}

/// The counters of a mount's open files and of its pushed layers.
#[derive(Debug, Default)]
pub(crate) struct OpenCounts {
    pub(super) writers: AtomicU32,
    pub(super) readers: AtomicU32,
    /// The number of pushed layers. It changes only under the stack's exclusive lock.
    pub(super) pushes: AtomicU32,
    /// Whether the kernel opens files without a request, so that none of them is counted.
    pub(super) are_unknown: AtomicBool,
    /// The device number of the mount, by which the open files of a process are recognized.
    pub(super) device: OnceLock<Device>,
}

impl OpenCounts {
    /// Records that the kernel opens files without a request from now on.
    pub(crate) fn set_unknown(&self) {
        self.are_unknown.store(true, Ordering::Release);
    }

    /// Whether the kernel opens files without a request.
    pub(crate) fn are_unknown(&self) -> bool {
        self.are_unknown.load(Ordering::Acquire)
    }

    /// Records the device number of the mount.
    pub(crate) fn set_device(&self, device: Device) {
        self.device.get_or_init(|| device);
    }

    /// Whether a caller has the file open for writing; `None` if its open files are not visible.
    pub(crate) fn is_writer(&self, caller: Caller, inode: &Inode) -> Option<bool> {
        let device = *self.device.get()?;
        (caller.pid != 0)
            .then(|| writes_to(caller.pid, device, inode.ino()))
            .flatten()
    }

    /// Whether a process may have the file open for writing.
    pub(crate) fn may_have_writers(&self, inode: &Inode) -> bool {
        self.are_unknown() || inode.has_writers()
    }

    fn counter(&self, options: OpenOptions) -> &AtomicU32 {
        if options.write {
            &self.writers
        } else {
            &self.readers
        }
    }

    /// Counts an open file, and returns its handle.
    pub(super) fn count_open(&self, inode: &Arc<Inode>, options: OpenOptions) -> Arc<FileHandle> {
        self.counter(options).fetch_add(1, Ordering::AcqRel);
        inode.count_open(options);
        Arc::new(FileHandle {
            inode: inode.clone(),
            options,
            origin: Origin::Open,
            errors_seen: AtomicU32::new(0),
            pushes: AtomicU32::new(self.pushes()),
        })
    }

    /// Counts the close of an open file.
    pub(crate) fn count_close(&self, handle: &FileHandle) {
        self.counter(handle.options).fetch_sub(1, Ordering::AcqRel);
        handle.inode.count_close(handle.options);
    }

    /// Returns the number of files that are open for writing.
    pub(crate) fn writers(&self) -> u32 {
        self.writers.load(Ordering::Acquire)
    }

    /// Returns the number of files that are open only for reading.
    pub(crate) fn readers(&self) -> u32 {
        self.readers.load(Ordering::Acquire)
    }

    /// Returns the number of pushed layers.
    pub(super) fn pushes(&self) -> u32 {
        self.pushes.load(Ordering::Acquire)
    }

    /// Counts a pushed layer. The caller must hold the stack's exclusive lock.
    pub(crate) fn count_push(&self) {
        self.pushes.fetch_add(1, Ordering::AcqRel);
    }
}
