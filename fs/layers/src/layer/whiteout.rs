//! Creates whiteouts as hard links to one inode in the work directory, as kernel overlayfs does.
//!
//! A link needs no inode, so lower files can be removed on a disk without a free inode, and on a full XFS. The shared
//! whiteout is created when the layer is opened. It persists between mounts, so that a mount on a full disk has one.
//! Where a link is not possible (between project quotas, on a file system without hard links), a separate whiteout is
//! created.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use crate::locks::Mutex;

use super::WorkDir;
use super::work::Staged;
use crate::error::{Errno, Error, Result};
use crate::format::XattrSpace;
use crate::sys;
use crate::sys::node::RenameMode;
use crate::sys::order::Order;
use crate::sys::stat::FileKind;

/// The name of the shared whiteout in the work directory that the user specified.
///
/// It is next to `work`, which holds all temporary objects.
const SHARED: &[u8] = b"whiteout";

/// The form of whiteouts on a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WhiteoutForm {
    /// A character device 0:0. Creating one needs no privilege since Linux 5.8.
    Device,
    /// An empty file with a marker xattr, in a directory marked opaque=x, for file systems that refuse devices.
    MarkedFile,
}

/// Creates the whiteouts of one layer.
#[derive(Debug)]
pub(super) struct Whiteouts {
    work: Arc<WorkDir>,
    /// The directory of the shared whiteout.
    shared_dir: OwnedFd,
    space: XattrSpace,
    form: WhiteoutForm,
    /// Cleared once the file system has refused a link.
    can_link: AtomicBool,
    renewing: Mutex<()>,
}

impl Whiteouts {
    /// Returns the form of the whiteouts, and whether they are linked.
    pub(super) fn record(&self) -> (WhiteoutForm, bool) {
        (self.form, self.can_link.load(Ordering::Relaxed))
    }

    /// Continues to create whiteouts as the recorded ones, without access to the file system.
    pub(super) fn from_record(
        (form, can_link): (WhiteoutForm, bool),
        work: &Arc<WorkDir>,
        shared_dir: OwnedFd,
        space: XattrSpace,
    ) -> Self {
        Self {
            work: work.clone(),
            shared_dir,
            space,
            form,
            can_link: AtomicBool::new(can_link),
            renewing: Mutex::new(()),
        }
    }

    /// Determines the form of whiteouts, and creates the shared one in `shared_dir` if there is space for it.
    pub(super) fn prepare(
        work: &Arc<WorkDir>,
        shared_dir: BorrowedFd<'_>,
        space: XattrSpace,
    ) -> Result<Self> {
        let mut whiteouts = Self {
            work: work.clone(),
            shared_dir: shared_dir.try_clone_to_owned().map_err(|_| Errno::MFILE)?,
            space,
            form: WhiteoutForm::Device,
            can_link: AtomicBool::new(true),
            renewing: Mutex::new(()),
        };
        let earlier = earlier_form(shared_dir, space)?;
        if earlier == Some(WhiteoutForm::Device) {
            return Ok(whiteouts);
        }
        match whiteouts.renew() {
            Ok(()) => {}
            Err(Error::Errno(Errno::PERM | Errno::OPNOTSUPP | Errno::INVAL | Errno::ACCESS)) => {
                whiteouts.form = WhiteoutForm::MarkedFile;
                if earlier.is_none() {
                    whiteouts.renew().or_else(unless_full)?;
                }
            }
            Err(error) => {
                unless_full(error)?;
                // A full disk does not show whether devices can be created. A whiteout of an earlier mount does.
                whiteouts.form = earlier.unwrap_or(WhiteoutForm::Device);
            }
        }
        Ok(whiteouts)
    }

    /// Returns the form of the whiteouts.
    pub(super) fn form(&self) -> WhiteoutForm {
        self.form
    }

    /// Creates a whiteout at an unused name.
    pub(super) fn make(&self, dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        if self.can_link.load(Ordering::Relaxed) {
            match self.link(dir, name) {
                Ok(()) => return Ok(()),
                Err(Error::Errno(Errno::EXIST)) => return Err(Error::Errno(Errno::EXIST)),
                Err(error) => {
                    log::debug!("cannot link the shared whiteout: {error}");
                    let never = matches!(
                        error.errno(),
                        Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::ACCESS
                    );
                    self.can_link.fetch_and(!never, Ordering::Relaxed);
                }
            }
        }
        self.make_own(dir, name)
    }

    /// Creates a whiteout in the work directory.
    pub(super) fn stage(&self) -> Result<Staged> {
        let (staged, ()) = self.work.stage(|work, name| self.make(work, name))?;
        Ok(staged)
    }

    fn link(&self, dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        let link = || sys::node::link(self.shared_dir.as_fd(), SHARED, dir, name);
        match link() {
            // The link limit was reached, or the shared whiteout was removed or could not be created before.
            Err(Error::Errno(Errno::MLINK | Errno::NOENT)) => {}
            done => return done,
        }
        let _one = self.renewing.lock();
        match link() {
            Err(Error::Errno(Errno::MLINK | Errno::NOENT)) => {}
            done => return done,
        }
        self.renew()?;
        link()
    }

    /// Replaces the shared whiteout with a new one.
    fn renew(&self) -> Result<()> {
        let (staged, ()) = self.work.stage(|work, name| self.make_own(work, name))?;
        let to = (self.shared_dir.as_fd(), SHARED);
        staged.replace(to, RenameMode::Replace, Order::Volatile)
    }

    fn make_own(&self, dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        match self.form {
            WhiteoutForm::Device => sys::node::mknod(dir, name, FileKind::CharDevice, 0, 0),
            WhiteoutForm::MarkedFile => {
                sys::node::mknod(dir, name, FileKind::Regular, 0o600, 0)?;
                let fd = sys::dir::open_path(dir, name)?;
                sys::xattr::set(fd.as_fd(), self.space.whiteout().as_bytes(), b"")
            }
        }
    }
}

/// Returns the form of the shared whiteout that an earlier mount left. Any other object with its name is removed.
fn earlier_form(dir: BorrowedFd<'_>, space: XattrSpace) -> Result<Option<WhiteoutForm>> {
    let stat = match sys::stat::stat_at(dir, SHARED) {
        Ok(stat) => stat,
        Err(error) if error.is_absent() => return Ok(None),
        Err(error) => return Err(error),
    };
    if stat.is_whiteout_device() {
        return Ok(Some(WhiteoutForm::Device));
    }
    let xattr = space.whiteout().as_bytes();
    let marked = stat.kind() == FileKind::Regular
        && stat.size == 0
        && sys::xattr::get_at(dir, SHARED, xattr)?.is_some();
    if !marked {
        sys::remove::remove_tree(dir, SHARED)?;
    }
    Ok(marked.then_some(WhiteoutForm::MarkedFile))
}

/// Suppresses the errors of a full disk.
fn unless_full(error: Error) -> Result<()> {
    match error.errno() {
        Errno::NOSPC | Errno::DQUOT => {
            log::warn!("cannot prepare a whiteout: the disk is full");
            Ok(())
        }
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn work(path: &std::path::Path) -> Arc<WorkDir> {
        WorkDir::new(sys::dir::open_root(path).unwrap())
    }

    fn ino_and_links(path: &std::path::Path) -> (u64, u64) {
        let meta = std::fs::symlink_metadata(path).unwrap();
        (meta.ino(), meta.nlink())
    }

    #[test]
    fn whiteouts_are_hard_links_to_one_inode() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("work")).unwrap();
        let work = work(&dir.path().join("work"));
        let space = XattrSpace::detect();
        let shared_dir = sys::dir::open_root(dir.path()).unwrap();
        let prepare = || Whiteouts::prepare(&work, shared_dir.as_fd(), space).unwrap();
        let whiteouts = prepare();
        for name in ["a", "b"] {
            whiteouts.make(shared_dir.as_fd(), name.as_bytes()).unwrap();
        }
        let shared = dir.path().join("whiteout");
        let (ino, links) = ino_and_links(&shared);
        assert_eq!(links, 3);
        assert_eq!(ino_and_links(&dir.path().join("a")).0, ino);
        let taken = whiteouts.make(shared_dir.as_fd(), b"a").unwrap_err();
        assert_eq!(taken.errno(), Errno::EXIST);

        // The next mount uses the same one. If it is removed, a new one is created.
        let form = whiteouts.form();
        let whiteouts = prepare();
        assert_eq!(whiteouts.form(), form);
        assert_eq!(ino_and_links(&shared).0, ino);
        std::fs::remove_file(&shared).unwrap();
        whiteouts.make(shared_dir.as_fd(), b"c").unwrap();
        assert_ne!(ino_and_links(&dir.path().join("c")).0, ino);
        assert_eq!(ino_and_links(&shared).1, 2);

        // An object of another type at that name is replaced.
        std::fs::remove_file(&shared).unwrap();
        std::fs::create_dir(&shared).unwrap();
        prepare();
        assert!(!std::fs::symlink_metadata(&shared).unwrap().is_dir());
    }
}
