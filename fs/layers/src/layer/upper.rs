//! The one layer of a stack that is written, with its work folder.

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
    /// Opens, checks, locks and cleans. The two folders must lie on one file system, because what is
    /// made in the work folder gets its place by a rename.
    pub fn open(upper: &Path, work: &Path, space: XattrSpace) -> Result<Arc<Self>, SetupError> {
        Self::of(Through::Writing, Layer::open(upper, space)?, work)
    }

    /// The same for a layer that is open already, with a word on access times.
    pub fn of(through: Through, layer: Arc<Layer>, work: &Path) -> Result<Arc<Self>, SetupError> {
        let path = layer.path().to_path_buf();
        let upper = path.as_path();
        let at = |error| SetupError::at("cannot use the work folder", work, error);
        let outer = sys::dir::open_root(work).map_err(at)?;
        let root = sys::dir::open_root(upper)
            .map_err(|error| SetupError::at("cannot use the layer", upper, error))?;
        let ([root, outer], no_devices) =
            private::for_writing([root, outer], [upper, work], through);
        let layer = layer.opened_as(root, no_devices);
        check_separate(upper, work, &layer, &outer)?;
        let locks = [
            lock::for_writing("upper layer", upper, layer.root_fd())?,
            lock::for_writing("work folder", work, outer.as_fd())?,
        ];
        let inner = match sys::node::mkdir(outer.as_fd(), b"work", 0o700) {
            Ok(()) => sys::dir::open_dir(outer.as_fd(), b"work"),
            Err(error) if error.errno() == Errno::EXIST => {
                sys::dir::open_dir(outer.as_fd(), b"work")
            }
            Err(error) => Err(error),
        }
        .map_err(at)?;
        // What is made in there must be nobody's until it has its own rights: a default ACL would be
        // inherited by every copied-up file.
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
        check_marks(&layer, &work)?;
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

fn check_separate(
    upper: &Path,
    work: &Path,
    layer: &Layer,
    outer: &OwnedFd,
) -> Result<(), SetupError> {
    let stat = sys::stat::stat_fd(outer)
        .map_err(|error| SetupError::at("cannot use the work folder", work, error))?;
    let usage = |what: String, hint: &str| SetupError::new(SetupKind::Usage, what, hint);
    if stat.dev != layer.dev() {
        return Err(usage(
            format!(
                "upperdir {} and workdir {} lie on different file systems",
                shown(upper),
                shown(work)
            ),
            "name a work folder on the upper's file system",
        ));
    }
    let inside = |inner: &Path, outer: &Path| match (inner.canonicalize(), outer.canonicalize()) {
        (Ok(inner), Ok(outer)) => inner.starts_with(outer),
        _ => false,
    };
    if inside(work, upper) || inside(upper, work) {
        return Err(usage(
            format!(
                "upperdir {} and workdir {} lie in one another",
                shown(upper),
                shown(work)
            ),
            "name two separate folders",
        ));
    }
    Ok(())
}

/// A layer without extended attributes could hide nothing and move no folder: better said at once.
fn check_marks(layer: &Layer, work: &Arc<WorkDir>) -> Result<(), SetupError> {
    let tried = work.stage(|dir, name| {
        sys::node::mkdir(dir, name, 0o700)?;
        let fd = sys::dir::open_path(dir, name)?;
        sys::xattr::set(fd.as_fd(), layer.space().opaque().as_bytes(), b"y")
    });
    match tried {
        Ok(_) => Ok(()),
        // Nothing can be told; whoever mounts it may do so to make room.
        Err(error) if matches!(error.errno(), Errno::NOSPC | Errno::DQUOT) => {
            log::warn!("the disk of {} is full", shown(layer.path()));
            Ok(())
        }
        Err(error) => {
            let hint = match error.errno() {
                Errno::OPNOTSUPP | Errno::PERM => {
                    "the upper layer's file system must keep extended attributes"
                }
                _ => "",
            };
            let what = format!("cannot set {} below", layer.space().opaque());
            Err(SetupError::at(&what, layer.path(), error).hint(hint))
        }
    }
}
