//! Descriptors by their numbers.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use crate::error::{Errno, Result};

/// Makes the number `number`, which the caller's process uses for an open descriptor, refer to the open file description
/// of `by`. The old one is closed.
pub fn replace(number: RawFd, by: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: both numbers are open, and the owner of `number` continues to own it.
    let done = unsafe { libc::dup3(by.as_raw_fd(), number, libc::O_CLOEXEC) };
    if done < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO).into());
    }
    Ok(())
}
