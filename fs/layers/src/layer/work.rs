//! The work directory. New objects are created in it under temporary names and moved into the layer by one rename.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Result;
use crate::shown::Show as _;
use crate::sys;
use crate::sys::node::RenameMode;
use crate::sys::order::Order;

/// The directory `work` inside the work directory that the user specified, as in kernel overlayfs.
#[derive(Debug)]
pub struct WorkDir {
    fd: OwnedFd,
    next: AtomicU64,
}

impl WorkDir {
    pub(super) fn new(fd: OwnedFd) -> Arc<Self> {
        Arc::new(Self {
            fd,
            next: AtomicU64::new(0),
        })
    }

    /// Continues with the number of the next temporary object, so that no name is used twice.
    pub(super) fn continued(fd: OwnedFd, next: u64) -> Arc<Self> {
        Arc::new(Self {
            fd,
            next: AtomicU64::new(next),
        })
    }

    /// Returns the number of the next temporary object.
    pub(super) fn next(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Returns the descriptor of the directory.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Removes the leftovers of an earlier mount.
    ///
    /// No object in the directory has a name in any layer, so no user data is lost.
    pub fn clean(&self) -> Result<()> {
        for entry in sys::dir::entries(self.fd())? {
            sys::remove::remove_tree(self.fd(), &entry.name)?;
        }
        Ok(())
    }

    /// Creates a temporary object with `make`, which gets the directory and a name.
    ///
    /// The object is removed when the returned [`Staged`] is dropped, unless it was committed.
    pub fn stage<T>(
        self: &Arc<Self>,
        make: impl FnOnce(BorrowedFd<'_>, &[u8]) -> Result<T>,
    ) -> Result<(Staged, T)> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let staged = Staged {
            work: self.clone(),
            name: format!("#{number:x}").into_bytes(),
            exists: true,
        };
        // If `make` fails, dropping `staged` removes a partially created object.
        let made = make(self.fd(), &staged.name)?;
        Ok((staged, made))
    }
}

/// A temporary object in the work directory.
#[derive(Debug)]
pub struct Staged {
    work: Arc<WorkDir>,
    name: Vec<u8>,
    exists: bool,
}

impl Staged {
    /// Returns the name in the work directory.
    pub fn name(&self) -> &[u8] {
        &self.name
    }

    /// Returns the descriptor of the work directory.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.work.fd()
    }

    /// Opens an O_PATH descriptor of the object.
    pub fn open_path(&self) -> Result<OwnedFd> {
        sys::dir::open_path(self.work.fd(), &self.name)
    }

    /// Moves the object to `name` in `dir`, which must not exist.
    pub fn commit(mut self, dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        let mode = RenameMode::NoReplace;
        sys::node::rename(self.work.fd(), &self.name, dir, name, mode)?;
        self.exists = false;
        Ok(())
    }

    /// Moves the object to `name` in `dir`, where it replaces another one.
    ///
    /// `order` is that of the file system. With [`RenameMode::Exchange`], the replaced object is moved to the work
    /// directory and removed.
    pub fn replace(
        mut self,
        (dir, name): (BorrowedFd<'_>, &[u8]),
        how: RenameMode,
        order: Order,
    ) -> Result<()> {
        order.before_replacing(self.work.fd())?;
        sys::node::rename(self.work.fd(), &self.name, dir, name, how)?;
        self.exists = how == RenameMode::Exchange;
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if self.exists
            && let Err(error) = sys::remove::remove_tree(self.work.fd(), &self.name)
        {
            log::warn!(
                "cannot remove {} from the work directory: {error}; the next mount will",
                self.name.shown()
            );
        }
    }
}
