//! Writing files and directories to the disk.

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

/// Whether a descriptor of an open file is left after a close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Close {
    /// None is left.
    Last,
    /// One may be left.
    NotLast,
}

impl Content<'_> {
    /// Writes a file to the disk. A lower one too: it may have been written in this mount or an earlier one,
    /// before a snapshot was taken.
    pub(crate) fn fsync(&self, handle: &FileHandle, scope: SyncScope) -> Result<()> {
        if self.cx.options.volatile {
            return Ok(());
        }
        let inode = &handle.inode;
        let file = inode.file()?;
        let fd = match &file.data {
            // Its content lies below, unchanged; its attributes may have changed.
            Some(_) => Arc::new(sys::content::reopen(
                (*access_path(inode)?).as_fd(),
                OFlags::RDONLY,
            )?),
            None => self.descriptor(handle)?,
        };
        // fdatasync(2) does not persist the rename of a copy-up (on ext4 only a change of content or size
        // counts), and without that the name leads to the old content.
        let named = inode.flags().has_unsynced_name();
        let scope = if named { SyncScope::All } else { scope };
        let in_upper = self.cx.stack.is_in_upper(&file);
        match sys::copy::sync(&*fd, scope) {
            // A read-only file system may not support fsync.
            Err(error) if error.errno() == Errno::INVAL && !in_upper => return Ok(()),
            other => other?,
        }
        if named && in_upper {
            inode.flags().clear_unsynced_name();
        }
        Ok(())
    }

    /// Writes the name of a new copy-up to the disk, unless that was done since.
    pub(crate) fn sync_name(&self, handle: &FileHandle) -> Result<()> {
        if handle.inode.flags().has_unsynced_name() {
            self.fsync(handle, SyncScope::All)?;
        }
        Ok(())
    }

    /// Writes a directory's names to the disk.
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

    /// Starts write-back of a file that was truncated before, when a descriptor of it is closed: early, so that
    /// the next commit of the journal seldom finds it empty.
    pub(crate) fn close_truncated(&self, handle: &FileHandle, close: Close) -> Result<()> {
        let inode = &handle.inode;
        if !handle.how.write || !inode.flags().is_truncated() {
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
