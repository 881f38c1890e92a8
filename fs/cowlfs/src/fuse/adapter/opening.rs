//! The requests that open and close files.

use std::os::fd::AsFd;
use std::sync::Arc;

use fuser::{
    BackingId, FileHandle as Fh, FopenFlags, INodeNo, OpenFlags, ReplyCreate, ReplyOpen, Request,
};

use super::convert::{attr, caller, errno, how, maps, name_of, syncs};
use super::{Adapter, GENERATION};
use crate::fuse::passthrough::{Answer, Asked, Cached, Opening, Register};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::sys;
use cowl_overlay::inode::Inode;
use cowl_overlay::{Attr, Close, FileHandle, Op, OpenOptions, SETID};

/// What the kernel asks to be opened.
#[derive(Clone, Copy)]
struct Wanted {
    ino: INodeNo,
    flags: OpenFlags,
    /// With O_DIRECT.
    direct: bool,
    /// Its backing file is known.
    kept: bool,
}

/// An open that counts.
struct Opened {
    handle: Arc<FileHandle>,
    flags: FopenFlags,
    backing: Option<Arc<BackingId>>,
}

impl Adapter {
    pub(super) fn open_file(
        &self,
        req: &Request,
        ino: INodeNo,
        flags: OpenFlags,
        reply: ReplyOpen,
    ) {
        let (how, direct) = how(flags);
        let done = self.run("open", ino, None, |op| {
            let inode = op.inode(ino.0)?;
            // Whoever has it open under its old number keeps what it had; nobody else comes by that.
            if self.overlay.inodes().node_id(&inode) != ino.0 {
                return Err(Error::Errno(Errno::STALE));
            }
            let mut kept = false;
            let known = |turn| {
                kept = self.passing.is_kept(ino.0, turn);
                kept
            };
            if how.truncate && inode.is_executing() {
                // Before the content is cut, because a refused open changes nothing.
                self.refused.admit(op, &inode, how, req.pid())?;
            }
            let handle = op.open_lazily(caller(req, 0), &inode, how, known)?;
            let close = |_: &Error| self.overlay.close(&handle);
            let admitted = self.refused.admit(op, &inode, how, req.pid());
            admitted.inspect_err(close)?;
            let register: Register<'_> = &|fd| reply.open_backing(fd);
            let wanted = Wanted {
                ino,
                flags,
                direct,
                kept,
            };
            self.count_open(op, wanted, &inode, handle, register)
        });
        match done {
            Ok(opened) => {
                let fh = Fh(self.files.insert(opened.handle));
                match opened.backing {
                    Some(backing) => reply.opened_passthrough(fh, opened.flags, &backing),
                    None => reply.opened(fh, opened.flags),
                }
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    pub(super) fn create_file(
        &self,
        req: &Request,
        (parent, name): (INodeNo, &std::ffi::OsStr),
        (mode, umask): (u32, u32),
        flags: OpenFlags,
        reply: ReplyCreate,
    ) {
        let (how, direct) = how(flags);
        let done = self.run("create", parent, Some(name), |op| {
            let who = caller(req, umask);
            let parent = op.inode(parent.0)?;
            let (inode, handle, found) =
                op.create_attr(who, &parent, &name_of(name)?, mode, how)?;
            let register: Register<'_> = &|fd| reply.open_backing(fd);
            let wanted = Wanted {
                ino: INodeNo(inode.ino()),
                flags,
                direct,
                kept: false,
            };
            let opened = self.count_open(op, wanted, &inode, handle, register)?;
            Ok((inode, opened, found))
        });
        match done {
            Ok((inode, opened, found)) => {
                self.created(&inode, opened, &found, reply);
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    fn created(&self, inode: &Arc<Inode>, opened: Opened, found: &Attr, reply: ReplyCreate) {
        let fh = Fh(self.files.insert(opened.handle));
        self.overlay.inodes().count_lookup(inode);
        let keep = &self.keep_created(inode, found);
        let found = attr(found);
        match opened.backing {
            Some(id) => reply.created_passthrough(keep, &found, GENERATION, fh, opened.flags, &id),
            None => reply.created(keep, &found, GENERATION, fh, opened.flags),
        }
    }

    /// Decides how an open file is read and written.
    fn count_open(
        &self,
        op: &Op<'_>,
        wanted: Wanted,
        inode: &Arc<Inode>,
        handle: Arc<FileHandle>,
        register: Register<'_>,
    ) -> Result<Opened> {
        let Wanted { ino, flags, .. } = wanted;
        let close = |_: &Error| self.overlay.close(&handle);
        let asked = self.asked(op, &handle, wanted).inspect_err(close)?;
        let content = handle.open_descriptor();
        let synced = asked.write && syncs(flags);
        let answer = self.passing.open(
            &Opening {
                ino: ino.0,
                asked,
                maps: maps(flags),
                inode,
                // What is in the upper has its content beside its attributes.
                dev: asked.upper.then(|| inode.identity().dev),
                content: content.as_ref().map(|(fd, turn)| (fd.as_fd(), *turn)),
            },
            register,
        );
        let (mut flags, backing) = match answer {
            Answer::Served(flags) => (flags, None),
            Answer::Passed(flags, id, cached) => {
                if cached == Cached::Unsure || asked.write && may_have_setid(&handle) {
                    self.invalidate_attr(ino.0);
                }
                (flags, Some(id))
            }
            Answer::Renew => {
                self.overlay.close(&handle);
                self.renew(inode, ino);
                return Err(Error::Errno(Errno::STALE));
            }
        };
        if asked.write && inode.flags().is_truncated() && inode.flags().has_unsynced_name() {
            // It replaces a lower file's content: its close starts write-back, before it returns. What was in the
            // upper layer before is left to the file system below, and to RELEASE.
            flags.remove(FopenFlags::FOPEN_NOFLUSH);
        }
        if backing.is_some() && synced {
            // The kernel syncs each write to the file below, and by that not the name of a fresh copy.
            op.sync_name(&handle).inspect_err(|_| {
                self.passing.release(ino.0);
                self.overlay.close(&handle);
            })?;
        }
        Ok(Opened {
            handle,
            flags,
            backing,
        })
    }

    /// What the decision depends on, as far as it does.
    fn asked(&self, op: &Op<'_>, handle: &FileHandle, wanted: Wanted) -> Result<Asked> {
        let policy = self.passing.policy();
        let OpenOptions { write, .. } = handle.options();
        let mut asked = Asked {
            upper: false,
            write,
            program: false,
            privileged: false,
            direct: wanted.direct,
        };
        let inode = handle.inode();
        let before = inode.facts().snapshot();
        asked.upper = op.is_content_in_upper(handle)?;
        if let Some((fd, _)) = handle.open_descriptor() {
            let passes = policy.upper && asked.upper;
            // Of what lies in the upper nothing depends on it, and to look at the content moves its access time.
            asked.program = !write && !asked.upper && policy.programs && handle.is_program(&fd)?;
            asked.privileged = write && passes && handle.is_privileged(&fd)?;
            if !write && !asked.upper && !asked.program && !policy.lowers {
                inode.facts().note_plain_data(before);
            }
        } else {
            // It was found to be one that is passed through, or nothing but data.
            asked.program = wanted.kept;
        }
        Ok(asked)
    }

    pub(super) fn release_file(&self, ino: INodeNo, fh: Fh) {
        self.passing.release(ino.0);
        if let Some(handle) = self.files.remove(fh.0) {
            self.start_write_back("release", ino, &handle, Close::Last);
            self.overlay.close(&handle);
        }
    }

    /// Answers a close: the kernel asks only where [`Adapter::count_open`] has it ask.
    pub(super) fn flush_file(&self, ino: INodeNo, fh: Fh) {
        if let Ok(handle) = self.files.get(fh.0) {
            self.start_write_back("flush", ino, &handle, Close::NotLast);
        }
    }

    fn start_write_back(&self, what: &str, ino: INodeNo, handle: &FileHandle, close: Close) {
        if handle.inode().flags().is_truncated() {
            // A close succeeds all the same; why it did not start was logged.
            let _logged = self.run(what, ino, None, |op| op.close_truncated(handle, close));
        }
    }

    /// Whoever has the object open goes on under the old number; what the kernel keeps of its attributes there
    /// is asked for again.
    fn renew(&self, inode: &Arc<Inode>, old: INodeNo) {
        self.overlay.inodes().replace_node_id(inode, old.0);
        self.invalidate_attr(old.0);
    }
}

/// Whether a file that was opened to be written has setuid or setgid bits by now: a mode that was cached before
/// the open counted would outlast a write that takes them off.
fn may_have_setid(handle: &FileHandle) -> bool {
    let Some((fd, _)) = handle.open_descriptor() else {
        return true;
    };
    match sys::stat::stat_fd(&*fd) {
        Ok(stat) => stat.perm() & SETID != 0,
        Err(error) => {
            log::warn!("cannot stat inode {}: {error}", handle.inode().ino());
            true
        }
    }
}
