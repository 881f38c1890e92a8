//! The public operations of an overlay. They correspond to the system calls that a mount serves.

use std::sync::Arc;

use crate::change::RenameFlags;
use crate::content::{Close, FileHandle, Opened, SeekTo, Writer};
use crate::inode::{Inode, OpenOptions, Unlocated};
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

/// An operation in progress. It holds a shared lock on the stack, which therefore does not change.
#[derive(Debug)]
pub struct Op<'a> {
    overlay: &'a Overlay,
    cx: Context<'a>,
}

impl Overlay {
    /// Begins an operation by taking a shared lock on the stack.
    ///
    /// A thread must not begin a second operation before it drops the first: if another thread waits for the
    /// exclusive lock, the second shared lock deadlocks.
    pub fn begin(&self) -> Op<'_> {
        Op {
            overlay: self,
            cx: Context::new(
                &self.stack,
                &self.options,
                self.inodes.ledger().map(|ledger| &**ledger),
            ),
        }
    }
}

impl Overlay {
    /// Locates the objects of all inodes of a predecessor, each in an operation of its own.
    ///
    /// Until then, directories that the kernel has forgotten are retained for those in them.
    pub fn locate_all(&self) -> Result<()> {
        let unlocated = Unlocated::of(&self.inodes);
        for ino in unlocated.numbers() {
            match self.begin().inode(ino) {
                // The object does not exist, or the kernel has forgotten the inode.
                Err(Error::Errno(Errno::STALE)) | Ok(_) => {}
                Err(error) => return Err(error),
            }
        }
        unlocated.end_locating();
        Ok(())
    }
}

impl Op<'_> {
    /// Returns the services that implement the operations.
    pub(crate) fn services(&self) -> Services<'_> {
        Services {
            cx: &self.cx,
            overlay: self.overlay,
        }
    }

    /// Takes the list of objects whose attributes in the kernel's cache must be invalidated before the reply to this
    /// operation is sent.
    ///
    /// The kernel itself invalidates the attributes that a request of this type changes: times and size after a
    /// write, the ctime after setxattr(2), all attributes of a parent directory. The list contains the others.
    pub fn take_stale(&self) -> Vec<Arc<Inode>> {
        self.cx.take_stale()
    }

    /// Returns the inode with the node id `ino`. Fails with ESTALE if the table does not contain it.
    pub fn inode(&self, ino: u64) -> Result<Arc<Inode>> {
        let inode = match self.overlay.inodes.get(ino) {
            Some(inode) => Some(inode),
            None => self.services().names().locator().locate(ino)?,
        };
        inode.ok_or(Error::Errno(Errno::STALE))
    }

    /// Returns statvfs(3) of the topmost layer's file system, which is the upper's on a writable overlay.
    pub fn statfs(&self) -> Result<rustix::fs::StatVfs> {
        let layers = self.cx.stack.view().layers();
        let layer = layers
            .first()
            .ok_or(Error::Damaged("a stack without layers"))?;
        sys::stat::statvfs(layer.root_fd())
    }

    // Names.

    /// Looks up a path relative to the root, component by component. Does not follow symbolic links.
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

    /// Looks up `name` in `parent`; `None` if it does not exist.
    pub fn lookup(&self, parent: &Arc<Inode>, name: &Name) -> Result<Option<Arc<Inode>>> {
        self.services().names().lookup(parent, name)
    }

    /// Looks up `name` in `parent`, and returns the inode with its attributes; `None` if it does not exist.
    pub fn lookup_attr(
        &self,
        parent: &Arc<Inode>,
        name: &Name,
    ) -> Result<Option<(Arc<Inode>, Attr)>> {
        self.services().attributes().lookup(parent, name)
    }

    /// Returns a listing of a directory for a readdir request at `offset`.
    ///
    /// At offset 0 the directory is read again, so that new names are visible after rewinddir(3).
    pub fn listing(&self, inode: &Arc<Inode>, offset: u64) -> Result<Arc<Listing>> {
        self.services().read_dir().listing(inode, offset)
    }

    /// Prepares a part of the listing that a program which walks the tree will probably request next. To be called after
    /// the reply to a readdir request.
    ///
    /// Returns whether there is more to prepare.
    pub fn read_ahead(&self) -> Result<bool> {
        self.services().read_dir().read_ahead()
    }

    /// Returns the visible inode number (`d_ino`) of an entry in a listing.
    pub fn entry_ino(&self, listing: &Listing, entry: &DirEntry) -> Result<u64> {
        self.services().read_dir().entry_ino(listing, entry)
    }

    /// Returns the target of a symbolic link. Fails with EINVAL for an object of any other type.
    pub fn read_link(&self, inode: &Inode) -> Result<Vec<u8>> {
        if inode.kind() != FileKind::Symlink {
            return Err(Error::Errno(Errno::INVAL));
        }
        sys::dir::readlink_fd(&*access_path(inode)?)
    }

    /// Creates a directory.
    pub fn mkdir(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        mode: u32,
    ) -> Result<Arc<Inode>> {
        self.services().create().mkdir(caller, parent, name, mode)
    }

    /// Creates an empty file, a FIFO, a socket or a device. The type bits of `mode` select which.
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

    /// Creates a symbolic link.
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

    /// Creates a regular file and opens it.
    pub fn create(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        mode: u32,
        options: OpenOptions,
    ) -> Result<(Arc<Inode>, Arc<FileHandle>)> {
        let (inode, opened, _) = self.create_attr(caller, parent, name, mode, options)?;
        Ok((inode, opened.handle))
    }

    /// Creates a regular file, opens it, and returns its attributes as well.
    pub fn create_attr(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        mode: u32,
        options: OpenOptions,
    ) -> Result<(Arc<Inode>, Opened, Attr)> {
        let create = self.services().create();
        create.create(caller, parent, name, mode, options)
    }

    /// Creates a hard link to a file.
    pub fn link(&self, inode: &Arc<Inode>, parent: &Arc<Inode>, name: &Name) -> Result<Arc<Inode>> {
        self.services().link().link(inode, parent, name)
    }

    /// Removes the name of an object that is not a directory.
    pub fn unlink(&self, parent: &Arc<Inode>, name: &Name) -> Result<()> {
        self.services().remove().unlink(parent, name)
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: &Arc<Inode>, name: &Name) -> Result<()> {
        self.services().remove().rmdir(parent, name)
    }

    /// Renames `name` in `parent` to `new_name` in `new_parent`.
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

    /// Like [`Self::attr`], for an open file.
    ///
    /// The descriptor also provides the attributes of a file that another process has moved or removed in a live layer.
    pub fn attr_of_open(&self, inode: &Arc<Inode>, handle: &FileHandle) -> Result<Attr> {
        match self.attr(inode) {
            Err(Error::Errno(Errno::STALE)) if self.cx.options.live_layers => {
                let fd = self.services().content().descriptor(handle)?;
                self.services().attributes().attr_of_content(inode, &fd)
            }
            found => found,
        }
    }

    /// Returns the attributes of an object on disk, without the overlay's inode number, link count, times and mapped
    /// ids.
    pub fn stat_on_disk(&self, inode: &Inode) -> Result<Stat> {
        stat_on_disk(inode)
    }

    /// Changes attributes and returns the new ones.
    ///
    /// An empty `set` is the kernel's request to clear the setuid and setgid bits and file capabilities
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

    /// Returns the value of an xattr. Fails with ENODATA if it does not exist.
    pub fn get_xattr(&self, inode: &Arc<Inode>, name: &[u8]) -> Result<Vec<u8>> {
        self.services().xattrs().get(inode, name)
    }

    /// Returns the names of all xattrs that `caller` may list, each terminated by a NUL byte as in listxattr(2).
    pub fn list_xattr(&self, caller: Caller, inode: &Arc<Inode>) -> Result<Vec<u8>> {
        self.services().xattrs().list(caller, inode)
    }

    /// Sets an xattr. `flags` are those of setxattr(2).
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

    /// Removes an xattr. Fails with ENODATA if it does not exist.
    pub fn remove_xattr(&self, inode: &Arc<Inode>, name: &[u8]) -> Result<()> {
        self.services().xattrs().remove(inode, name)
    }

    // Content.

    /// Opens a regular file.
    pub fn open(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        options: OpenOptions,
    ) -> Result<Arc<FileHandle>> {
        let opened = self.open_lazily(caller, inode, options, |_| false)?;
        Ok(opened.handle)
    }

    /// Opens a regular file, and defers opening its content on disk until a request on the handle needs it, where
    /// that is possible.
    ///
    /// It is possible in an open only for reading, if the content is plain data of a read-only layer or if
    /// `is_known` returns true for the present content version, that is, if the caller opened this version before.
    pub fn open_lazily(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        options: OpenOptions,
        is_known: impl FnOnce(u32) -> bool,
    ) -> Result<Opened> {
        self.services()
            .content()
            .open(caller, inode, options, is_known)
    }

    /// Whether the content of an open file is in the upper layer.
    pub fn is_content_in_upper(&self, handle: &FileHandle) -> Result<bool> {
        self.services().content().is_in_upper(handle)
    }

    /// Reads into `buffer` and returns the number of bytes read, less than its length only at the end of the file.
    pub fn read(&self, handle: &FileHandle, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        self.services().content().read(handle, offset, buffer)
    }

    /// Writes `data` and returns the number of bytes written, less than its length only if the disk is full.
    pub fn write(
        &self,
        handle: &FileHandle,
        offset: u64,
        data: &[u8],
        by: Writer,
    ) -> Result<usize> {
        self.services().content().write(handle, offset, data, by)
    }

    /// Syncs a file to disk.
    pub fn fsync(&self, handle: &FileHandle, scope: SyncScope) -> Result<()> {
        self.services().content().fsync(handle, scope)
    }

    /// Syncs the name of a copied-up file to disk, unless a sync since the copy-up did.
    pub fn sync_name(&self, handle: &FileHandle) -> Result<()> {
        self.services().content().sync_name(handle)
    }

    /// Syncs the names in a directory to disk.
    pub fn fsync_dir(&self, inode: &Inode) -> Result<()> {
        self.services().content().fsync_dir(inode)
    }

    /// Allocates or deallocates a range of a file. `mode` has the flags of fallocate(2).
    pub fn fallocate(&self, handle: &FileHandle, mode: u32, offset: u64, len: u64) -> Result<()> {
        self.services()
            .content()
            .fallocate(handle, mode, offset, len)
    }

    /// Returns the offset of the next data or hole at or after `offset`, as lseek(2) with SEEK_DATA or SEEK_HOLE. The
    /// kernel handles the other values of `whence` itself.
    pub fn seek(&self, handle: &FileHandle, offset: u64, to: SeekTo) -> Result<u64> {
        self.services().content().seek(handle, offset, to)
    }

    /// Copies data between two open files with copy_file_range(2), without a copy through this process. `from` and
    /// `to` are handles with offsets.
    pub fn copy_file_range(
        &self,
        from: (&FileHandle, u64),
        to: (&FileHandle, u64),
        len: usize,
    ) -> Result<usize> {
        self.services().content().copy_file_range(from, to, len)
    }

    /// Starts writeback of a file that was truncated since its last close; called when a descriptor is closed.
    pub fn close_truncated(&self, handle: &FileHandle, close: Close) -> Result<()> {
        self.services().content().close_truncated(handle, close)
    }
}
