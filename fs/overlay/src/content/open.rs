//! Opening files, and the descriptors behind open files.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::handle::{FileHandle, OpenCounts, open_flags};
use super::privileges::truncate;
use crate::copy_up::{CopyExtent, CopyUp};
use crate::inode::{Inode, OpenOptions};
use crate::reach::{Caller, Context, open_content};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::sys::stat::FileKind;

/// The content of files.
#[derive(Clone, Copy)]
pub(crate) struct Content<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) copy_up: CopyUp<'o>,
    pub(crate) opens: &'o OpenCounts,
}

impl Content<'_> {
    /// Opens a regular file. Its content is not opened before a request through the handle needs it if `known`
    /// says that this version of it was opened before, or if it is data of a layer that is only read.
    pub(crate) fn open(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        how: OpenOptions,
        known: impl FnOnce(u32) -> bool,
    ) -> Result<Arc<FileHandle>> {
        if inode.kind() != FileKind::Regular {
            let errno = if inode.is_dir() {
                Errno::ISDIR
            } else {
                // The kernel opens FIFOs, sockets and devices itself.
                Errno::NXIO
            };
            return Err(Error::Errno(errno));
        }
        if how.truncate && !how.write && inode.is_executing() {
            // For an open for writing the kernel has checked this itself; for one that only truncates it checks
            // after the open, and with FUSE_ATOMIC_O_TRUNC the open has truncated the file by then.
            return Err(Error::Errno(Errno::TXTBSY));
        }
        if how.write || how.truncate {
            let extent = if how.truncate {
                CopyExtent::Truncate
            } else {
                CopyExtent::Data
            };
            self.copy_up.file_up(inode, extent)?;
        }
        // Before the content is opened: if it moves meanwhile, the handle opens it again.
        let version = inode.content_version();
        if !how.write && !how.truncate && (known(version) || inode.facts().is_plain_data()) {
            return Ok(self.opens.open(inode, None, how));
        }
        let fd = open_content(inode, open_flags(how))?;
        if how.truncate {
            inode.note_change();
            truncate(self.cx, caller, inode, &fd, 0)?;
        }
        Ok(self.opens.open(inode, Some((fd, version)), how))
    }

    /// Returns a handle of a file that was just created, with the descriptor that created it.
    pub(crate) fn adopt(
        &self,
        inode: &Arc<Inode>,
        fd: OwnedFd,
        how: OpenOptions,
    ) -> Arc<FileHandle> {
        let version = inode.content_version();
        self.opens.open(inode, Some((fd, version)), how)
    }

    /// Whether an open file's content lies in the layer that is written.
    pub(crate) fn is_in_upper(&self, handle: &FileHandle) -> Result<bool> {
        let file = handle.inode.file()?;
        Ok(file.data.is_none() && self.cx.stack.is_in_upper(&file))
    }

    /// Returns the descriptor of a handle, opened again if the content has moved since.
    pub(crate) fn descriptor(&self, handle: &FileHandle) -> Result<Arc<OwnedFd>> {
        let mut open = handle.open.lock();
        let version = handle.inode.content_version();
        if let Some((fd, of)) = &*open
            && *of == version
        {
            return Ok(fd.clone());
        }
        let fd = Arc::new(open_content(&handle.inode, open_flags(handle.how))?);
        *open = Some((fd.clone(), version));
        Ok(fd)
    }

    /// Like [`Self::descriptor`], for a change of the content. A descriptor that was opened for writing before a
    /// snapshot was taken leads to a layer that is frozen now: its file is copied up first, as by an open.
    pub(super) fn descriptor_to_write(&self, handle: &FileHandle) -> Result<Arc<OwnedFd>> {
        // It changes under the stack's exclusive lock alone, and this operation holds the shared one.
        let pushes = self.opens.pushes();
        if handle.pushes.load(Ordering::Acquire) != pushes {
            self.copy_up.file_up(&handle.inode, CopyExtent::Data)?;
            handle.pushes.store(pushes, Ordering::Release);
        }
        self.descriptor(handle)
    }
}
