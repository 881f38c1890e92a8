//! The operations of the file system.

use std::sync::Arc;

use crate::change::RenameFlags;
use crate::content::{Close, FileHandle, Opened, SeekTo, Writer};
use crate::inode::{Inode, OpenOptions};
use crate::listing::{DirEntry, Listing};
use crate::metadata::{Attr, SetAttr};
use crate::overlay::Overlay;
use crate::reach::{Caller, Context, access_path, stat_on_disk};
use crate::services::Services;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::copy::SyncScope;
use cowl_layers::sys::stat::{FileKind, Stat};

/// One operation: the stack does not change while it lives.
#[derive(Debug)]
pub struct Op<'a> {
    overlay: &'a Overlay,
    cx: Context<'a>,
}

impl Overlay {
    /// Begins an operation. A thread must not begin a second one inside it.
    pub fn begin(&self) -> Op<'_> {
        Op {
            overlay: self,
            cx: Context::new(&self.stack, &self.options),
        }
    }
}

impl Op<'_> {
    pub(crate) fn services(&self) -> Services<'_> {
        Services {
            cx: &self.cx,
            overlay: self.overlay,
        }
    }

    /// Returns the objects whose cached attributes must be invalidated before this operation is answered,
    /// and forgets them.
    ///
    /// The kernel invalidates by itself what a request changes by its kind: the times and the size after a
    /// write, the change time after setxattr(2), everything of a parent directory. Listed here is the rest.
    pub fn take_stale(&self) -> Vec<Arc<Inode>> {
        self.cx.take_stale()
    }

    /// Returns the inode with this number; ESTALE if it is not known.
    pub fn inode(&self, ino: u64) -> Result<Arc<Inode>> {
        self.overlay
            .inodes
            .get(ino)
            .ok_or(Error::Errno(Errno::STALE))
    }

    /// Returns statvfs(3) of the file system that is written, else of the topmost layer's.
    pub fn statfs(&self) -> Result<rustix::fs::StatVfs> {
        let layers = self.cx.stack.view().layers();
        let layer = layers
            .first()
            .ok_or(Error::Damaged("a stack without layers"))?;
        sys::stat::statvfs(layer.root_fd())
    }

    // Names.

    /// Finds an object by its path from the root, component by component.
    pub fn lookup_path(&self, path: &[u8]) -> Result<Arc<Inode>> {
        let names = self.services().names();
        let mut inode = self.overlay.root.clone();
        for part in path.split(|&byte| byte == b'/').filter(|p| !p.is_empty()) {
            inode = names
                .lookup(&inode, &Name::new(part)?)?
                .ok_or(Error::NOT_FOUND)?;
        }
        Ok(inode)
    }

    /// Returns the object `name` in `parent`.
    pub fn lookup(&self, parent: &Arc<Inode>, name: &Name) -> Result<Option<Arc<Inode>>> {
        self.services().names().lookup(parent, name)
    }

    /// Returns the object `name` in `parent` and its attributes.
    pub fn lookup_attr(
        &self,
        parent: &Arc<Inode>,
        name: &Name,
    ) -> Result<Option<(Arc<Inode>, Attr)>> {
        self.services().attributes().lookup(parent, name)
    }

    /// Returns the listing of a directory, to be read on from `offset`. From the beginning it is read anew, so
    /// that rewinddir(3) shows new names.
    pub fn listing(&self, inode: &Arc<Inode>, offset: u64) -> Result<Arc<Listing>> {
        self.services().read_dir().listing(inode, offset)
    }

    /// Returns the number that an entry of a listing shows.
    pub fn entry_ino(&self, listing: &Listing, entry: &DirEntry) -> Result<u64> {
        self.services().read_dir().entry_ino(listing, entry)
    }

    /// Returns the target of a symbolic link.
    pub fn read_link(&self, inode: &Inode) -> Result<Vec<u8>> {
        if inode.kind() != FileKind::Symlink {
            return Err(Error::Errno(Errno::INVAL));
        }
        sys::dir::readlink_fd(&*access_path(inode)?)
    }

    /// Makes a directory.
    pub fn mkdir(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        mode: u32,
    ) -> Result<Arc<Inode>> {
        self.services().create().mkdir(caller, parent, name, mode)
    }

    /// Makes an empty file, a FIFO, a socket or a device.
    pub fn mknod(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        mode: u32,
        rdev: u64,
    ) -> Result<Arc<Inode>> {
        let create = self.services().create();
        create.mknod(caller, parent, name, mode, rdev)
    }

    /// Makes a symbolic link.
    pub fn symlink(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        target: &[u8],
    ) -> Result<Arc<Inode>> {
        let create = self.services().create();
        create.symlink(caller, parent, name, target)
    }

    /// Makes a regular file and opens it.
    pub fn create(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        mode: u32,
        how: OpenOptions,
    ) -> Result<(Arc<Inode>, Arc<FileHandle>)> {
        let (inode, opened, _) = self.create_attr(caller, parent, name, mode, how)?;
        Ok((inode, opened.handle))
    }

    /// Like [`Op::create`], with the attributes of the file.
    pub fn create_attr(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        mode: u32,
        how: OpenOptions,
    ) -> Result<(Arc<Inode>, Opened, Attr)> {
        let create = self.services().create();
        create.create(caller, parent, name, mode, how)
    }

    /// Gives a file one more name.
    pub fn link(&self, inode: &Arc<Inode>, parent: &Arc<Inode>, name: &Name) -> Result<Arc<Inode>> {
        self.services().link().link(inode, parent, name)
    }

    /// Removes a name that is not a directory.
    pub fn unlink(&self, parent: &Arc<Inode>, name: &Name) -> Result<()> {
        self.services().remove().unlink(parent, name)
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: &Arc<Inode>, name: &Name) -> Result<()> {
        self.services().remove().rmdir(parent, name)
    }

    /// Gives the object `name` in `parent` the name `new_name` in `new_parent`.
    pub fn rename(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        new_parent: &Arc<Inode>,
        new_name: &Name,
        flags: RenameFlags,
    ) -> Result<()> {
        let (from, to) = ((parent, name), (new_parent, new_name));
        self.services().rename().rename(caller, from, to, flags)
    }

    // Attributes and xattrs.

    /// Returns the attributes of an object.
    pub fn attr(&self, inode: &Arc<Inode>) -> Result<Attr> {
        self.services().attributes().attr(inode)
    }

    /// Returns an object's attributes on disk, unmodified.
    pub fn stat_on_disk(&self, inode: &Inode) -> Result<Stat> {
        stat_on_disk(inode)
    }

    /// Changes attributes. An empty change is the kernel's request to drop setuid, setgid and capabilities
    /// (FUSE_HANDLE_KILLPRIV_V2).
    pub fn set_attr(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        set: &SetAttr,
        handle: Option<&FileHandle>,
    ) -> Result<Attr> {
        let attributes = self.services().set_attributes();
        attributes.set_attr(caller, inode, set, handle)
    }

    /// Returns the value of an xattr; ENODATA if it does not exist.
    pub fn get_xattr(&self, inode: &Arc<Inode>, name: &[u8]) -> Result<Vec<u8>> {
        self.services().xattrs().get(inode, name)
    }

    /// Returns the names of all xattrs, each followed by a NUL, as listxattr(2) does.
    pub fn list_xattr(&self, caller: Caller, inode: &Arc<Inode>) -> Result<Vec<u8>> {
        self.services().xattrs().list(caller, inode)
    }

    /// Sets an xattr; `flags` as setxattr(2) takes them.
    pub fn set_xattr(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        name: &[u8],
        value: &[u8],
        flags: u32,
    ) -> Result<()> {
        let xattrs = self.services().xattrs();
        xattrs.set(caller, inode, name, value, flags)
    }

    /// Removes an xattr; ENODATA if it does not exist.
    pub fn remove_xattr(&self, inode: &Arc<Inode>, name: &[u8]) -> Result<()> {
        self.services().xattrs().remove(inode, name)
    }

    // Content.

    /// Opens a regular file.
    pub fn open(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        how: OpenOptions,
    ) -> Result<Arc<FileHandle>> {
        let opened = self.open_lazily(caller, inode, how, |_| false)?;
        Ok(opened.handle)
    }

    /// Like [`Op::open`], but the content is not opened before a request through the handle needs it if `known`
    /// says that this version of it was opened before, or if it is data of a layer that is only read.
    pub fn open_lazily(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        how: OpenOptions,
        known: impl FnOnce(u32) -> bool,
    ) -> Result<Opened> {
        self.services().content().open(caller, inode, how, known)
    }

    /// Whether an open file's content lies in the layer that is written.
    pub fn is_content_in_upper(&self, handle: &FileHandle) -> Result<bool> {
        self.services().content().is_in_upper(handle)
    }

    /// Reads into `buffer`; fewer bytes than its size only at the end of the file.
    pub fn read(&self, handle: &FileHandle, at: u64, buffer: &mut [u8]) -> Result<usize> {
        self.services().content().read(handle, at, buffer)
    }

    /// Writes `data`, on a full disk as much of it as fits, and returns the number of bytes written.
    pub fn write(&self, handle: &FileHandle, at: u64, data: &[u8], by: Writer) -> Result<usize> {
        self.services().content().write(handle, at, data, by)
    }

    /// Writes a file to the disk.
    pub fn fsync(&self, handle: &FileHandle, scope: SyncScope) -> Result<()> {
        self.services().content().fsync(handle, scope)
    }

    /// Writes the name of a new copy-up to the disk, unless that was done since.
    pub fn sync_name(&self, handle: &FileHandle) -> Result<()> {
        self.services().content().sync_name(handle)
    }

    /// Writes a directory's names to the disk.
    pub fn fsync_dir(&self, inode: &Inode) -> Result<()> {
        self.services().content().fsync_dir(inode)
    }

    /// fallocate(2), with the flags as the system call takes them.
    pub fn fallocate(&self, handle: &FileHandle, mode: u32, at: u64, len: u64) -> Result<()> {
        self.services().content().fallocate(handle, mode, at, len)
    }

    /// lseek(2) with SEEK_DATA or SEEK_HOLE; the kernel handles the other kinds itself.
    pub fn seek(&self, handle: &FileHandle, at: u64, to: SeekTo) -> Result<u64> {
        self.services().content().seek(handle, at, to)
    }

    /// Copies between two open files below the mount, without the data passing through this process.
    pub fn copy_file_range(
        &self,
        from: (&FileHandle, u64),
        to: (&FileHandle, u64),
        len: usize,
    ) -> Result<usize> {
        self.services().content().copy_file_range(from, to, len)
    }

    /// Starts write-back of a file that was truncated before, when a descriptor of it is closed.
    pub fn close_truncated(&self, handle: &FileHandle, close: Close) -> Result<()> {
        self.services().content().close_truncated(handle, close)
    }
}
