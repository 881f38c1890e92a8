//! Creation of files, directories, device nodes and symbolic links.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;

use super::dirs::{refuse_marker_name, require_live_dir};
use super::upper_names::{NewObject, UpperNames};
use super::zero_device::{commit_zero_device, stage_zero_device};
use crate::content::{Content, Opened};
use crate::copy_up::{CopyUp, set_opaque, stage_in_temp_dir};
use crate::inode::{Inode, NO_CAPABILITIES, OpenOptions};
use crate::ledger::{Change, Intent};
use crate::metadata::{Attr, Attributes};
use crate::plan::UpperEntry;
use crate::reach::{Caller, Context};
use cowl_layers::error::{Errno, Result};
use cowl_layers::layer::LayerDir;
use cowl_layers::layer::zero_device::is_zero_device;
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::node::RenameMode;
use cowl_layers::sys::stat::{FileKind, Stat};

/// Creation of objects.
#[derive(Clone, Copy)]
pub(crate) struct Create<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) upper_names: UpperNames<'o>,
    pub(crate) copy_up: CopyUp<'o>,
    pub(crate) content: Content<'o>,
    pub(crate) attributes: Attributes<'o>,
}

impl Create<'_> {
    /// Creates a directory.
    pub(crate) fn mkdir(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        mode: u32,
    ) -> Result<Arc<Inode>> {
        let new = (FileKind::Directory, mode & 0o7777);
        self.make_object(caller, (parent, name), new, sys::node::mkdir)
            .map(|(inode, _)| inode)
    }

    /// Creates an empty file, a FIFO, a socket or a device.
    pub(crate) fn mknod(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        mode: u32,
        rdev: u64,
    ) -> Result<Arc<Inode>> {
        let kind = FileKind::from_mode(mode);
        if is_zero_device(kind, rdev) {
            return self.make_zero_device(caller, parent, name, mode & 0o7777);
        }
        let new = (kind, mode & 0o7777);
        self.make_object(caller, (parent, name), new, |dir, name, mode| {
            sys::node::mknod(dir, name, kind, mode, rdev)
        })
        .map(|(inode, _)| inode)
    }

    /// Creates a symbolic link.
    pub(crate) fn symlink(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        target: &[u8],
    ) -> Result<Arc<Inode>> {
        let new = (FileKind::Symlink, 0);
        self.make_object(caller, (parent, name), new, |dir, name, _| {
            sys::node::symlink(dir, name, target)
        })
        .map(|(inode, _)| inode)
    }

    /// Creates a regular file and opens it.
    pub(crate) fn create(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        mode: u32,
        options: OpenOptions,
    ) -> Result<(Arc<Inode>, Opened, Attr)> {
        // The handle uses the descriptor that created the file: O_CREAT grants access even if the mode denies it.
        let mut opened: Option<OwnedFd> = None;
        let new = (FileKind::Regular, mode & 0o7777);
        let (inode, stat) = self.make_object(caller, (parent, name), new, |dir, name, mode| {
            opened = Some(sys::node::create(dir, name, mode, OFlags::RDWR)?);
            Ok(())
        })?;
        let Some(fd) = opened else {
            // The predecessor created it.
            let attr = self.attributes.attr_as_found(&inode, stat)?;
            let opened = self.content.open(caller, &inode, options, |_| false)?;
            return Ok((inode, opened, attr));
        };
        // No other thread has access to the inode yet, so the fact cannot race with a change.
        inode
            .facts()
            .note(inode.facts().snapshot(), NO_CAPABILITIES);
        let attr = self.attributes.attr_as_found(&inode, stat)?;
        let opened = self.content.adopt(&inode, fd, options);
        Ok((inode, opened, attr))
    }

    /// Creates an object with the caller's ids. `create` gets a directory, the name in it, and the mode.
    ///
    /// Creates it directly in its directory if the name is free. Over a whiteout, stages it in the work directory
    /// and renames it over the whiteout.
    fn make_object(
        &self,
        caller: Caller,
        (parent, name): (&Arc<Inode>, &Name),
        (kind, mode): (FileKind, u32),
        mut create: impl FnMut(BorrowedFd<'_>, &[u8], u32) -> Result<()>,
    ) -> Result<(Arc<Inode>, Stat)> {
        let upper_dir = self.copy_up_dir_for(parent, name)?;
        let _names = parent.names()?.lock();
        let dir = require_live_dir(parent)?;
        let fd = upper_dir.fd()?;
        let fd = (*fd).as_fd();
        if let Some(made) = self.upper_names.resumed(parent, name)? {
            return Ok(made);
        }
        self.upper_names.require_free(&dir, &upper_dir, name)?;
        let intent = intent(parent, name);
        let created = self.cx.commit(&intent, || {
            self.cx
                .as_creator(caller, mode, |mode| create(fd, name, mode))
        });
        match created {
            Ok(()) => {}
            Err(error) if error.errno() == Errno::EXIST => {
                if self.upper_names.upper_entry(&upper_dir, name)? != UpperEntry::Whiteout {
                    return Err(error);
                }
                let staged = stage_in_temp_dir(self.cx, caller, fd, mode, |temp_dir, mode| {
                    create(temp_dir, b"new", mode)
                })?;
                let mode = if kind == FileKind::Directory {
                    set_opaque(self.cx, staged.open_path()?.as_fd())?;
                    RenameMode::Exchange
                } else {
                    RenameMode::Replace
                };
                let order = self.cx.order()?;
                self.cx
                    .commit(&intent, || staged.replace((fd, name), mode, order))?;
            }
            Err(error) => return Err(error),
        }
        parent.note_change();
        self.upper_names
            .intern_new(parent, &upper_dir, name, NewObject::AsStored)
    }

    /// Copies up the directory of a new object, unless the name exists or is reserved.
    fn copy_up_dir_for(&self, parent: &Arc<Inode>, name: &Name) -> Result<Arc<LayerDir>> {
        let upper = self.cx.stack.upper()?;
        match self.cx.stack.upper_dir(&require_live_dir(parent)?) {
            Some(upper_dir) => {
                refuse_marker_name(&upper.layer, name)?;
                Ok(upper_dir.clone())
            }
            None => {
                self.upper_names.refuse_new_name(parent, name)?;
                Ok(self.copy_up.copy_up_dir(parent)?.1)
            }
        }
    }

    /// Creates a character device 0:0, stored as a marked regular file.
    fn make_zero_device(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        mode: u32,
    ) -> Result<Arc<Inode>> {
        let upper_dir = self.copy_up_dir_for(parent, name)?;
        let _names = parent.names()?.lock();
        let dir = require_live_dir(parent)?;
        if let Some((inode, _)) = self.upper_names.resumed(parent, name)? {
            return Ok(inode);
        }
        self.upper_names.require_free(&dir, &upper_dir, name)?;
        let staged = stage_zero_device(self.cx, caller, &upper_dir, mode)?;
        self.cx.commit(&intent(parent, name), || {
            commit_zero_device(&self.upper_names, staged, &upper_dir, name)
        })?;
        parent.note_change();
        self.upper_names
            .intern_new(parent, &upper_dir, name, NewObject::ZeroDevice)
            .map(|(inode, _)| inode)
    }
}

/// Returns the intent of a creation.
pub(super) fn intent<'a>(parent: &Inode, name: &'a Name) -> Intent<'a> {
    Intent {
        change: Change::Add,
        parents: (parent.ino(), 0),
        names: (name.as_bytes(), b""),
        object: 0,
    }
}
