//! The work folder: things are made here under a name of their own, and get their place by one rename.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Result;
use crate::sys;
use crate::sys::node::RenameHow;

/// The folder `work` inside the work folder that the user named, as kernel overlayfs has it.
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

    /// The folder's descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Removes what an earlier mount left behind. Nothing in here has a name in any layer, so
    /// nothing of the user's can be lost.
    pub fn clean(&self) -> Result<()> {
        for entry in sys::dir::entries(self.fd())? {
            sys::remove::remove_tree(self.fd(), &entry.name)?;
        }
        Ok(())
    }

    /// A place for something new; `make` gets the folder and the name to make it under. What it made
    /// is removed again unless it is committed.
    pub fn stage<T>(
        self: &Arc<Self>,
        make: impl FnOnce(BorrowedFd<'_>, &[u8]) -> Result<T>,
    ) -> Result<(Staged, T)> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let staged = Staged {
            work: self.clone(),
            name: format!("#{number:x}").into_bytes(),
            there: true,
        };
        // When making fails half-way, dropping `staged` removes what is there.
        let made = make(self.fd(), &staged.name)?;
        Ok((staged, made))
    }
}

/// Something in the work folder, on its way to its place.
#[derive(Debug)]
pub struct Staged {
    work: Arc<WorkDir>,
    name: Vec<u8>,
    there: bool,
}

impl Staged {
    /// Its name in the work folder.
    pub fn name(&self) -> &[u8] {
        &self.name
    }

    /// The work folder.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.work.fd()
    }

    /// An O_PATH descriptor of it.
    pub fn open_path(&self) -> Result<OwnedFd> {
        sys::dir::open_path(self.work.fd(), &self.name)
    }

    /// Gives it its place. With [`RenameHow::Exchange`] what was there comes to the work folder and
    /// is removed.
    pub fn commit(mut self, dir: BorrowedFd<'_>, name: &[u8], how: RenameHow) -> Result<()> {
        sys::node::rename(self.work.fd(), &self.name, dir, name, how)?;
        self.there = how == RenameHow::Exchange;
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if self.there
            && let Err(error) = sys::remove::remove_tree(self.work.fd(), &self.name)
        {
            log::warn!(
                "cannot remove {} from the work folder: {error}; the next mount will",
                self.name.escape_ascii()
            );
        }
    }
}
