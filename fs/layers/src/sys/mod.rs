//! Thin, safe calls to the kernel: the only room with `unsafe`, libc, nix and rustix.
//!
//! Nothing here knows what a layer is. Every call that changes something first asks [`fault`], so
//! that a test can make the k-th change fail.

pub mod attr;
pub mod content;
pub mod copy;
pub mod creds;
pub mod dir;
pub mod early;
pub mod fault;
pub mod flocks;
pub mod handle;
pub mod idle;
pub mod mount;
pub mod mountinfo;
pub mod namespace;
pub mod node;
pub mod order;
pub mod private;
pub mod process;
pub mod remove;
pub mod socket;
pub mod stat;
pub mod users;
pub mod within;
mod write_back;
pub mod xattr;
mod xattr_at;

use std::io::Write as _;
use std::os::fd::{AsRawFd, BorrowedFd};

use smallvec::SmallVec;

use crate::error::Errno;

/// A short path kept on the stack.
pub(crate) type PathBuf = SmallVec<[u8; 304]>;

/// `/proc/self/fd/N`: the object behind an O_PATH descriptor, for calls that take no such descriptor.
/// Following this link ends at the object itself, also when it is a symbolic link.
pub(crate) fn proc_path(fd: BorrowedFd<'_>) -> PathBuf {
    let mut path = PathBuf::new();
    // Writing to a SmallVec can't fail; the error type is the trait's.
    if write!(path, "/proc/self/fd/{}", fd.as_raw_fd()).is_err() {
        path.clear();
    }
    path
}

/// `/proc/self/fd/N/name`, for calls that know no `*at` form.
pub(crate) fn proc_path_at(dir: BorrowedFd<'_>, name: &[u8]) -> PathBuf {
    let mut path = proc_path(dir);
    path.push(b'/');
    path.extend_from_slice(name);
    path
}

/// Makes a call on a descriptor, and where that is an O_PATH one, which such calls refuse with EBADF, the same
/// by its path in /proc: the way through there costs more than many a call.
pub(crate) fn by_descriptor<T>(
    direct: impl FnOnce() -> Result<T, Errno>,
    by_path: impl FnOnce() -> Result<T, Errno>,
) -> Result<T, Errno> {
    match direct() {
        Err(Errno::BADF) => by_path(),
        done => done,
    }
}
