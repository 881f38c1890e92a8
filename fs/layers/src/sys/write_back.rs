//! Writeback of a file's pages, without a sync.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use super::fault;
use crate::error::{Errno, Result};

/// Writes the pages of a file to the disk, and waits until they are written and their location is recorded.
///
/// ext4 and XFS end the writeback of a page only after they converted its extents from unwritten to written and set
/// the size, in the journal. This neither commits the journal nor flushes the disk's cache.
pub(super) fn write_back(file: BorrowedFd<'_>) -> Result<()> {
    let _change = fault::begin()?;
    let wait = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    sync_range(file, 0, 0, wait | libc::SYNC_FILE_RANGE_WRITE)
}

/// Starts writeback of a range of a file, in bytes; length 0 is everything after `at`. Guarantees nothing.
pub(super) fn start_write_back(file: BorrowedFd<'_>, at: u64, len: u64) -> Result<()> {
    let range = |number| i64::try_from(number).map_err(|_| Errno::FBIG);
    sync_range(file, range(at)?, range(len)?, libc::SYNC_FILE_RANGE_WRITE)
}

fn sync_range(file: BorrowedFd<'_>, at: i64, len: i64, flags: libc::c_uint) -> Result<()> {
    loop {
        // SAFETY: the descriptor is open, and no memory is passed.
        let done = unsafe { libc::sync_file_range(file.as_raw_fd(), at, len, flags) };
        match nix::errno::Errno::result(done) {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
