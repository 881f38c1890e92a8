//! File handles, which identify an inode even after its number was reused.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::error::{Errno, Result};

/// The maximum size of a handle in bytes (the kernel's MAX_HANDLE_SZ).
const MAX_BYTES: usize = 128;

/// The kernel's `struct file_handle`, with a buffer for the handle.
#[repr(C)]
struct Raw {
    bytes: u32,
    kind: i32,
    handle: [u8; MAX_BYTES],
}

/// Returns the type and the bytes of the handle of an object, whose descriptor may be O_PATH.
///
/// Returns `None` if the file system does not support handles.
pub fn from_fd(fd: BorrowedFd<'_>) -> Result<Option<(i32, Vec<u8>)>> {
    let mut raw = Raw {
        bytes: MAX_BYTES as u32,
        kind: 0,
        handle: [0; MAX_BYTES],
    };
    let mut mount: i32 = 0;
    // SAFETY: the descriptor is open during the call; the path is an empty C string; `raw` has the layout of struct
    // file_handle and contains the size of its buffer; `mount` is an int. The kernel writes only to the last two.
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
