//! listxattrat(2) and getxattrat(2), which exist since Linux 6.13.
//!
//! Older calls need a path through /proc/self/fd, whose resolution takes longer than the read of the xattrs.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use smallvec::SmallVec;

use crate::error::Errno;

/// The system call number, equal on all architectures except alpha and mips.
const GETXATTRAT: libc::c_long = 464;
const LISTXATTRAT: libc::c_long = 465;

/// Set when the kernel lacks the calls, or a seccomp filter rejects them.
static MISSING: AtomicBool =
    AtomicBool::new(cfg!(any(target_arch = "mips", target_arch = "mips64")));

/// struct xattr_args.
#[repr(C)]
struct Args {
    value: u64,
    size: u32,
    flags: u32,
}

type CName = SmallVec<[u8; 264]>;

/// Appends the terminating NUL to a name, which does not contain a NUL.
fn c_name(bytes: &[u8]) -> CName {
    let mut name = CName::from_slice(bytes);
    name.push(0);
    name
}

/// Reads the names of all xattrs, each with a terminating NUL; `None` if the call is not available.
pub(super) fn list(
    dir: BorrowedFd<'_>,
    entry: &[u8],
    buffer: &mut [u8],
) -> Option<Result<usize, Errno>> {
    if MISSING.load(Ordering::Relaxed) {
        return None;
    }
    let entry = c_name(entry);
    // SAFETY: `entry` ends with a NUL and outlives the call; the kernel writes at most `len` bytes to `buffer`, which
    // is mutably borrowed.
    let done = unsafe {
        libc::syscall(
            LISTXATTRAT,
            dir.as_raw_fd(),
            entry.as_ptr(),
            libc::AT_SYMLINK_NOFOLLOW,
            buffer.as_mut_ptr(),
            buffer.len(),
        )
    };
    result(done)
}

/// Reads the value of the xattr `name`; `None` if the call is not available.
pub(super) fn get(
    dir: BorrowedFd<'_>,
    entry: &[u8],
    name: &[u8],
    buffer: &mut [u8],
) -> Option<Result<usize, Errno>> {
    if MISSING.load(Ordering::Relaxed) {
        return None;
    }
    let (entry, name) = (c_name(entry), c_name(name));
    let mut args = Args {
        value: buffer.as_mut_ptr() as u64,
        size: u32::try_from(buffer.len()).unwrap_or(u32::MAX),
        flags: 0,
    };
    // SAFETY: both names end with a NUL and outlive the call; `args` points to `buffer`, which is mutably borrowed,
    // with a size not larger than its length.
    let done = unsafe {
        libc::syscall(
            GETXATTRAT,
            dir.as_raw_fd(),
            entry.as_ptr(),
            libc::AT_SYMLINK_NOFOLLOW,
            name.as_ptr(),
            &raw mut args,
            size_of::<Args>(),
        )
    };
    result(done)
}

fn result(done: libc::c_long) -> Option<Result<usize, Errno>> {
    if let Ok(size) = usize::try_from(done) {
        return Some(Ok(size));
    }
    let error = std::io::Error::last_os_error();
    match Errno::from_io_error(&error).unwrap_or(Errno::IO) {
        // The calls themselves return neither for a read, but a seccomp filter that does not know them returns EPERM.
        Errno::NOSYS | Errno::PERM => {
            MISSING.store(true, Ordering::Relaxed);
            None
        }
        errno => Some(Err(errno)),
    }
}
