//! Trees that can be changed: through a mount, so that programs in the container see the changes, or in process.
//!
//! Paths are relative, and their components are not symbolic links.

mod dir_tree;
mod overlay_tree;

use std::os::fd::OwnedFd;

use cowl_layers::Result;
use cowl_layers::error::Errno;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::node::RenameMode;
use cowl_layers::sys::stat::{FileKind, Stat};

use super::attrs::Attrs;

pub(crate) use dir_tree::DirTree;
pub(crate) use overlay_tree::OverlayTree;

/// A tree that can be changed.
pub(crate) trait WritableTree {
    /// Returns the stat fields of the object at a path; `None` if there is none.
    fn stat(&self, path: &[u8]) -> Result<Option<Stat>>;
    /// Returns the names in a directory.
    fn list(&self, path: &[u8]) -> Result<Vec<Vec<u8>>>;
    /// Creates a directory with mode 0700.
    fn mkdir(&self, path: &[u8]) -> Result<()>;
    /// Creates a regular file with mode 0600. `content` is the file to copy from and its size; `None` for an empty file.
    fn create_file(&self, path: &[u8], content: Option<(OwnedFd, u64)>) -> Result<()>;
    /// Creates a symbolic link.
    fn symlink(&self, path: &[u8], to: &[u8]) -> Result<()>;
    /// Creates a device, a FIFO or a socket.
    fn mknod(&self, path: &[u8], kind: FileKind, rdev: u64) -> Result<()>;
    /// Creates the hard link `new` to the object at `path`.
    fn link(&self, path: &[u8], new: &[u8]) -> Result<()>;
    /// Sets the attributes, and removes all other xattrs.
    fn set_attrs(&self, path: &[u8], kind: FileKind, attrs: &Attrs) -> Result<()>;
    /// Sets only the times.
    fn set_times(&self, path: &[u8], atime: SetTime, mtime: SetTime) -> Result<()>;
    /// Renames an object.
    fn rename(&self, from: &[u8], to: &[u8], mode: RenameMode) -> Result<()>;
    /// Removes an object that is not a directory.
    fn unlink(&self, path: &[u8]) -> Result<()>;
    /// Removes an empty directory.
    fn rmdir(&self, path: &[u8]) -> Result<()>;
}

/// Turns an error about a missing object, or about a symbolic link in its path, into `None`.
fn absent_is_none<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.is_absent() || error.errno() == Errno::LOOP => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns the names of the xattrs that are present but not requested, for example an ACL inherited from the directory.
fn unrequested<'n>(present: impl Iterator<Item = &'n [u8]>, attrs: &Attrs) -> Vec<&'n [u8]> {
    present
        .filter(|name| attrs.xattrs.iter().all(|(requested, _)| requested != name))
        .collect()
}
