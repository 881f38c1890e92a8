//! File handles: what a file system calls an inode for good, also after its number was given away.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::error::{Errno, Result};

/// The most bytes that a handle has (MAX_HANDLE_SZ of the kernel).
const MOST: usize = 128;

/// struct file_handle of the kernel, with room for its bytes.
#[repr(C)]
struct Raw {
    bytes: u32,
    kind: i32,
    handle: [u8; MOST],
}

/// The handle of an open object (an O_PATH descriptor will do), its kind and its bytes; `None` where the file system has none.
pub fn of(fd: BorrowedFd<'_>) -> Result<Option<(i32, Vec<u8>)>> {
    let mut raw = Raw {
        bytes: MOST as u32,
        kind: 0,
        handle: [0; MOST],
    };
    let mut mount: i32 = 0;
    // SAFETY: the descriptor is open for the call's length; the path is an empty C string; `raw` is laid
    // out as struct file_handle and says itself how many bytes follow; `mount` is an int. The kernel
    // writes to the last two only.
    let done = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            fd.as_raw_fd(),
            c"".as_ptr(),
            &raw mut raw,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    if done == 0 {
        let bytes = raw.handle.get(..raw.bytes as usize).unwrap_or_default();
        return Ok(Some((raw.kind, bytes.to_vec())));
    }
    match nix::errno::Errno::last().into() {
        crate::Error::Errno(Errno::OPNOTSUPP | Errno::NOSYS | Errno::OVERFLOW) => Ok(None),
        error => Err(error),
    }
}
