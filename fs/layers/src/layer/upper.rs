//! The one layer of a stack that is written, with its work folder.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use super::upper_dirs::{Features, RecoveredUpper, UpperDirs};
use super::whiteout::{WhiteoutForm, Whiteouts};
use super::{Layer, WorkDir};
use crate::error::{Errno, Result};
use crate::format::{OPAQUE_XATTR_WHITEOUTS, XattrSpace};
use crate::setup::SetupError;
use crate::sys;
use crate::sys::early::Early;
use crate::sys::node::RenameHow;
use crate::sys::order::Order;
use crate::sys::private::Through;

/// The layer that is written.
#[derive(Debug)]
pub struct Upper {
    /// The tree.
    pub layer: Arc<Layer>,
    /// Where new things are made.
    pub work: Arc<WorkDir>,
    whiteouts: Whiteouts,
    order: Order,
    early: Early,
    locks: [OwnedFd; 2],
}

impl Upper {
    /// Opens an upper and its work directory: takes their locks, completes or rolls back what an interrupted mount
    /// left, and probes the file system. The two directories must lie on one file system, because objects are
    /// moved from the work directory to their place by a rename.
    pub fn open(upper: &Path, work: &Path, space: XattrSpace) -> Result<Arc<Self>, SetupError> {
        Self::of(Through::Writing, Layer::open(upper, space)?, work)
    }

    /// Like [`Upper::open`], for a layer that is open already; `through` decides on access times.
    pub fn of(through: Through, layer: Arc<Layer>, work: &Path) -> Result<Arc<Self>, SetupError> {
        let dirs = UpperDirs::open(through, layer, work)?;
        let locked = dirs.lock()?;
        let recovered = locked.recover()?;
        let features = recovered.probe()?;
        Ok(Arc::new(Self::assemble(recovered, features)))
    }

    fn assemble(recovered: RecoveredUpper, features: Features) -> Self {
        let RecoveredUpper {
            layer, work, locks, ..
        } = recovered;
        Self {
            layer,
            work,
            whiteouts: features.whiteouts,
            order: features.order,
            early: features.early,
            locks,
        }
    }

    /// Turns the lock for writing into one for reading, which lives as long as the returned descriptor:
    /// the layer is a lower from here on, and at no moment without a lock.
    pub fn freeze(&self) -> Result<OwnedFd> {
        let [lock, _] = &self.locks;
        let shared = lock.try_clone().map_err(|_| Errno::MFILE)?;
        sys::dir::lock_to_shared(&shared)?;
        Ok(shared)
    }

    /// Opens the index that kernel overlayfs left in the work directory; None without one.
    pub fn kernel_index(&self) -> Result<Option<OwnedFd>> {
        let [_, outer] = &self.locks;
        match sys::dir::open_dir(outer.as_fd(), b"index") {
            Ok(fd) => Ok(Some(fd)),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The form in which this upper hides names.
    pub fn whiteout_form(&self) -> WhiteoutForm {
        self.whiteouts.form()
    }

    /// In which order its file system brings to the disk what it is given.
    pub fn order(&self) -> Order {
        self.order
    }

    /// When its file system starts write-back early.
    pub fn early(&self) -> Early {
        self.early
    }

    /// Hides `name` in `dir`, which must have no such name yet in this layer.
    pub fn whiteout_new(&self, dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        match self.whiteouts.form() {
            WhiteoutForm::Device => self.whiteouts.make(dir, name),
            WhiteoutForm::MarkedFile => {
                let staged = self.stage_whiteout(dir)?;
                staged.commit(dir, name, RenameHow::NoReplace)
            }
        }
    }

    /// Makes a whiteout in the work folder, for `dir`.
    pub fn stage_whiteout(&self, dir: BorrowedFd<'_>) -> Result<super::Staged> {
        let staged = self.whiteouts.stage()?;
        if self.whiteouts.form() == WhiteoutForm::MarkedFile {
            self.mark_folder(dir)?;
        }
        Ok(staged)
    }

    /// To be called before the whiteout `name` in `from` is moved to the folder `dir`: a listing of that
    /// must know that it may be a marked file.
    pub fn ready_for_whiteout(
        &self,
        dir: BorrowedFd<'_>,
        from: BorrowedFd<'_>,
        name: &[u8],
    ) -> Result<()> {
        if sys::stat::stat_at(from, name)?.is_whiteout_device() {
            return Ok(());
        }
        self.mark_folder(dir)
    }

    fn mark_folder(&self, dir: BorrowedFd<'_>) -> Result<()> {
        let mark = self.layer.space().opaque().as_bytes();
        if sys::xattr::get(dir, mark)?.is_none() {
            sys::xattr::set(dir, mark, OPAQUE_XATTR_WHITEOUTS)?;
        }
        Ok(())
    }
}
