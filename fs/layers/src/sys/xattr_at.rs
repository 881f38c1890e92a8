//! Attributes of a name in a folder by one call each, listxattrat(2) and getxattrat(2) of Linux 6.13: the way
//! through /proc/self/fd that older calls need costs more than the attributes.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use smallvec::SmallVec;

use crate::error::Errno;

/// The same on all architectures but alpha and mips.
const GETXATTRAT: libc::c_long = 464;
const LISTXATTRAT: libc::c_long = 465;

/// This kernel, or what filters our calls, has none of the two.
static MISSING: AtomicBool =
    AtomicBool::new(cfg!(any(target_arch = "mips", target_arch = "mips64")));

/// struct xattr_args.
#[repr(C)]
struct Args {
    value: u64,
    size: u32,
    flags: u32,
}

type Text = SmallVec<[u8; 264]>;

/// With a NUL behind it. Names have none in them.
fn text(bytes: &[u8]) -> Text {
    let mut text = Text::from_slice(bytes);
    text.push(0);
    text
}

/// The names, each with a NUL; `None` where the call is missing.
pub(super) fn list(
    dir: BorrowedFd<'_>,
    entry: &[u8],
    buffer: &mut [u8],
) -> Option<Result<usize, Errno>> {
    if MISSING.load(Ordering::Relaxed) {
        return None;
    }
    let entry = text(entry);
    // SAFETY: `entry` ends with a NUL and lives over the call; the kernel writes at most `len` bytes to
    // `buffer`, which is borrowed for writing.
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

/// The value of `name`; `None` where the call is missing.
pub(super) fn get(
    dir: BorrowedFd<'_>,
    entry: &[u8],
    name: &[u8],
    buffer: &mut [u8],
) -> Option<Result<usize, Errno>> {
    if MISSING.load(Ordering::Relaxed) {
        return None;
    }
    let (entry, name) = (text(entry), text(name));
    let mut args = Args {
        value: buffer.as_mut_ptr() as u64,
        size: u32::try_from(buffer.len()).unwrap_or(u32::MAX),
        flags: 0,
    };
    // SAFETY: both texts end with a NUL and live over the call; `args` names `buffer`, which is borrowed for
    // writing, and no more bytes than it has.
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
        // Reading attributes gives neither, but a filter that does not know the calls does.
        Errno::NOSYS | Errno::PERM => {
            MISSING.store(true, Ordering::Relaxed);
            None
        }
        errno => Some(Err(errno)),
    }
}
