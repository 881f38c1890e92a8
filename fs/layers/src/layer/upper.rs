//! The layer of a stack that is written, with its work directory.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use super::whiteout::{WhiteoutForm, Whiteouts};
use super::{Layer, WorkDir, lock, private};
use crate::error::{Errno, Result};
use crate::format::{ACL_ACCESS, ACL_DEFAULT, OPAQUE_XATTR_WHITEOUTS, XattrSpace};
use crate::setup::{SetupError, SetupKind, shown};
use crate::sys;
use crate::sys::early::Early;
use crate::sys::node::RenameHow;
use crate::sys::order::Order;
use crate::sys::private::Through;

/// The writable layer of a stack.
#[derive(Debug)]
pub struct Upper {
    /// The layer.
    pub layer: Arc<Layer>,
    /// The directory in which new objects are created.
    pub work: Arc<WorkDir>,
    whiteouts: Whiteouts,
    order: Order,
    early: Early,
    locks: [OwnedFd; 2],
}

impl Upper {
    /// Opens, checks and locks an upper layer, completes its journal, and cleans its work directory.
    ///
    /// Both directories must be on one file system, because objects are moved from the work directory by a rename.
    pub fn open(upper: &Path, work: &Path, space: XattrSpace) -> Result<Arc<Self>, SetupError> {
        Self::of(Through::Writing, Layer::open(upper, space)?, work)
    }

    /// Like [`Self::open`], for a layer that is open already. `through` determines whether reads update the atime.
    pub fn of(through: Through, layer: Arc<Layer>, work: &Path) -> Result<Arc<Self>, SetupError> {
        let path = layer.path().to_path_buf();
        let upper = path.as_path();
        let at = |error| SetupError::at("cannot use the work directory", work, error);
        let outer = sys::dir::open_root(work).map_err(at)?;
        let root = sys::dir::open_root(upper)
            .map_err(|error| SetupError::at("cannot use the layer", upper, error))?;
        let ([root, outer], no_devices) =
            private::for_writing([root, outer], [upper, work], through);
        let layer = layer.opened_as(root, no_devices);
        check_separate(upper, work, &layer, &outer)?;
        let locks = [
            lock::for_writing("upper layer", upper, layer.root_fd())?,
            lock::for_writing("work directory", work, outer.as_fd())?,
        ];
        let inner = match sys::node::mkdir(outer.as_fd(), b"work", 0o700) {
            Ok(()) => sys::dir::open_dir(outer.as_fd(), b"work"),
            Err(error) if error.errno() == Errno::EXIST => {
                sys::dir::open_dir(outer.as_fd(), b"work")
            }
            Err(error) => Err(error),
        }
        .map_err(at)?;
        // No other user may access a new object before its permissions are set. A default ACL would be inherited by
        // every copied-up file.
        for acl in [ACL_DEFAULT, ACL_ACCESS] {
            match sys::xattr::remove(inner.as_fd(), acl) {
                Err(error) if !matches!(error.errno(), Errno::NODATA | Errno::OPNOTSUPP) => {
                    return Err(at(error));
                }
                _ => {}
            }
        }
        let work = WorkDir::new(inner);
        super::journal::finish(&layer, &work).map_err(at)?;
        work.clean().map_err(at)?;
        check_xattrs(&layer, &work)?;
        let whiteouts = Whiteouts::prepare(&work, outer.as_fd(), layer.space()).map_err(at)?;
        let order = Order::of(layer.root_fd());
        let early = Early::of(layer.root_fd());
        Ok(Arc::new(Self {
            layer,
            work,
            whiteouts,
            order,
            early,
            locks,
        }))
    }

    /// Converts the exclusive lock of the layer to a shared one, held by the returned descriptor.
    ///
    /// The layer is a lower layer from now on. It is never without a lock in between.
    pub fn freeze(&self) -> Result<OwnedFd> {
        let [lock, _] = &self.locks;
        let shared = lock.try_clone().map_err(|_| Errno::MFILE)?;
        sys::dir::lock_to_shared(&shared)?;
        Ok(shared)
    }

    /// Opens the index that kernel overlayfs left in the work directory; `None` if there is none.
    pub fn kernel_index(&self) -> Result<Option<OwnedFd>> {
        let [_, outer] = &self.locks;
        match sys::dir::open_dir(outer.as_fd(), b"index") {
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

    /// Creates a whiteout at `name` in `dir`. The name must not exist in this layer.
    pub fn whiteout_new(&self, dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        match self.whiteouts.form() {
            WhiteoutForm::Device => self.whiteouts.make(dir, name),
            WhiteoutForm::MarkedFile => {
                let staged = self.stage_whiteout(dir)?;
                staged.commit(dir, name, RenameHow::NoReplace)
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

fn check_separate(
    upper: &Path,
    work: &Path,
    layer: &Layer,
    outer: &OwnedFd,
) -> Result<(), SetupError> {
    let stat = sys::stat::stat_fd(outer)
        .map_err(|error| SetupError::at("cannot use the work directory", work, error))?;
    let usage = |text: String, hint: &str| SetupError::new(SetupKind::Usage, text, hint);
    if stat.dev != layer.dev() {
        return Err(usage(
            format!(
                "upperdir {} and workdir {} are on different file systems",
                shown(upper),
                shown(work)
            ),
            "specify a work directory on the file system of the upper layer",
        ));
    }
    let inside = |inner: &Path, outer: &Path| match (inner.canonicalize(), outer.canonicalize()) {
        (Ok(inner), Ok(outer)) => inner.starts_with(outer),
        _ => false,
    };
    if inside(work, upper) || inside(upper, work) {
        return Err(usage(
            format!(
                "one of upperdir {} and workdir {} contains the other",
                shown(upper),
                shown(work)
            ),
            "specify two separate directories",
        ));
    }
    Ok(())
}

/// Checks that marker xattrs can be set. Without them, a rename of a directory would fail later.
fn check_xattrs(layer: &Layer, work: &Arc<WorkDir>) -> Result<(), SetupError> {
    let tried = work.stage(|dir, name| {
        sys::node::mkdir(dir, name, 0o700)?;
        let fd = sys::dir::open_path(dir, name)?;
        sys::xattr::set(fd.as_fd(), layer.space().opaque().as_bytes(), b"y")
    });
    match tried {
        Ok(_) => Ok(()),
        // On a full disk the check is inconclusive. The mount must succeed, so that files can be removed.
        Err(error) if matches!(error.errno(), Errno::NOSPC | Errno::DQUOT) => {
            log::warn!("the disk of {} is full", shown(layer.path()));
            Ok(())
        }
        Err(error) => {
            let hint = match error.errno() {
                Errno::OPNOTSUPP | Errno::PERM => {
                    "use an upper layer on a file system with extended attributes"
                }
                _ => "",
            };
            let failed = format!("cannot set {} in", layer.space().opaque());
            Err(SetupError::at(&failed, layer.path(), error).hint(hint))
        }
    }
}
