//! Copy-up: an object of a lower layer is copied to the upper layer before it changes.
//!
//! The copy is staged in the work directory and committed by one rename, so that a crash leaves either the original or
//! the complete copy. While the content is copied, only the object's own lock is held.

mod commit;
mod dirs;
mod group;
mod stage;
mod times;
mod zero_device;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::inode::{DirState, FileState, Inode, InodeTable};
use crate::names::Links;
use crate::reach::{Context, access_path};
use cowl_layers::error::{Errno, Result};
use cowl_layers::layer::LayerDir;
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::stat::{FileKind, Stat};

use commit::Commit;
use dirs::DirCopyUp;
use group::GroupCommit;
use stage::stage_file;
pub(crate) use stage::{CopyExtent, copy_attributes, set_opaque, stage_dir, stage_in_temp_dir};
use times::preserve_ctime;
pub(crate) use times::preserve_times;
pub(crate) use zero_device::prepare_dir_for;

/// Copy-up of objects of any type.
#[derive(Clone, Copy)]
pub(crate) struct CopyUp<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) inodes: &'o InodeTable,
    pub(crate) links: Links<'o>,
}

impl<'o> CopyUp<'o> {
    fn dirs(&self) -> DirCopyUp<'o> {
        DirCopyUp {
            cx: self.cx,
            inodes: self.inodes,
        }
    }

    fn commit(&self) -> Commit<'o> {
        Commit {
            cx: self.cx,
            inodes: self.inodes,
        }
    }

    /// Copies up a directory and its ancestors.
    ///
    /// Returns its state and its location in the upper layer.
    pub(crate) fn copy_up_dir(&self, inode: &Arc<Inode>) -> Result<(DirState, Arc<LayerDir>)> {
        self.dirs().copy_up_dir(inode)
    }

    /// Copies up an object that is not a directory, and returns its new state.
    pub(crate) fn copy_up_file(&self, inode: &Arc<Inode>, extent: CopyExtent) -> Result<FileState> {
        let file = inode.file()?;
        if self.is_copied(&file, extent) {
            return Ok(file);
        }
        self.cx.stack.upper()?;
        let _copying = inode.copying().lock();
        let file = inode.file()?;
        if self.is_copied(&file, extent) {
            return Ok(file);
        }
        preserve_ctime(self.cx, self.inodes, inode, |fd, stat| {
            if self.cx.stack.is_in_upper(&file) {
                self.complete_metacopy(inode, &file)
            } else {
                self.copy_up_from_lower(inode, &file, (fd, stat), extent)
            }
        })?;
        inode.file()
    }

    /// Copies up an object of any type, for a change of its attributes.
    pub(crate) fn copy_up_any(&self, inode: &Arc<Inode>) -> Result<()> {
        if inode.is_dir() {
            if inode.dir()?.removed {
                return self.dirs().copy_up_removed_dir(inode);
            }
            self.copy_up_dir(inode).map(drop)
        } else {
            self.copy_up_file(inode, CopyExtent::Metadata).map(drop)
        }
    }

    /// Whether an object of any type is in the upper layer.
    pub(crate) fn is_in_upper(&self, inode: &Inode) -> Result<bool> {
        if inode.is_dir() {
            Ok(self.cx.stack.upper_dir(&inode.dir()?).is_some())
        } else {
            Ok(self.cx.stack.is_in_upper(&inode.file()?))
        }
    }

    /// Whether a file is copied up to this extent.
    fn is_copied(&self, file: &FileState, extent: CopyExtent) -> bool {
        self.cx.stack.is_in_upper(file) && (extent == CopyExtent::Metadata || file.data.is_none())
    }

    /// Copies the content of a metacopy into the upper layer.
    ///
    /// The marker is removed last: a crash before that leaves a metacopy, whose content in the lower layer is still
    /// complete. Also runs for a file that is about to be truncated: a metacopy of size 0 would be incomplete, and one
    /// without its marker a file of holes.
    fn complete_metacopy(&self, inode: &Arc<Inode>, file: &FileState) -> Result<()> {
        // Do not open it by the name in `file`: after a race with a rename, that name may belong to another file,
        // whose content would be overwritten.
        let target = sys::content::reopen((*access_path(inode)?).as_fd(), OFlags::RDWR)?;
        let before = sys::stat::stat_fd(&target)?;
        let data = file.data_loc().open_read()?;
        let copied = self.cx.preserving_capabilities(inode, &target, || {
            let (from, to) = (data.as_fd(), target.as_fd());
            sys::copy::copy_content(from, to, before.size, self.cx.write_back())
        })?;
        sys::attr::utimens(
            target.as_fd(),
            SetTime::At(before.atime),
            SetTime::At(before.mtime),
        )?;
        self.cx.order()?.content_first(&target, copied)?;
        let space = self.cx.stack.upper()?.layer.space();
        // Ignore absent markers: an earlier attempt may have failed after it removed the first one.
        remove_marker(target.as_fd(), space.metacopy())?;
        if file.redirect.is_some() {
            remove_marker(target.as_fd(), space.redirect())?;
        }
        inode.flags().set_unsynced_name();
        inode.update_content(|file| {
            file.data = None;
            file.redirect = None;
        })?;
        self.inodes.note_place(inode);
        Ok(())
    }

    /// Copies up a file that is only in lower layers.
    fn copy_up_from_lower(
        &self,
        inode: &Arc<Inode>,
        file: &FileState,
        source: (&OwnedFd, &Stat),
        extent: CopyExtent,
    ) -> Result<()> {
        if file.orphan {
            return self.copy_up_orphan(inode, file, source, extent);
        }
        let aliases = self.links.visible_names_with(inode, file, source.1)?;
        for alias in &aliases {
            self.copy_up_dir(&alias.parent)?;
        }
        let copy = stage_file(self.cx, inode.kind(), file, source, extent)?;
        match aliases.as_slice() {
            [] => self.copy_up_orphan(inode, file, source, extent),
            [only] => self.commit().commit_one(inode, file, copy, only),
            several => {
                let group = GroupCommit {
                    commit: self.commit(),
                    names: self.links.names,
                };
                group.commit(inode, file, copy, several)
            }
        }
    }

    /// Copies up an open file without a name. The copy has no name either.
    fn copy_up_orphan(
        &self,
        inode: &Arc<Inode>,
        file: &FileState,
        source: (&OwnedFd, &Stat),
        extent: CopyExtent,
    ) -> Result<()> {
        let extent = if extent == CopyExtent::Metadata && inode.kind() == FileKind::Regular {
            CopyExtent::Data
        } else {
            extent
        };
        let copy = stage_file(self.cx, inode.kind(), file, source, extent)?;
        self.commit().adopt_orphan(inode, file, copy)
    }
}

/// Removes a marker xattr if it exists.
fn remove_marker(fd: BorrowedFd<'_>, marker: &str) -> Result<()> {
    match sys::xattr::remove(fd, marker.as_bytes()) {
        Err(error) if error.errno() != Errno::NODATA => Err(error),
        _ => Ok(()),
    }
}
