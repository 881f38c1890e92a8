//! Reads and writes of open files.

use rustix::fs::{FallocateFlags, SeekFrom};

use super::handle::{FileHandle, Origin, Writer};
use super::open::Content;
use super::privileges::as_unprivileged;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::points::changing;
use cowl_layers::sys;

/// The target of [`Content::seek`]. The kernel handles the other kinds of lseek(2) itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeekTo {
    /// SEEK_DATA.
    Data,
    /// SEEK_HOLE.
    Hole,
}

impl Content<'_> {
    /// Reads into `buffer`, and returns the number of bytes read.
    ///
    /// The number is less than the size of `buffer` only at the end of the file.
    pub(crate) fn read(
        &self,
        handle: &FileHandle,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        let version = handle.inode.content_version();
        let cached = self.descriptors.get(handle, version);
        let is_cached = cached.is_some();
        let fd = match cached {
            Some(fd) => fd,
            None => self.open_descriptor(handle)?,
        };
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let count = rustix::io::retry_on_intr(|| {
                rustix::io::pread(&fd, &mut *rest, offset + done as u64)
            })?;
            if count == 0 {
                break;
            }
            done += count;
        }
        // The kernel has the whole content of a small file now. Without open requests, nothing would close the
        // descriptor before the kernel forgets the inode.
        let is_whole = offset == 0 && done < buffer.len();
        let is_done = is_whole && handle.origin == Origin::Request;
        if !is_cached && !is_done {
            self.descriptors.put(handle, (fd, version));
        }
        Ok(done)
    }

    /// Writes `data`, and returns the number of bytes written.
    ///
    /// On a full disk, writes as much as fits.
    pub(crate) fn write(
        &self,
        handle: &FileHandle,
        offset: u64,
        data: &[u8],
        writer: Writer,
    ) -> Result<usize> {
        if !handle.options.write {
            return Err(Error::Errno(Errno::BADF));
        }
        self.cx.stack.upper()?;
        let fd = self.descriptor_to_write(handle)?;
        let write = || sys::copy::write_some(&*fd, data, offset);
        let done = match writer {
            Writer::Privileged => write()?,
            Writer::Unprivileged(caller) => {
                as_unprivileged(self.cx, caller, &handle.inode, &fd, write)?
            }
            Writer::Mapping => {
                // The kernel does not retry a short write of writeback, so the rest would be lost.
                let write = || sys::copy::write_all(&*fd, data, offset);
                self.cx.preserving_capabilities(&handle.inode, &fd, write)?;
                data.len()
            }
        };
        handle.inode.note_change();
        Ok(done)
    }

    /// Executes fallocate(2); `mode` has the flags of the system call.
    pub(crate) fn fallocate(
        &self,
        handle: &FileHandle,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        if !handle.options.write {
            return Err(Error::Errno(Errno::BADF));
        }
        self.cx.stack.upper()?;
        let fd = self.descriptor_to_write(handle)?;
        let mode = FallocateFlags::from_bits_retain(mode);
        {
            let _change = changing();
            rustix::fs::fallocate(&fd, mode, offset, len)?;
        }
        handle.inode.note_change();
        Ok(())
    }

    /// Returns the offset of the next data or hole, like lseek(2) with SEEK_DATA or SEEK_HOLE.
    pub(crate) fn seek(&self, handle: &FileHandle, offset: u64, to: SeekTo) -> Result<u64> {
        let fd = self.descriptor(handle)?;
        let from = match to {
            SeekTo::Data => SeekFrom::Data(offset),
            SeekTo::Hole => SeekFrom::Hole(offset),
        };
        Ok(rustix::fs::seek(&fd, from)?)
    }

    /// Copies between two open files with copy_file_range(2) on the layers.
    ///
    /// The data does not pass through this process, and a file system with reflinks shares the blocks.
    pub(crate) fn copy_file_range(
        &self,
        from: (&FileHandle, u64),
        to: (&FileHandle, u64),
        len: usize,
    ) -> Result<usize> {
        self.cx.stack.upper()?;
        // Open the target first: if the source is the same file, this copies it up.
        let target = self.descriptor_to_write(to.0)?;
        let source = self.descriptor(from.0)?;
        let atime = sys::stat::stat_fd(&*source)?.atime;
        let (mut offset, mut to_offset) = (from.1, to.1);
        let copied = rustix::io::retry_on_intr(|| {
            let _change = changing();
            rustix::fs::copy_file_range(
                &source,
                Some(&mut offset),
                &target,
                Some(&mut to_offset),
                len,
            )
        })?;
        to.0.inode.note_change();
        // The kernel does not track access times of FUSE inodes, so it does not invalidate the source's attributes.
        if sys::stat::stat_fd(&*source)?.atime != atime {
            self.cx.note_stale(&from.0.inode);
        }
        Ok(copied)
    }
}
