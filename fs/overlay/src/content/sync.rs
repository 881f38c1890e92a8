//! fsync(2) of files and directories.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::OFlags;

use super::handle::FileHandle;
use super::open::Content;
use crate::inode::Inode;
use crate::reach::access_path;
use cowl_layers::error::{Errno, Result};
use cowl_layers::sys;
use cowl_layers::sys::copy::SyncScope;

/// The kind of a close: whether another descriptor still refers to the open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Close {
    /// No other descriptor refers to it.
    Last,
    /// Another descriptor may refer to it.
    NotLast,
}

impl Content<'_> {
    /// Syncs a file to stable storage.
    ///
    /// A file of a lower layer is synced as well, because it may have been written before a snapshot froze the layer.
    pub(crate) fn fsync(&self, handle: &FileHandle, scope: SyncScope) -> Result<()> {
        if self.cx.options.volatile {
            return Ok(());
        }
        let inode = &handle.inode;
        let file = inode.file()?;
        let fd = match &file.data {
            // A metacopy: only its attributes can have changed.
            Some(_) => Arc::new(sys::content::reopen(
                (*access_path(inode)?).as_fd(),
                OFlags::RDONLY,
            )?),
            None => self.descriptor_to_sync(handle)?,
        };
        // fdatasync(2) does not persist the rename of a copy-up: on ext4 it commits only changes of content or size.
        // Without that rename, the name refers to the old content after a crash.
        let has_unsynced_name = inode.flags().has_unsynced_name();
        let scope = if has_unsynced_name {
            SyncScope::All
        } else {
            scope
        };
        let in_upper = self.cx.stack.is_in_upper(&file);
        match self
            .descriptors
            .report_sync(handle, sys::copy::sync(&*fd, scope))
        {
            // A read-only file system may not support fsync.
            Err(error) if error.errno() == Errno::INVAL && !in_upper => return Ok(()),
            other => other?,
        }
        if has_unsynced_name && in_upper {
            inode.flags().clear_unsynced_name();
        }
        Ok(())
    }

    /// Syncs the name of a new copy-up to stable storage, if it is not synced yet.
    pub(crate) fn sync_name(&self, handle: &FileHandle) -> Result<()> {
        if handle.inode.flags().has_unsynced_name() {
            self.fsync(handle, SyncScope::All)?;
        }
        Ok(())
    }

    /// Syncs the entries of a directory to stable storage.
    pub(crate) fn fsync_dir(&self, inode: &Inode) -> Result<()> {
        let dir = inode.dir()?;
        if self.cx.options.volatile || dir.removed {
            return Ok(());
        }
        for loc in dir.locs.iter() {
            match sys::dir::sync_dir((*loc.fd()?).as_fd()) {
                Err(error)
                    if error.errno() == Errno::INVAL && !self.cx.stack.is_upper(loc.layer()) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Starts writeback when a file that was truncated is closed.
    ///
    /// After an early writeback, the next journal commit is unlikely to persist an empty file.
    pub(crate) fn close_truncated(&self, handle: &FileHandle, close: Close) -> Result<()> {
        let inode = &handle.inode;
        if !handle.options.write || !inode.flags().is_truncated() {
            return Ok(());
        }
        if close == Close::Last {
            inode.flags().clear_truncated();
        }
        if self.is_in_upper(handle)? {
            sys::early::start(&*self.descriptor(handle)?);
        }
        Ok(())
    }
}
