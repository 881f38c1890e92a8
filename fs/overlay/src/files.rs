//! Open files.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};

use super::copy_up::CAPABILITY;
use super::stage::CopyUp;
use super::{Caller, Op, Overlay};
use crate::inode::Inode;
use crate::reach;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::sys;
use cowl_layers::sys::stat::FileKind;

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenHow {
    /// For writing.
    pub write: bool,
    /// Cut to nothing.
    pub truncate: bool,
    /// To run it: the kernel lets nobody write to it while this is open.
    pub exec: bool,
    /// Reading moves no access time.
    pub keep_atime: bool,
}

impl OpenHow {
    fn flags(self) -> OFlags {
        let access = if self.write || self.truncate {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        access
            | if self.keep_atime {
                OFlags::NOATIME
            } else {
                OFlags::empty()
            }
    }
}

/// Who is behind a write, which decides what it takes from the file beside its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// A system call of one who may keep setuid and setgid; capabilities go.
    Privileged,
    /// A system call of anybody else: setuid, setgid and capabilities go.
    Unprivileged(Caller),
    /// The kernel, with what was stored through a mapping: on a plain folder nothing goes.
    Mapping,
}

/// An open file. A descriptor that was opened before the file was copied up follows it.
#[derive(Debug)]
pub struct FileHandle {
    inode: Arc<Inode>,
    how: OpenHow,
    /// Opened when a request first needs it, and which content it is.
    open: Mutex<Option<(Arc<OwnedFd>, u32)>>,
    /// For how many pushed layers it is known that its content lies in the upper.
    pushes: AtomicU32,
}

impl FileHandle {
    /// The file.
    pub fn inode(&self) -> &Arc<Inode> {
        &self.inode
    }

    /// Whether it can be written through.
    pub fn writes(&self) -> bool {
        self.how.write
    }

    /// How it was opened.
    pub fn how(&self) -> OpenHow {
        self.how
    }

    /// The content, where it is open, and which it is.
    pub fn opened(&self) -> Option<(Arc<OwnedFd>, u32)> {
        self.open.lock().clone()
    }
}

impl Overlay {
    /// Told when a file is closed.
    pub fn close(&self, handle: &FileHandle) {
        let counter = if handle.how.write {
            &self.writers
        } else {
            &self.readers
        };
        counter.fetch_sub(1, Ordering::AcqRel);
        handle.inode.closed(handle.how.write, handle.how.exec);
    }
}

impl Op<'_> {
    /// Opens a regular file.
    pub fn open(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        how: OpenHow,
    ) -> Result<Arc<FileHandle>> {
        self.open_unless(caller, inode, how, |_| false)
    }

    /// The same, but for what only a request through the handle needs: where `known` says that this content
    /// was opened before, or where it is nothing but data of a layer that is only read, it is not opened until
    /// then.
    pub fn open_unless(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        how: OpenHow,
        known: impl FnOnce(u32) -> bool,
    ) -> Result<Arc<FileHandle>> {
        if inode.kind() != FileKind::Regular {
            let errno = if inode.is_dir() {
                Errno::ISDIR
            } else {
                // The kernel opens fifos, sockets and devices itself.
                Errno::NXIO
            };
            return Err(Error::Errno(errno));
        }
        if how.truncate && !how.write && inode.is_run() {
            // For an open that writes the kernel has checked this itself; one that only cuts it
            // checks after the open, and with FUSE_ATOMIC_O_TRUNC the open has cut the file by then.
            return Err(Error::Errno(Errno::TXTBSY));
        }
        if how.write || how.truncate {
            let copy = if how.truncate {
                CopyUp::Truncate
            } else {
                CopyUp::Data
            };
            self.file_up(inode, copy)?;
        }
        // Before the content is opened: when it moves meanwhile, the handle opens it anew.
        let turn = inode.data_turn();
        if !how.write && !how.truncate && (known(turn) || inode.is_plain()) {
            return Ok(self.handle(inode, None, how));
        }
        let fd = reach::open_content(inode, how.flags())?;
        if how.truncate {
            inode.changed();
            self.cut(caller, inode, &fd, 0)?;
        }
        Ok(self.handle(inode, Some((fd, turn)), how))
    }

    /// Notes that a file was truncated to `size`: its new content is written back early.
    pub(super) fn note_cut(&self, inode: &Inode, size: u64) -> Result<()> {
        if self.cx.early()?.after_cut(size) {
            inode.set_rewritten(true);
        }
        Ok(())
    }

    /// Starts write-back of a file that was truncated before, when a descriptor of it is closed: early, so that
    /// the next commit of the journal seldom finds it empty. `last`: no descriptor of this open is left.
    pub fn close_rewritten(&self, handle: &FileHandle, last: bool) -> Result<()> {
        let inode = &handle.inode;
        if !handle.how.write || !inode.is_rewritten() {
            return Ok(());
        }
        if last {
            inode.set_rewritten(false);
        }
        let file = inode.file()?;
        if self.cx.stack.in_upper(&file) && file.data.is_none() {
            sys::early::start(&*self.content(handle)?);
        }
        Ok(())
    }

    pub(super) fn handle(
        &self,
        inode: &Arc<Inode>,
        opened: Option<(OwnedFd, u32)>,
        how: OpenHow,
    ) -> Arc<FileHandle> {
        let counter = if how.write {
            &self.overlay.writers
        } else {
            &self.overlay.readers
        };
        counter.fetch_add(1, Ordering::AcqRel);
        inode.opened(how.write, how.exec);
        Arc::new(FileHandle {
            inode: inode.clone(),
            how,
            open: Mutex::new(opened.map(|(fd, turn)| (Arc::new(fd), turn))),
            pushes: AtomicU32::new(self.overlay.pushes.load(Ordering::Acquire)),
        })
    }

    /// The descriptor behind a handle, opened anew when the content has moved since.
    pub(super) fn content(&self, handle: &FileHandle) -> Result<Arc<OwnedFd>> {
        let mut open = handle.open.lock();
        let turn = handle.inode.data_turn();
        if let Some((fd, of)) = &*open
            && *of == turn
        {
            return Ok(fd.clone());
        }
        let fd = Arc::new(reach::open_content(&handle.inode, handle.how.flags())?);
        *open = Some((fd.clone(), turn));
        Ok(fd)
    }

    /// The same for a change of the content. A descriptor that was opened for writing before a snapshot was
    /// taken leads to a layer that is frozen now: its file is brought up first, as for an open.
    pub(super) fn content_to_write(&self, handle: &FileHandle) -> Result<Arc<OwnedFd>> {
        // It changes under the stack's lock alone, which this operation shares.
        let pushes = self.overlay.pushes.load(Ordering::Acquire);
        if handle.pushes.load(Ordering::Acquire) != pushes {
            self.file_up(&handle.inode, CopyUp::Data)?;
            handle.pushes.store(pushes, Ordering::Release);
        }
        self.content(handle)
    }

    /// Reads into `buffer`; fewer bytes than asked for only at the end of the file.
    pub fn read(&self, handle: &FileHandle, at: u64, buffer: &mut [u8]) -> Result<usize> {
        let fd = self.content(handle)?;
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let got =
                rustix::io::retry_on_intr(|| rustix::io::pread(&fd, &mut *rest, at + done as u64))?;
            if got == 0 {
                break;
            }
            done += got;
        }
        Ok(done)
    }

    /// Writes `data`, on a full disk as much of it as there is room for, and returns how much that was.
    pub fn write(&self, handle: &FileHandle, at: u64, data: &[u8], by: Writer) -> Result<usize> {
        if !handle.how.write {
            return Err(Error::Errno(Errno::BADF));
        }
        self.cx.stack.upper()?;
        let fd = self.content_to_write(handle)?;
        let write = || sys::copy::write_some(&*fd, data, at);
        let done = match by {
            Writer::Privileged => write()?,
            Writer::Unprivileged(caller) => self.unprivileged(caller, &handle.inode, &fd, write)?,
            Writer::Mapping => {
                let kept = sys::xattr::get(fd.as_fd(), CAPABILITY)?;
                // The kernel heeds no answer that is shorter, and what does not fit would be lost.
                sys::copy::write_all(&*fd, data, at)?;
                if let Some(value) = kept {
                    sys::xattr::set(fd.as_fd(), CAPABILITY, &value)?;
                }
                data.len()
            }
        };
        handle.inode.changed();
        Ok(done)
    }

    /// Writes a file to the disk. A lower one too: it may have been written in this mount or an earlier one,
    /// before a snapshot was taken.
    pub fn fsync(&self, handle: &FileHandle, data_only: bool) -> Result<()> {
        if self.cx.behaviour.volatile {
            return Ok(());
        }
        let file = handle.inode.file()?;
        let fd = match &file.data {
            // Its content lies below, untouched; what may have changed is its attributes.
            Some(_) => Arc::new(sys::content::reopen(
                (*reach::access_path(&handle.inode)?).as_fd(),
                OFlags::RDONLY,
            )?),
            None => self.content(handle)?,
        };
        // fdatasync(2) brings neither a copy-up's rename to the disk (ext4: only what moved its content or
        // its size counts), and without that the name leads to the old content.
        let named = handle.inode.has_unsynced_name();
        match sys::copy::sync(&*fd, data_only && !named) {
            // A file system that is never written knows no fsync.
            Err(error) if error.errno() == Errno::INVAL && !self.cx.stack.in_upper(&file) => {
                return Ok(());
            }
            other => other?,
        }
        if named && self.cx.stack.in_upper(&file) {
            handle.inode.synced();
        }
        Ok(())
    }

    /// Writes the name of a fresh copy-up to the disk, unless that was done since.
    pub fn sync_name(&self, handle: &FileHandle) -> Result<()> {
        if handle.inode.has_unsynced_name() {
            self.fsync(handle, false)?;
        }
        Ok(())
    }

    /// Writes a folder's names to the disk.
    pub fn fsync_dir(&self, inode: &Inode) -> Result<()> {
        let dir = inode.dir()?;
        if self.cx.behaviour.volatile || dir.removed {
            return Ok(());
        }
        for loc in dir.locs.iter() {
            match sys::dir::sync_dir((*loc.fd()?).as_fd()) {
                Err(error)
                    if error.errno() == Errno::INVAL && !self.cx.stack.is_upper(loc.layer()) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// fallocate(2), with the flags as the system call takes them.
    pub fn fallocate(&self, handle: &FileHandle, mode: u32, at: u64, len: u64) -> Result<()> {
        if !handle.how.write {
            return Err(Error::Errno(Errno::BADF));
        }
        self.cx.stack.upper()?;
        let fd = self.content_to_write(handle)?;
        let mode = FallocateFlags::from_bits_retain(mode);
        rustix::fs::fallocate(&fd, mode, at, len)?;
        handle.inode.changed();
        Ok(())
    }

    /// SEEK_DATA and SEEK_HOLE; the kernel does the other kinds itself.
    pub fn seek(&self, handle: &FileHandle, at: u64, hole: bool) -> Result<u64> {
        let fd = self.content(handle)?;
        let from = if hole {
            SeekFrom::Hole(at)
        } else {
            SeekFrom::Data(at)
        };
        Ok(rustix::fs::seek(&fd, from)?)
    }

    /// Copies between two open files below the mount, without the data passing through here; blocks
    /// are shared where the file system can.
    pub fn copy_file_range(
        &self,
        from: (&FileHandle, u64),
        to: (&FileHandle, u64),
        len: usize,
    ) -> Result<usize> {
        self.cx.stack.upper()?;
        // The target first: the source may be the same file.
        let target = self.content_to_write(to.0)?;
        let source = self.content(from.0)?;
        let atime = sys::stat::stat_fd(&*source)?.atime;
        let (mut at, mut to_at) = (from.1, to.1);
        let copied = rustix::io::retry_on_intr(|| {
            rustix::fs::copy_file_range(&source, Some(&mut at), &target, Some(&mut to_at), len)
        })?;
        to.0.inode.changed();
        // The kernel takes FUSE inodes for ones without access times and invalidates nothing of the source.
        if sys::stat::stat_fd(&*source)?.atime != atime {
            self.cx.note_stale(&from.0.inode);
        }
        Ok(copied)
    }
}
