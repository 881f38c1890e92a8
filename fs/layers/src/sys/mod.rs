//! Thin safe wrappers of system calls. The only module with `unsafe`, and the one that uses libc, nix and rustix.
//!
//! It has no knowledge of layers. Every system call that changes a file system is preceded by a call of [`fault`], so
//! that a test can make the k-th change fail.

pub mod attr;
pub mod child;
pub mod confine;
pub mod content;
pub mod copy;
pub mod crash;
pub mod creds;
pub mod dir;
pub mod early;
pub mod extents;
pub mod fault;
pub mod filesystem;
pub mod flocks;
pub mod fuse_device;
pub mod handle;
pub mod idle;
pub mod kernel;
pub mod limits;
pub mod mount;
pub mod mountinfo;
pub mod namespace;
pub mod node;
pub mod open;
pub mod order;
pub mod overlay;
pub mod pid_namespace;
pub mod private;
pub mod process;
pub mod project;
pub mod random;
pub mod remove;
pub mod shared;
pub mod socket;
pub mod stat;
pub mod user_namespace;
pub mod users;
pub mod within;
mod write_back;
pub mod xattr;
mod xattr_at;

use std::io::Write as _;
use std::os::fd::{AsRawFd, BorrowedFd};

use smallvec::SmallVec;

use crate::error::Errno;

/// A path buffer on the stack, for short paths.
pub(crate) type PathBuf = SmallVec<[u8; 304]>;

/// Returns `/proc/self/fd/N`, for system calls that do not accept an O_PATH descriptor.
///
/// The kernel resolves this link to the object itself, and does not follow the object if it is a symbolic link.
pub(crate) fn proc_path(fd: BorrowedFd<'_>) -> PathBuf {
    let mut path = PathBuf::new();
    // Writing to a SmallVec cannot fail; the trait requires the error type.
    if write!(path, "/proc/self/fd/{}", fd.as_raw_fd()).is_err() {
        path.clear();
    }
    path
}

/// Returns `/proc/self/fd/N/name`, for system calls without an `*at` form.
pub(crate) fn proc_path_at(dir: BorrowedFd<'_>, name: &[u8]) -> PathBuf {
    let mut path = proc_path(dir);
    path.push(b'/');
    path.extend_from_slice(name);
    path
}

/// Runs `direct`, a system call on a descriptor, and then `by_path`, through /proc, if the descriptor is O_PATH.
///
/// Such calls reject an O_PATH descriptor with EBADF. The direct call is tried first, because the resolution of a path
/// in /proc often costs more than the call.
pub(crate) fn by_descriptor<T>(
    direct: impl FnOnce() -> Result<T, Errno>,
    by_path: impl FnOnce() -> Result<T, Errno>,
) -> Result<T, Errno> {
    match direct() {
        Err(Errno::BADF) => by_path(),
        done => done,
    }
}
