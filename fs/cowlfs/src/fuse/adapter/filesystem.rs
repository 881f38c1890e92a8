//! The handlers: one for each kind of request. A handler makes one call of the overlay and sends one reply.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileHandle as Fh, Filesystem, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::admission::admit_mode;
use super::attributes::Accepted;
use super::convert::{
    device_from_protocol, implied_sync, parse_name, to_errno, to_open_options, to_rename_flags,
    to_set_time, writer,
};
use super::reply::{reply_empty, reply_statfs, reply_xattr, with_attr};
use super::{Adapter, Negotiated};
use crate::requests::Opcode;
use cowl_layers::error::{Errno, Error};
use cowl_layers::sys::copy::SyncScope;
use cowl_overlay::unopened::set_opens_unknown;
use cowl_overlay::{OpenOptions, SeekTo, SetAttr};

/// The maximum size of a read or a write: 256 pages in one request.
const MAX_WRITE: u32 = 1 << 20;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let offered = config.capabilities();
        self.opens = self.begin.decide(self.backing.policy(), offered);
        if self.has_no_open_requests() {
            set_opens_unknown(&self.overlay);
        }
        let mut requested = InitFlags::empty();
        for flag in [
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            if self.live_layers {
                InitFlags::FUSE_AUTO_INVAL_DATA
            } else {
                InitFlags::FUSE_CACHE_SYMLINKS
            },
            self.opens.capability(),
            InitFlags::FUSE_DONT_MASK,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_POSIX_ACL,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
            InitFlags::FUSE_NO_EXPORT_SUPPORT,
            if self.backing.policy().allows_any() {
                InitFlags::FUSE_PASSTHROUGH
            } else {
                InitFlags::empty()
            },
        ] {
            match config.add_capabilities(flag) {
                Ok(()) => requested |= flag,
                Err(missing) => log::info!("the kernel lacks {missing:?}"),
            }
        }
        let capabilities = config.capabilities();
        let minor = config.kernel_abi().1;
        self.negotiated
            .get_or_init(|| Negotiated::new(minor, capabilities, requested));
        self.cache_listings &= capabilities.contains(InitFlags::FUSE_NO_OPENDIR_SUPPORT);
        for result in [
            config.set_max_write(MAX_WRITE).map(drop),
            config.set_max_background(64).map(|_| ()).map_err(u32::from),
            if self.backing.policy().allows_any() {
                config.set_max_stack_depth(self.max_stack_depth).map(drop)
            } else {
                Ok(())
            },
        ] {
            if let Err(limit) = result {
                log::info!("the kernel limits a setting of the session to {limit}");
            }
        }
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, out: ReplyEntry) {
        let _span = self.begin_request(Opcode::Lookup, req);
        self.reply_lookup(parent, name, out);
    }

    fn forget(&self, _: &Request, ino: INodeNo, count: u64) {
        // One request can carry many of them, so none has a span of its own. But one can take long: it may close the
        // last reference to a removed file, whose blocks are then freed.
        let _occupied = self.pool.occupy();
        // A FORGET has no reply, and is not sent again to another process: what waits here then is lost, and the other
        // process knows the inode for longer than necessary.
        let _passage = self.gate.pass();
        self.requests.count(Opcode::Forget);
        if self.has_no_open_requests() {
            self.rewrites.note_forget(ino.0);
        }
        self.overlay.forget(ino.0, count);
        let inodes = self.overlay.inodes();
        self.backing
            .forget(ino.0, self.ledger(), || inodes.is_forgotten(ino.0));
    }

    fn getattr(&self, req: &Request, ino: INodeNo, fh: Option<Fh>, reply: ReplyAttr) {
        let _span = self.begin_request(Opcode::Getattr, req);
        let done = self.run("getattr", ino, None, |op| {
            let inode = op.inode(ino.0)?;
            // Only an object of a live layer can lack a location.
            let fh = fh.filter(|_| self.live_layers);
            let attr = match fh.and_then(|fh| self.files.get(fh.0).ok()) {
                Some(handle) => op.attr_of_open(&inode, &handle)?,
                None => op.attr(&inode)?,
            };
            Ok((inode, attr))
        });
        self.reply_attr(ino, done, Accepted::IfCurrent, reply);
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        fh: Option<Fh>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let _span = self.begin_request(Opcode::Setattr, req);
        let set = SetAttr {
            mode,
            uid,
            gid,
            size,
            atime: to_set_time(atime),
            mtime: to_set_time(mtime),
        };
        let done = self.run("setattr", ino, None, |op| {
            let inode = op.inode(ino.0)?;
            let handle = match fh {
                _ if self.has_no_open_requests() => self.file_to_cut(op, &inode, size)?,
                Some(fh) => Some(self.files.get(fh.0)?),
                None => None,
            };
            admit_mode(&inode, mode)?;
            let found = op.set_attr(self.caller(req, 0), &inode, &set, handle.as_deref())?;
            Ok((inode, found))
        });
        self.reply_attr(ino, done, Accepted::Always, reply);
    }

    fn readlink(&self, req: &Request, ino: INodeNo, reply: ReplyData) {
        let _span = self.begin_request(Opcode::Readlink, req);
        match self.run("readlink", ino, None, |op| op.read_link(&*op.inode(ino.0)?)) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(to_errno(error)),
        }
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let _span = self.begin_change(Opcode::Mknod, req);
        let rdev = device_from_protocol(rdev);
        let done = self.run("mknod", parent, Some(name), |op| {
            let parent = op.inode(parent.0)?;
            let inode = op.mknod(
                self.caller(req, umask),
                &parent,
                &parse_name(name)?,
                mode,
                rdev,
            )?;
            with_attr(op, inode)
        });
        self.reply_entry(done, Accepted::Always, reply);
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let _span = self.begin_change(Opcode::Mkdir, req);
        let done = self.run("mkdir", parent, Some(name), |op| {
            let parent = op.inode(parent.0)?;
            let inode = op.mkdir(self.caller(req, umask), &parent, &parse_name(name)?, mode)?;
            with_attr(op, inode)
        });
        self.reply_entry(done, Accepted::Always, reply);
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let _span = self.begin_change(Opcode::Symlink, req);
        let done = self.run("symlink", parent, Some(name), |op| {
            let parent = op.inode(parent.0)?;
            let target = target.as_os_str().as_bytes();
            let inode = op.symlink(self.caller(req, 0), &parent, &parse_name(name)?, target)?;
            with_attr(op, inode)
        });
        self.reply_entry(done, Accepted::Always, reply);
    }

    fn link(&self, req: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _span = self.begin_change(Opcode::Link, req);
        let done = self.run("link", ino, Some(name), |op| {
            let inode = op.link(&op.inode(ino.0)?, &op.inode(parent.0)?, &parse_name(name)?)?;
            with_attr(op, inode)
        });
        self.reply_entry(done, Accepted::Always, reply);
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _span = self.begin_change(Opcode::Unlink, req);
        let done = self.run("unlink", parent, Some(name), |op| {
            let parent = op.inode(parent.0)?;
            op.unlink(&parent, &parse_name(name)?)
                .inspect(|()| parent.note_removal())
        });
        reply_empty(done, reply);
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _span = self.begin_change(Opcode::Rmdir, req);
        let done = self.run("rmdir", parent, Some(name), |op| {
            let parent = op.inode(parent.0)?;
            op.rmdir(&parent, &parse_name(name)?)
                .inspect(|()| parent.note_removal())
        });
        reply_empty(done, reply);
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let _span = self.begin_change(Opcode::Rename, req);
        let done = self.run("rename", parent, Some(name), |op| {
            let (from, to) = (op.inode(parent.0)?, op.inode(new_parent.0)?);
            let (name, new_name) = (parse_name(name)?, parse_name(new_name)?);
            let flags = to_rename_flags(flags)?;
            op.rename(self.caller(req, 0), &from, &name, &to, &new_name, flags)?;
            self.after_rename(op, (&from, &name), (&to, &new_name), flags);
            Ok(())
        });
        reply_empty(done, reply);
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let _span = self.begin_change(Opcode::Open, req);
        self.open_file(req, ino, flags, reply);
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let _span = self.begin_change(Opcode::Create, req);
        let flags = OpenFlags(flags);
        self.create_file(req, (parent, name), (mode, umask), flags, reply);
    }

    fn read(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: Fh,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _span = self.begin_request(Opcode::Read, req);
        BUFFER.with_borrow_mut(|buffer| {
            let size = size as usize;
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            let buffer = buffer.get_mut(..size).unwrap_or_default();
            let done = self.run("read", ino, None, |op| {
                let options = OpenOptions {
                    keep_atime: to_open_options(flags).0.keep_atime,
                    ..OpenOptions::READ
                };
                op.read(&*self.file(op, (ino, fh), options)?, offset, buffer)
            });
            match done {
                Ok(got) => reply.data(buffer.get(..got).unwrap_or_default()),
                Err(error) => reply.error(to_errno(error)),
            }
        });
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: Fh,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _span = self.begin_request(Opcode::Write, req);
        let writer = writer(self.caller(req, 0), write_flags);
        let done = self.run("write", ino, None, |op| {
            let handle = self.file(op, (ino, fh), OpenOptions::WRITE)?;
            let written = op.write(&handle, offset, data, writer)?;
            if self.backing.policy().small_by_daemon {
                self.new_files.count_write(fh.0);
            }
            self.note_rewrite(op, ino, &handle);
            if let Some(scope) = implied_sync(flags, owner) {
                op.fsync(&handle, scope)?;
            }
            Ok(written)
        });
        match done {
            // A request carries at most MAX_WRITE bytes.
            Ok(done) => reply.written(u32::try_from(done).unwrap_or(MAX_WRITE)),
            Err(error) => reply.error(to_errno(error)),
        }
    }

    fn flush(&self, req: &Request, ino: INodeNo, fh: Fh, _: LockOwner, reply: ReplyEmpty) {
        let _span = self.begin_request(Opcode::Flush, req);
        if self.has_no_open_requests() {
            return reply.error(fuser::Errno::ENOSYS);
        }
        self.flush_file(ino, fh);
        reply.ok();
    }

    fn release(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: Fh,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let _span = self.begin_request(Opcode::Release, req);
        self.release_file(ino, fh);
        reply.ok();
    }

    fn fsync(&self, req: &Request, ino: INodeNo, fh: Fh, datasync: bool, reply: ReplyEmpty) {
        let _span = self.begin_request(Opcode::Fsync, req);
        let scope = if datasync {
            SyncScope::Data
        } else {
            SyncScope::All
        };
        let done = self.run("fsync", ino, None, |op| {
            op.fsync(&*self.file(op, (ino, fh), OpenOptions::READ)?, scope)
        });
        reply_empty(done, reply);
    }

    fn opendir(&self, req: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let _span = self.begin_request(Opcode::Opendir, req);
        self.open_dir(reply);
    }

    fn readdir(&self, req: &Request, ino: INodeNo, _: Fh, offset: u64, out: ReplyDirectory) {
        let _span = self.begin_listing(Opcode::Readdir, req);
        self.list(ino, offset, out);
    }

    fn readdirplus(
        &self,
        req: &Request,
        ino: INodeNo,
        _: Fh,
        offset: u64,
        out: ReplyDirectoryPlus,
    ) {
        let _span = self.begin_listing(Opcode::Readdirplus, req);
        self.list_plus(ino, offset, out);
    }

    fn releasedir(&self, req: &Request, _: INodeNo, _: Fh, _: OpenFlags, reply: ReplyEmpty) {
        let _span = self.begin_request(Opcode::Releasedir, req);
        reply.ok();
    }

    fn fsyncdir(&self, req: &Request, ino: INodeNo, _: Fh, _: bool, reply: ReplyEmpty) {
        let _span = self.begin_request(Opcode::Fsyncdir, req);
        let done = self.run("fsyncdir", ino, None, |op| op.fsync_dir(&*op.inode(ino.0)?));
        reply_empty(done, reply);
    }

    fn statfs(&self, req: &Request, ino: INodeNo, out: ReplyStatfs) {
        let _span = self.begin_request(Opcode::Statfs, req);
        reply_statfs(self.run("statfs", ino, None, |op| op.statfs()), out);
    }

    fn setxattr(
        &self,
        req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        let _span = self.begin_change(Opcode::Setxattr, req);
        let done = self.run("setxattr", ino, Some(name), |op| {
            let inode = op.inode(ino.0)?;
            let flags = flags.cast_unsigned();
            op.set_xattr(self.caller(req, 0), &inode, name.as_bytes(), value, flags)
        });
        reply_empty(done, reply);
    }

    fn getxattr(&self, req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let _span = self.begin_request(Opcode::Getxattr, req);
        let done = self.run("getxattr", ino, Some(name), |op| {
            op.get_xattr(&op.inode(ino.0)?, name.as_bytes())
        });
        reply_xattr(done, size, reply);
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let _span = self.begin_request(Opcode::Listxattr, req);
        let done = self.run("listxattr", ino, None, |op| {
            op.list_xattr(self.caller(req, 0), &op.inode(ino.0)?)
        });
        reply_xattr(done, size, reply);
    }

    fn removexattr(&self, req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _span = self.begin_change(Opcode::Removexattr, req);
        let done = self.run("removexattr", ino, Some(name), |op| {
            op.remove_xattr(&op.inode(ino.0)?, name.as_bytes())
        });
        reply_empty(done, reply);
    }

    fn ioctl(
        &self,
        req: &Request,
        _: INodeNo,
        _: Fh,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        out: ReplyIoctl,
    ) {
        let _span = self.begin_request(Opcode::Ioctl, req);
        // As a plain file answers the ioctls of terminals. The ioctls for file attributes (chattr) must get it, too: a
        // kernel overlayfs on this mount takes only ENOTTY as "not supported", and otherwise its copy-ups fail.
        out.error(fuser::Errno::ENOTTY);
    }

    fn fallocate(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: Fh,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let _span = self.begin_request(Opcode::Fallocate, req);
        let done = self.run("fallocate", ino, None, |op| {
            let file = self.file(op, (ino, fh), OpenOptions::WRITE)?;
            op.fallocate(&file, mode.cast_unsigned(), offset, length)?;
            self.note_rewrite(op, ino, &file);
            Ok(())
        });
        reply_empty(done, reply);
    }

    fn lseek(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: Fh,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let _span = self.begin_request(Opcode::Lseek, req);
        let done = self.run("lseek", ino, None, |op| {
            let offset = u64::try_from(offset).map_err(|_| Error::Errno(Errno::NXIO))?;
            let file = self.file(op, (ino, fh), OpenOptions::READ)?;
            match whence {
                libc::SEEK_DATA => op.seek(&file, offset, SeekTo::Data),
                libc::SEEK_HOLE => op.seek(&file, offset, SeekTo::Hole),
                _ => Err(Error::Errno(Errno::INVAL)),
            }
        });
        match done {
            Ok(offset) => reply.offset(offset.cast_signed()),
            Err(error) => reply.error(to_errno(error)),
        }
    }

    fn copy_file_range(
        &self,
        req: &Request,
        ino: INodeNo,
        fh_in: Fh,
        offset_in: u64,
        ino_out: INodeNo,
        fh_out: Fh,
        offset_out: u64,
        len: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let _span = self.begin_request(Opcode::CopyFileRange, req);
        let done = self.run("copy_file_range", ino, None, |op| {
            let from = self.file(op, (ino, fh_in), OpenOptions::READ)?;
            let to = self.file(op, (ino_out, fh_out), OpenOptions::WRITE)?;
            // The reply has 32 bits. The kernel has the same limit: INT_MAX, rounded down to a page.
            let len = usize::try_from(len).unwrap_or(usize::MAX).min(0x7fff_f000);
            let copied = op.copy_file_range((&from, offset_in), (&to, offset_out), len)?;
            self.note_rewrite(op, ino_out, &to);
            Ok(copied)
        });
        match done {
            Ok(copied) => reply.written(u32::try_from(copied).unwrap_or(u32::MAX)),
            Err(error) => reply.error(to_errno(error)),
        }
    }
}
