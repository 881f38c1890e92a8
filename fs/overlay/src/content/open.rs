//! Opening of files, and the descriptors of open files.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::descriptors::ContentDescriptors;
use super::handle::{FileHandle, OpenCounts, Opened, Origin, VersionedDescriptor, open_flags};
use super::privileges::truncate;
use crate::copy_up::{CopyExtent, CopyUp};
use crate::inode::{Inode, OpenOptions};
use crate::reach::{Caller, Context, open_content};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::sys::stat::FileKind;

/// Access to the content of files.
#[derive(Clone, Copy)]
pub(crate) struct Content<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) copy_up: CopyUp<'o>,
    pub(crate) opens: &'o OpenCounts,
    pub(crate) descriptors: &'o ContentDescriptors,
}

impl Content<'_> {
    /// Opens a regular file.
    ///
    /// Opening the content is deferred to the first request that needs it if `is_known_version` returns true for
    /// the current version of the content, or if the file is known to be plain data of a lower layer.
    pub(crate) fn open(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        options: OpenOptions,
        is_known_version: impl FnOnce(u32) -> bool,
    ) -> Result<Opened> {
        require_regular(inode)?;
        if options.truncate && !options.write && inode.is_executing() {
            // The kernel checks for ETXTBSY itself at an open for writing. At one that only truncates it checks
            // after the open, and with FUSE_ATOMIC_O_TRUNC the file is truncated by then.
            return Err(Error::Errno(Errno::TXTBSY));
        }
        if options.write || options.truncate {
            let extent = if options.truncate {
                CopyExtent::Truncate
            } else {
                CopyExtent::Data
            };
            self.copy_up.copy_up_file(inode, extent)?;
        }
        // Read the version before opening the content: if a copy-up races with the open, the handle has a stale
        // version and reopens the content.
        let version = inode.content_version();
        if !options.write
            && !options.truncate
            && (is_known_version(version) || inode.facts().is_plain_data())
        {
            return Ok(self.count_open(inode, None, options));
        }
        let fd = Arc::new(open_content(inode, open_flags(options))?);
        if options.truncate {
            inode.note_change();
            truncate(self.cx, caller, inode, &fd, 0)?;
        }
        Ok(self.count_open(inode, Some((fd, version)), options))
    }

    /// Returns a handle for one request, on a mount without open requests.
    ///
    /// Nothing is opened or copied up before the handle is used.
    pub(crate) fn for_request(
        &self,
        inode: &Arc<Inode>,
        options: OpenOptions,
    ) -> Result<Arc<FileHandle>> {
        require_regular(inode)?;
        Ok(FileHandle::for_request(inode, options))
    }

    /// Counts an open file, and caches its descriptor.
    fn count_open(
        &self,
        inode: &Arc<Inode>,
        descriptor: Option<VersionedDescriptor>,
        options: OpenOptions,
    ) -> Opened {
        let handle = self.opens.count_open(inode, options);
        self.descriptors.add_user(&handle, descriptor.clone());
        Opened { handle, descriptor }
    }

    /// Returns the handle of a file that was just created through `fd`.
    pub(crate) fn adopt(&self, inode: &Arc<Inode>, fd: OwnedFd, options: OpenOptions) -> Opened {
        let version = inode.content_version();
        self.count_open(inode, Some((Arc::new(fd), version)), options)
    }

    /// Whether the content of an open file is in the upper layer.
    pub(crate) fn is_in_upper(&self, handle: &FileHandle) -> Result<bool> {
        let file = handle.inode.file()?;
        Ok(file.data.is_none() && self.cx.stack.is_in_upper(&file))
    }

    /// Returns the descriptor of a handle, reopened if it was evicted or a copy-up has moved the content.
    pub(crate) fn descriptor(&self, handle: &FileHandle) -> Result<Arc<OwnedFd>> {
        let version = handle.inode.content_version();
        if let Some(fd) = self.descriptors.get(handle, version) {
            return Ok(fd);
        }
        let fd = self.open_descriptor(handle)?;
        self.descriptors.put(handle, (fd.clone(), version));
        Ok(fd)
    }

    /// Returns a new descriptor for a handle, which is not cached.
    pub(crate) fn open_descriptor(&self, handle: &FileHandle) -> Result<Arc<OwnedFd>> {
        let mut options = handle.options;
        if options.write && !self.is_in_upper(handle)? {
            // A snapshot has frozen the layer, and a flatten may have moved the content to one on a read-only mount; or
            // the file was opened without a request. A write copies the file up first.
            options.write = false;
        }
        Ok(Arc::new(open_content(&handle.inode, open_flags(options))?))
    }

    /// Returns the descriptor of a handle for a sync.
    ///
    /// Without open requests, that is the one which was used for writing, because it reports the errors of writeback.
    /// Otherwise the file is opened for reading: a program may sync a file that no process may open for writing.
    pub(super) fn descriptor_to_sync(&self, handle: &FileHandle) -> Result<Arc<OwnedFd>> {
        if handle.origin == Origin::Open {
            return self.descriptor(handle);
        }
        let written = FileHandle::for_request(&handle.inode, OpenOptions::WRITE);
        match self
            .descriptors
            .get(&written, handle.inode.content_version())
        {
            Some(fd) => Ok(fd),
            None => self.descriptor(&FileHandle::for_request(&handle.inode, OpenOptions::READ)),
        }
    }

    /// Returns the descriptor of a handle for a change of the content.
    ///
    /// A descriptor that was opened for writing before a snapshot refers to a frozen layer. In that case, and without
    /// open requests, copies the file up first, as an open does.
    pub(super) fn descriptor_to_write(&self, handle: &FileHandle) -> Result<Arc<OwnedFd>> {
        // No race: the number changes only under the stack's exclusive lock, and this operation holds the shared
        // one.
        let pushes = self.opens.pushes();
        if handle.origin == Origin::Request || handle.pushes.load(Ordering::Acquire) != pushes {
            self.copy_up.copy_up_file(&handle.inode, CopyExtent::Data)?;
            handle.pushes.store(pushes, Ordering::Release);
        }
        self.descriptor(handle)
    }
}

/// Fails for an object that is not a regular file.
fn require_regular(inode: &Inode) -> Result<()> {
    match inode.kind() {
        FileKind::Regular => Ok(()),
        FileKind::Directory => Err(Error::Errno(Errno::ISDIR)),
        // The kernel opens FIFOs, sockets and devices itself.
        _ => Err(Error::Errno(Errno::NXIO)),
    }
}
