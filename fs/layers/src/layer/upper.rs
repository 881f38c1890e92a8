//! The layer of a stack that is written, with its work directory.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::lock::LayerLock;
use super::upper_dirs::{Features, LockedUpper, RecoveredUpper, UpperDirs, UpperLocks};
use super::whiteout::{WhiteoutForm, Whiteouts};
use super::{Layer, WorkDir};
use crate::error::{Errno, Result};
use crate::format::{OPAQUE_XATTR_WHITEOUTS, XattrSpace};
use crate::setup::SetupError;
use crate::sys;
use crate::sys::early::Early;
use crate::sys::order::Order;
use crate::sys::private::Through;

/// The writable layer of a stack.
#[derive(Debug)]
pub struct Upper {
    /// The layer.
    pub layer: Arc<Layer>,
    /// The directory in which new objects are created.
    pub work: Arc<WorkDir>,
    pub(super) whiteouts: Whiteouts,
    pub(super) order: Order,
    pub(super) early: Early,
    pub(super) locks: UpperLocks,
    /// The path of the work directory that the user specified.
    pub(super) work_path: PathBuf,
    /// Whether files can share blocks, once that was determined.
    pub(super) shares_blocks: OnceLock<bool>,
}

impl Upper {
    /// Opens, checks and locks an upper layer, completes its journal, and cleans its work directory.
    ///
    /// Both directories must be on one file system, because objects are moved from the work directory by a rename.
    pub fn open(upper: &Path, work: &Path, space: XattrSpace) -> Result<Arc<Self>, SetupError> {
        Self::from_layer(Through::WRITING, Layer::open(upper, space)?, work)
    }

    /// Like [`Upper::open`], for a layer that is open already; `through` decides on access times.
    pub fn from_layer(
        through: Through,
        layer: Arc<Layer>,
        work: &Path,
    ) -> Result<Arc<Self>, SetupError> {
        let dirs = UpperDirs::open(through, layer, work)?;
        Self::from_locked(dirs.lock()?)
    }

    /// Releases the locks. To be called when nothing is written to the layer any more.
    pub fn unlock(&self) -> Result<()> {
        self.locks.layer.unlock()?;
        sys::dir::unlock(&self.locks.outer)
    }

    /// Completes the journal of an upper layer, and cleans its work directory.
    pub(super) fn from_locked(locked: LockedUpper) -> Result<Arc<Self>, SetupError> {
        let recovered = locked.recover()?;
        let features = recovered.probe()?;
        Ok(Arc::new(Self::assemble(recovered, features)))
    }

    fn assemble(recovered: RecoveredUpper, features: Features) -> Self {
        let RecoveredUpper {
            layer,
            work,
            locks,
            work_path,
        } = recovered;
        Self {
            layer,
            work,
            whiteouts: features.whiteouts,
            order: features.order,
            early: features.early,
            locks,
            work_path,
            shares_blocks: OnceLock::new(),
        }
    }

    /// Converts the exclusive lock of the layer to a shared one, and returns it.
    ///
    /// The layer is a lower layer from now on. It is never without a lock in between.
    pub fn freeze(&self) -> Result<Arc<LayerLock>> {
        self.locks.layer.share()?;
        Ok(self.locks.layer.clone())
    }

    /// Converts the lock that [`Self::freeze`] has shared to an exclusive one: the layer remains the upper one.
    pub fn thaw(&self) -> Result<()> {
        self.locks.layer.make_exclusive()
    }

    /// Opens the index that kernel overlayfs left in the work directory; `None` if there is none.
    pub fn kernel_index(&self) -> Result<Option<OwnedFd>> {
        match sys::dir::open_dir(self.locks.outer.as_fd(), b"index") {
            Ok(fd) => Ok(Some(fd)),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns the form of the layer's whiteouts.
    pub fn whiteout_form(&self) -> WhiteoutForm {
        self.whiteouts.form()
    }

    /// Returns the order in which the layer's file system makes changes durable.
    pub fn order(&self) -> Order {
        self.order
    }

    /// Returns the cases in which the layer's file system starts writeback early.
    pub fn early(&self) -> Early {
        self.early
    }

    /// Determines whether files of the layer can share blocks, by two files without names.
    ///
    /// The answer is cached, unlike an error, such as that of a full disk.
    pub fn can_share_blocks(&self) -> Result<bool> {
        if let Some(known) = self.shares_blocks.get() {
            return Ok(*known);
        }
        let found = self.try_to_share_blocks()?;
        Ok(*self.shares_blocks.get_or_init(|| found))
    }

    fn try_to_share_blocks(&self) -> Result<bool> {
        let create = || sys::node::create_nameless(self.work.fd(), 0o600);
        let tried = create().and_then(|from| {
            sys::copy::write_all(&from, &[1; 4096], 0)?;
            let to = create()?;
            sys::copy::share(from.as_fd(), to.as_fd())?;
            sys::extents::is_unchanged(&from, &to).map(drop)
        });
        match tried {
            Ok(()) => Ok(true),
            // Files without names are not supported.
            Err(error) if matches!(error.errno(), Errno::OPNOTSUPP | Errno::ISDIR) => Ok(false),
            Err(error) if sys::copy::cannot_share(error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Creates a whiteout at `name` in `dir`. The name must not exist in this layer.
    pub fn whiteout_new(&self, dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        match self.whiteouts.form() {
            WhiteoutForm::Device => self.whiteouts.make(dir, name),
            WhiteoutForm::MarkedFile => {
                let staged = self.stage_whiteout(dir)?;
                staged.commit(dir, name)
            }
        }
    }

    /// Creates a whiteout in the work directory, and prepares `dir` for it.
    pub fn stage_whiteout(&self, dir: BorrowedFd<'_>) -> Result<super::Staged> {
        let staged = self.whiteouts.stage()?;
        if self.whiteouts.form() == WhiteoutForm::MarkedFile {
            self.mark_dir(dir)?;
        }
        Ok(staged)
    }

    /// Prepares `dir` for the whiteout `name` that is about to be moved there from `from`.
    ///
    /// If it is an xattr whiteout, `dir` needs opaque=x, without which listings do not check for those.
    pub fn ready_for_whiteout(
        &self,
        dir: BorrowedFd<'_>,
        from: BorrowedFd<'_>,
        name: &[u8],
    ) -> Result<()> {
        if sys::stat::stat_at(from, name)?.is_whiteout_device() {
            return Ok(());
        }
        self.mark_dir(dir)
    }

    /// Sets opaque=x, unless the directory has an opaque xattr.
    fn mark_dir(&self, dir: BorrowedFd<'_>) -> Result<()> {
        let opaque = self.layer.space().opaque().as_bytes();
        if sys::xattr::get(dir, opaque)?.is_none() {
            sys::xattr::set(dir, opaque, OPAQUE_XATTR_WHITEOUTS)?;
        }
        Ok(())
    }
}
