//! Copy-up: moving an object into the layer that is written.
//!
//! Everything is made in the work directory and gets its name by one call, so that a crash leaves the old
//! object or the new one. Only the object's own lock is held meanwhile.

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
use cowl_layers::format::CAPABILITY;
use cowl_layers::layer::LayerDir;
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::stat::{FileKind, Stat};

use commit::Commit;
use dirs::DirCopyUp;
use group::GroupCommit;
use stage::stage_file;
pub(crate) use stage::{CopyExtent, set_opaque, stage_dir, stage_in_twin};
use times::preserving_ctime;
pub(crate) use times::preserving_times;
pub(crate) use zero_device::prepare_dir_for;

/// The copy-up of objects.
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

    /// Copies a directory up. Returns its state and its location in the upper.
    pub(crate) fn dir_up(&self, inode: &Arc<Inode>) -> Result<(DirState, Arc<LayerDir>)> {
        self.dirs().dir_up(inode)
    }

    /// Copies up an object that is not a directory.
    pub(crate) fn file_up(&self, inode: &Arc<Inode>, extent: CopyExtent) -> Result<FileState> {
        let file = inode.file()?;
        if self.is_up(&file, extent) {
            return Ok(file);
        }
        self.cx.stack.upper()?;
        let _copying = inode.copying().lock();
        let file = inode.file()?;
        if self.is_up(&file, extent) {
            return Ok(file);
        }
        preserving_ctime(self.cx, self.inodes, inode, |fd, stat| {
            if self.cx.stack.is_in_upper(&file) {
                self.fill(inode, &file)
            } else {
                self.first_up(inode, &file, (fd, stat), extent)
            }
        })?;
        inode.file()
    }

    /// Copies up an object of any type, for a change of its attributes.
    pub(crate) fn any_up(&self, inode: &Arc<Inode>) -> Result<()> {
        if inode.is_dir() {
            if inode.dir()?.removed {
                return self.dirs().removed_dir_up(inode);
            }
            self.dir_up(inode).map(drop)
        } else {
            self.file_up(inode, CopyExtent::Metadata).map(drop)
        }
    }

    /// Whether an object, of any kind, lies in the upper.
    pub(crate) fn is_any_up(&self, inode: &Inode) -> Result<bool> {
        if inode.is_dir() {
            Ok(self.cx.stack.upper_dir(&inode.dir()?).is_some())
        } else {
            Ok(self.cx.stack.is_in_upper(&inode.file()?))
        }
    }

    fn is_up(&self, file: &FileState, extent: CopyExtent) -> bool {
        self.cx.stack.is_in_upper(file) && (extent == CopyExtent::Metadata || file.data.is_none())
    }

    /// Copies the content of a metacopy into the file that is already in the upper. Its marker is removed
    /// last: a crash before that leaves a metacopy, whose content is below and complete. Used also for a file
    /// that is about to be truncated, because a metacopy of size 0 would be incomplete, and without its
    /// marker a file of holes.
    fn fill(&self, inode: &Arc<Inode>, file: &FileState) -> Result<()> {
        // Not by the name in `file`: it may be another file's by now, whose content would be lost.
        let target = sys::content::reopen((*access_path(inode)?).as_fd(), OFlags::RDWR)?;
        let before = sys::stat::stat_fd(&target)?;
        // Writing removes a file's capabilities; only a write of a user may.
        let capability = sys::xattr::get(target.as_fd(), CAPABILITY)?;
        let data = file.data_loc().open_read()?;
        let (from, to) = (data.as_fd(), target.as_fd());
        let copied = sys::copy::copy_content(from, to, before.size, self.cx.write_back())?;
        if let Some(value) = capability {
            sys::xattr::set(target.as_fd(), CAPABILITY, &value)?;
        }
        sys::attr::utimens(
            target.as_fd(),
            SetTime::At(before.atime),
            SetTime::At(before.mtime),
        )?;
        self.cx.order()?.content_first(&target, copied)?;
        let space = self.cx.stack.upper()?.layer.space();
        // An attempt that failed between the two may have removed the first.
        remove_marker(target.as_fd(), space.metacopy())?;
        if file.redirect.is_some() {
            remove_marker(target.as_fd(), space.redirect())?;
        }
        inode.flags().set_unsynced_name();
        inode.update_content(|file| {
            file.data = None;
            file.redirect = None;
        })
    }

    /// Copies up a file that is not in the upper.
    fn first_up(
        &self,
        inode: &Arc<Inode>,
        file: &FileState,
        source: (&OwnedFd, &Stat),
        extent: CopyExtent,
    ) -> Result<()> {
        if file.orphan {
            return self.orphan_up(inode, file, source, extent);
        }
        let aliases = self.links.visible_names_with(inode, file, source.1)?;
        for alias in &aliases {
            self.dir_up(&alias.parent)?;
        }
        let made = stage_file(self.cx, inode.kind(), file, source, extent)?;
        match aliases.as_slice() {
            [] => self.orphan_up(inode, file, source, extent),
            [only] => self.commit().commit_one(inode, file, made, only),
            several => {
                let group = GroupCommit {
                    commit: self.commit(),
                    names: self.links.names,
                };
                group.commit(inode, file, made, several)
            }
        }
    }

    /// Copies up a file that is open but has no name left: its copy has none either.
    fn orphan_up(
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
        let made = stage_file(self.cx, inode.kind(), file, source, extent)?;
        self.commit().adopt_orphan(inode, file, made)
    }
}

fn remove_marker(fd: BorrowedFd<'_>, marker: &str) -> Result<()> {
    match sys::xattr::remove(fd, marker.as_bytes()) {
        Err(error) if error.errno() != Errno::NODATA => Err(error),
        _ => Ok(()),
    }
}
