//! Opening an upper, in steps: its directories, their locks, recovery from an interrupted mount, and the features of
//! their file system.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::lock::{self, LayerLock};
use super::whiteout::Whiteouts;
use super::{Layer, WorkDir, journal, private};
use crate::error::{Errno, Error, Result};
use crate::format::{ACL_ACCESS, ACL_DEFAULT};
use crate::setup::{SetupError, SetupKind, shown};
use crate::sys;
use crate::sys::early::Early;
use crate::sys::order::Order;
use crate::sys::private::Through;

/// The directories of an upper, open and checked.
pub(super) struct UpperDirs {
    layer: Arc<Layer>,
    /// The work directory that the user specified.
    outer: OwnedFd,
    work: PathBuf,
}

/// The directories of an upper that this process alone writes.
pub(super) struct LockedUpper {
    pub(super) layer: Arc<Layer>,
    pub(super) work: PathBuf,
    pub(super) locks: UpperLocks,
}

/// The exclusive locks of an upper.
#[derive(Debug)]
pub(super) struct UpperLocks {
    /// The lock of the layer.
    pub(super) layer: Arc<LayerLock>,
    /// The work directory that the user specified, locked.
    pub(super) outer: OwnedFd,
}

/// An upper in which nothing is left of an interrupted mount.
pub(super) struct RecoveredUpper {
    pub(super) layer: Arc<Layer>,
    pub(super) work: Arc<WorkDir>,
    pub(super) locks: UpperLocks,
    pub(super) work_path: PathBuf,
}

/// The features of an upper's file system.
pub(super) struct Features {
    pub(super) whiteouts: Whiteouts,
    pub(super) order: Order,
    pub(super) early: Early,
}

impl UpperDirs {
    /// Opens both directories through one mount, and checks that they are separate and on one file system.
    pub(super) fn open(
        through: Through,
        layer: Arc<Layer>,
        work: &Path,
    ) -> Result<Self, SetupError> {
        let upper = layer.path().to_path_buf();
        let outer = sys::dir::open_root(work).map_err(|error| unusable(work, error))?;
        let root = sys::dir::open_root(&upper)
            .map_err(|error| SetupError::at("cannot use the layer", &upper, error))?;
        let ([root, outer], reached) = private::for_writing([root, outer], [&upper, work], through);
        let layer = layer.reached_as(root, reached);
        check_separate(&upper, work, &layer, &outer)?;
        Ok(Self {
            layer,
            outer,
            work: work.to_path_buf(),
        })
    }

    /// Takes the exclusive locks of both directories.
    pub(super) fn lock(self) -> Result<LockedUpper, SetupError> {
        let Self { layer, outer, work } = self;
        let lock = lock::for_writing("upper layer", layer.path(), layer.root_fd())?;
        let outer = lock::for_writing("workdir", &work, outer.as_fd())?;
        let (layer, lock) = LayerLock::of_layer(layer, lock);
        Ok(LockedUpper {
            layer,
            work,
            locks: UpperLocks { layer: lock, outer },
        })
    }
}

impl LockedUpper {
    /// Completes the operations in the journal, and removes everything else that an interrupted mount left in
    /// the work directory.
    pub(super) fn recover(self) -> Result<RecoveredUpper, SetupError> {
        let Self { layer, work, locks } = self;
        let recovered = || {
            let inner = WorkDir::new(open_inner(&locks.outer)?);
            journal::finish(&layer, &inner)?;
            inner.clean()?;
            Ok(inner)
        };
        let inner = recovered().map_err(|error| unusable(&work, error))?;
        Ok(RecoveredUpper {
            layer,
            work: inner,
            locks,
            work_path: work,
        })
    }
}

impl RecoveredUpper {
    /// Determines what the file system supports, and creates the shared whiteout.
    pub(super) fn probe(&self) -> Result<Features, SetupError> {
        check_markers(&self.layer, &self.work)?;
        let whiteouts =
            Whiteouts::prepare(&self.work, self.locks.outer.as_fd(), self.layer.space())
                .map_err(|error| unusable(&self.work_path, error))?;
        Ok(Features {
            whiteouts,
            order: Order::for_dir(self.layer.root_fd()),
            early: Early::for_dir(self.layer.root_fd()),
        })
    }
}

fn unusable(work: &Path, error: Error) -> SetupError {
    SetupError::at("cannot use the workdir", work, error)
}

/// Opens the directory in which objects are made, and creates it if it does not exist.
fn open_inner(outer: &OwnedFd) -> Result<OwnedFd> {
    match sys::node::mkdir(outer.as_fd(), b"work", 0o700) {
        Err(error) if error.errno() != Errno::EXIST => return Err(error),
        _ => {}
    }
    let inner = sys::dir::open_dir(outer.as_fd(), b"work")?;
    remove_acls(inner.as_fd())?;
    Ok(inner)
}

/// Removes the ACLs of a directory for new objects.
///
/// New objects must not be accessible before they have their own rights: each copied-up file would inherit a default
/// ACL.
pub(super) fn remove_acls(dir: BorrowedFd<'_>) -> Result<()> {
    for acl in [ACL_DEFAULT, ACL_ACCESS] {
        match sys::xattr::remove(dir, acl) {
            Err(error) if !matches!(error.errno(), Errno::NODATA | Errno::OPNOTSUPP) => {
                return Err(error);
            }
            _ => {}
        }
    }
    Ok(())
}

fn check_separate(
    upper: &Path,
    work: &Path,
    layer: &Layer,
    outer: &OwnedFd,
) -> Result<(), SetupError> {
    let stat = sys::stat::stat_fd(outer)
        .map_err(|error| SetupError::at("cannot use the workdir", work, error))?;
    let usage = |what: String, hint: &str| SetupError::new(SetupKind::Usage, what, hint);
    if stat.dev != layer.dev() {
        return Err(usage(
            format!(
                "upperdir {} and workdir {} are on different file systems",
                shown(upper),
                shown(work)
            ),
            "specify a workdir on the file system of the upperdir",
        ));
    }
    let inside = |inner: &Path, outer: &Path| match (inner.canonicalize(), outer.canonicalize()) {
        (Ok(inner), Ok(outer)) => inner.starts_with(outer),
        _ => false,
    };
    if inside(work, upper) || inside(upper, work) {
        return Err(usage(
            format!(
                "one of upperdir {} and workdir {} is inside the other",
                shown(upper),
                shown(work)
            ),
            "specify two separate directories",
        ));
    }
    Ok(())
}

/// Returns an error if the file system does not support the markers: without them no name could be hidden and no
/// directory moved.
fn check_markers(layer: &Layer, work: &Arc<WorkDir>) -> Result<(), SetupError> {
    let tried = work.stage(|dir, name| {
        sys::node::mkdir(dir, name, 0o700)?;
        let fd = sys::dir::open_path(dir, name)?;
        sys::xattr::set(fd.as_fd(), layer.space().opaque().as_bytes(), b"y")
    });
    match tried {
        Ok(_) => Ok(()),
        // Not a statement about markers; the mount may serve to free space.
        Err(error) if matches!(error.errno(), Errno::NOSPC | Errno::DQUOT) => {
            log::warn!("the disk of {} is full", shown(layer.path()));
            Ok(())
        }
        Err(error) => {
            let hint = match error.errno() {
                Errno::OPNOTSUPP | Errno::PERM => {
                    "the upper layer's file system must support extended attributes"
                }
                _ => "",
            };
            let what = format!("cannot set {} below", layer.space().opaque());
            Err(SetupError::at(&what, layer.path(), error).hint(hint))
        }
    }
}
