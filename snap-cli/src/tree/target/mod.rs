//! A tree that can be changed: through a mount, so that programs inside see the changes, or in process.
//! Paths are relative and lead through no symbolic link.

mod in_directory;
mod in_process;

use std::os::fd::OwnedFd;

use cowl_layers::Result;
use cowl_layers::error::Errno;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::node::RenameMode;
use cowl_layers::sys::stat::{FileKind, Stat};

use super::attrs::Attrs;

pub(crate) use in_directory::InDirectory;
pub(crate) use in_process::InProcess;

/// A tree that can be changed.
pub(crate) trait Target {
    /// Returns the attributes of the object at a path; `None` if there is none.
    fn stat(&self, path: &[u8]) -> Result<Option<Stat>>;
    /// Returns the names in a directory.
    fn names(&self, path: &[u8]) -> Result<Vec<Vec<u8>>>;
    /// Creates a directory with mode 0700.
    fn mkdir(&self, path: &[u8]) -> Result<()>;
    /// Creates a regular file with this content.
    fn file(&self, path: &[u8], content: Option<(OwnedFd, u64)>) -> Result<()>;
    /// Creates a symbolic link.
    fn symlink(&self, path: &[u8], to: &[u8]) -> Result<()>;
    /// Creates a device, fifo or socket.
    fn node(&self, path: &[u8], kind: FileKind, rdev: u64) -> Result<()>;
    /// Creates a hard link.
    fn link(&self, path: &[u8], new: &[u8]) -> Result<()>;
    /// Sets the attributes, and removes all other xattrs.
    fn attrs(&self, path: &[u8], kind: FileKind, attrs: &Attrs) -> Result<()>;
    /// Sets the times alone.
    fn times(&self, path: &[u8], atime: SetTime, mtime: SetTime) -> Result<()>;
    /// Renames.
    fn rename(&self, from: &[u8], to: &[u8], how: RenameMode) -> Result<()>;
    /// Removes an object that is not a directory.
    fn unlink(&self, path: &[u8]) -> Result<()>;
    /// Removes an empty directory.
    fn rmdir(&self, path: &[u8]) -> Result<()>;
}

fn absent_is_none<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.is_absent() || error.errno() == Errno::LOOP => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns the xattrs that are present but not wanted, for example an ACL inherited from the directory.
fn others<'n>(there: impl Iterator<Item = &'n [u8]>, attrs: &Attrs) -> Vec<&'n [u8]> {
    there
        .filter(|name| attrs.xattrs.iter().all(|(wanted, _)| wanted != name))
        .collect()
}
