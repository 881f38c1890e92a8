//! The requests that open, create and close files.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use fuser::{FileHandle as Fh, FopenFlags, INodeNo, OpenFlags, ReplyCreate, ReplyOpen, Request};

use super::convert::{
    can_map_writable, is_plain_writer, is_synchronous, parse_name, to_errno, to_file_attr,
    to_open_options,
};
use super::handles::UNCOUNTED;
use super::new_files::Expected;
use super::{Adapter, GENERATION, blame};
use crate::fuse::passthrough::{
    Backing, CachedAttr, LARGE, LargeFiles, OpenMode, OpenParams, OpenTraits, Policy,
};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::sys;
use cowl_overlay::inode::Inode;
use cowl_overlay::unopened::close_created;
use cowl_overlay::{
    Attr, Close, FileHandle, Op, OpenOptions, Opened, SETID, UsualChange, VersionedDescriptor,
};

/// The permissions to write a file.
const WRITE: u32 = 0o222;

/// The parameters of an OPEN or CREATE request.
#[derive(Clone, Copy)]
struct Requested {
    ino: INodeNo,
    flags: OpenFlags,
    /// The flags include O_DIRECT.
    direct: bool,
    /// The size that is expected of a new file, by the thread that creates it.
    expected: Expected,
    /// A backing file with the current content is registered.
    is_registered: bool,
}

/// An open file to be sent in a reply. It is counted as open.
struct OpenedFile {
    handle: Arc<FileHandle>,
    /// The node id under which it is counted, or [`UNCOUNTED`].
    node_id: u64,
    flags: FopenFlags,
    backing: Option<Arc<Backing>>,
}

impl Adapter {
    /// Answers an OPEN request.
    pub(super) fn open_file(
        &self,
        req: &Request,
        ino: INodeNo,
        flags: OpenFlags,
        reply: ReplyOpen,
    ) {
        if self.has_no_open_requests() {
            // The kernel opens this file and all others itself from now on.
            return reply.error(fuser::Errno::ENOSYS);
        }
        let (options, direct) = to_open_options(flags);
        self.release_resumed();
        let done = self.run("open", ino, None, |op| {
            let inode = op.inode(ino.0)?;
            // The number was renewed: descriptors that were opened with the old one remain valid, but it gets no new
            // ones. On ESTALE the kernel looks the name up again.
            if self.overlay.inodes().node_id(&inode) != ino.0 {
                return Err(Error::Errno(Errno::STALE));
            }
            let mut is_registered = false;
            let is_known = |version| {
                is_registered = self.backing.is_registered(ino.0, version);
                is_registered
            };
            if options.truncate && inode.is_executing() {
                // Before the truncation: a refused open must not change the file.
                self.refused.admit(op, &inode, options, req.pid())?;
            }
            let content = op.open_lazily(self.caller(req, 0), &inode, options, is_known)?;
            let close = |_: &Error| self.overlay.close(&content.handle);
            let admitted = self.refused.admit(op, &inode, options, req.pid());
            admitted.inspect_err(close)?;
            let requested = Requested {
                ino,
                flags,
                direct,
                expected: Expected::Unknown,
                is_registered,
            };
            self.count_open(op, requested, &inode, content)
        });
        match done {
            Ok(opened) => {
                let number = (self.files).insert(opened.node_id, opened.handle, self.ledger());
                let fh = Fh(number);
                match opened.backing {
                    Some(backing) => backing.reply_opened(reply, fh, opened.flags),
                    None => reply.opened(fh, opened.flags),
                }
            }
            Err(error) => reply.error(to_errno(error)),
        }
    }

    /// Answers a CREATE request.
    pub(super) fn create_file(
        &self,
        req: &Request,
        (parent, name): (INodeNo, &std::ffi::OsStr),
        (mode, umask): (u32, u32),
        flags: OpenFlags,
        reply: ReplyCreate,
    ) {
        let (options, direct) = to_open_options(flags);
        let expected = match self.can_be_direct(req, flags) {
            true => self.new_files.expect(req.pid()),
            false => Expected::Unknown,
        };
        self.release_resumed();
        let done = self.run("create", parent, Some(name), |op| {
            let caller = self.caller(req, umask);
            let parent = op.inode(parent.0)?;
            let name = parse_name(name)?;
            let (inode, content, attr) = op.create_attr(caller, &parent, &name, mode, options)?;
            if self.has_no_open_requests() {
                close_created(&self.overlay, content);
                return Ok((inode, None, attr));
            }
            let requested = Requested {
                ino: INodeNo(inode.ino()),
                flags,
                direct,
                expected,
                is_registered: false,
            };
            let opened = self.count_open(op, requested, &inode, content)?;
            Ok((inode, Some(opened), attr))
        });
        match done {
            Ok((inode, None, attr)) => {
                let opened = (
                    Fh(0),
                    FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
                    None,
                );
                self.reply_created(&inode, opened, &attr, reply);
            }
            Ok((inode, Some(opened), attr)) => {
                let node_id = opened.node_id;
                let number = (self.files).insert(node_id, opened.handle, self.ledger());
                // A file that the kernel did not accept for passthrough predicts nothing.
                let uses_passthrough = opened.backing.is_some() || node_id == UNCOUNTED;
                if uses_passthrough && self.can_be_direct(req, flags) {
                    self.new_files.insert(number, req.pid(), expected);
                }
                let opened = (Fh(number), opened.flags, opened.backing);
                self.reply_created(&inode, opened, &attr, reply);
            }
            Err(error) => reply.error(to_errno(error)),
        }
    }

    /// Whether the daemon may write to a file that is created with these flags, if it is expected to be small.
    fn can_be_direct(&self, req: &Request, flags: OpenFlags) -> bool {
        // A thread with the number 0 is not visible.
        self.backing.policy().small_by_daemon && is_plain_writer(flags) && req.pid() != 0
    }

    fn reply_created(
        &self,
        inode: &Arc<Inode>,
        (fh, flags, backing): (Fh, FopenFlags, Option<Arc<Backing>>),
        attr: &Attr,
        reply: ReplyCreate,
    ) {
        self.overlay.inodes().count_lookup(inode);
        let timeout = &self.created_attr_timeout(inode, attr);
        let attr = to_file_attr(attr);
        match backing {
            Some(backing) => {
                let entry = (timeout, &attr, GENERATION);
                backing.reply_created(reply, entry, fh, flags);
            }
            None => reply.created(timeout, &attr, GENERATION, fh, flags),
        }
    }

    /// Decides how an open file is read and written, and counts it as open.
    ///
    /// After an error the file is closed.
    fn count_open(
        &self,
        op: &Op<'_>,
        requested: Requested,
        inode: &Arc<Inode>,
        Opened { handle, descriptor }: Opened,
    ) -> Result<OpenedFile> {
        let Requested { ino, flags, .. } = requested;
        let first = self.first_opens.begin(inode);
        let close = |_: &Error| self.overlay.close(&handle);
        let traits = self
            .collect_traits(op, &handle, descriptor.as_ref(), requested)
            .inspect_err(close)?;
        let is_synchronous = traits.write && is_synchronous(flags);
        let mode = self.backing.open(
            &OpenParams {
                ino: ino.0,
                traits,
                can_map_writable: can_map_writable(flags),
                inode,
                // In the upper layer, content and attributes are one file.
                dev: traits.upper.then(|| inode.identity().dev),
                content: descriptor
                    .as_ref()
                    .map(|(fd, version)| (fd.as_fd(), *version)),
            },
            self.ledger(),
        );
        let mut node_id = ino.0;
        let (mut flags, backing) = match mode {
            OpenMode::Daemon(flags) => (flags, None),
            OpenMode::Uncounted(flags) => {
                node_id = UNCOUNTED;
                (flags, None)
            }
            OpenMode::Passthrough(flags, id, cached) => {
                if cached == CachedAttr::Volatile
                    || traits.write && may_have_setid(&handle, descriptor.as_ref())
                {
                    self.invalidate_attr(ino.0);
                }
                (flags, Some(id))
            }
            OpenMode::Renew => {
                self.overlay.close(&handle);
                self.renew(inode, ino);
                return Err(Error::Errno(Errno::STALE));
            }
        };
        if self.live_layers {
            flags.remove(FopenFlags::FOPEN_KEEP_CACHE);
        }
        if traits.write && inode.flags().is_truncated() && inode.flags().has_unsynced_name() {
            // The file replaces the content of a lower one: its close(2) starts writeback before it returns. Other
            // files of the upper layer are left to the file system below, and to RELEASE.
            flags.remove(FopenFlags::FOPEN_NOFLUSH);
        }
        if let Some(first) = first
            && !traits.write
            && !traits.upper
            && backing.is_none()
            && flags.contains(FopenFlags::FOPEN_KEEP_CACHE)
            && let (Some((fd, version)), Some(notifier)) = (&descriptor, self.notifier.get())
        {
            first.store(notifier, (inode, ino), (fd, *version));
        }
        if backing.is_some() && is_synchronous {
            // The kernel syncs each write to the backing file, but that does not sync the name of a new copy-up.
            op.sync_name(&handle).inspect_err(|_| {
                self.backing.release(ino.0, self.ledger());
                self.overlay.close(&handle);
            })?;
        }
        Ok(OpenedFile {
            handle,
            node_id,
            flags,
            backing,
        })
    }

    /// Returns the properties of an open on which the decision about passthrough depends.
    fn collect_traits(
        &self,
        op: &Op<'_>,
        handle: &FileHandle,
        descriptor: Option<&VersionedDescriptor>,
        requested: Requested,
    ) -> Result<OpenTraits> {
        let policy = self.backing.policy();
        let OpenOptions { write, .. } = handle.options();
        let mut traits = OpenTraits {
            upper: false,
            write,
            replaced: false,
            privileged: false,
            direct: requested.direct,
            creates_small: requested.expected == Expected::Small,
        };
        let inode = handle.inode();
        let before = inode.facts().snapshot();
        traits.upper = op.is_content_in_upper(handle)?;
        if let Some((fd, _)) = descriptor {
            let is_candidate = policy.upper && traits.upper;
            // Reading the content would change its access time. For the upper layer the decision does not depend on
            // it, so it is not read there.
            traits.replaced = !write && !traits.upper && is_replaced(policy, op, handle, fd)?;
            traits.privileged = write && is_candidate && handle.is_privileged(fd)?;
            let is_plain = !traits.upper && !traits.replaced && !policy.lowers;
            if !write && is_plain && !self.live_layers {
                inode.facts().note_plain_data(before);
            }
        } else {
            // The content was not opened: it is either registered for passthrough, or was found to be plain data.
            traits.replaced = requested.is_registered;
        }
        Ok(traits)
    }

    /// Handles a RELEASE request: the last descriptor of an open file was closed.
    pub(super) fn release_file(&self, ino: INodeNo, fh: Fh) {
        // A predecessor may have handled the request, without a reply.
        if let Some(open) = self.files.remove(fh.0, self.ledger()) {
            if self.is_refused("release", ino, None) {
                return self.overlay.abandon(open.file);
            }
            match open.node_id {
                UNCOUNTED => {
                    let ino = open.file.inode().ino();
                    self.backing.release_uncounted(ino, self.ledger());
                }
                node_id => self.backing.release(node_id, self.ledger()),
            }
            if let Some(new_file) = self.new_files.remove(fh.0) {
                // Nothing is learned from an error, which was logged.
                let stat = self.run("release", ino, None, |op| {
                    op.stat_on_disk(open.file.inode())
                });
                if let Ok(stat) = stat {
                    self.new_files.learn(new_file, stat.size);
                }
            }
            self.start_writeback("release", ino, &open.file, Close::Last);
            self.overlay.close(&open.file);
        }
    }

    /// Closes the handle that a predecessor assigned in the request of this thread. The kernel did not get its number,
    /// because it sent the request again.
    fn release_resumed(&self) {
        if blame::is_refused() {
            return;
        }
        let handle = self
            .ledger()
            .and_then(|ledger| ledger.take_resumed_handle());
        if let Some(open) = handle.and_then(|number| self.files.remove(number, self.ledger())) {
            self.backing.release(open.node_id, self.ledger());
            self.overlay.close(&open.file);
        }
    }

    /// Handles a FLUSH request, which the kernel sends on each close(2) of a file that [`Adapter::count_open`] opened
    /// without FOPEN_NOFLUSH.
    pub(super) fn flush_file(&self, ino: INodeNo, fh: Fh) {
        if let Ok(handle) = self.files.get(fh.0) {
            self.start_writeback("flush", ino, &handle, Close::NotLast);
        }
    }

    fn start_writeback(&self, request: &str, ino: INodeNo, handle: &FileHandle, close: Close) {
        if handle.inode().flags().is_truncated() {
            // The error is logged. It must not fail the close(2).
            let _logged = self.run(request, ino, None, |op| op.close_truncated(handle, close));
        }
    }

    /// Gives an inode a new number, and invalidates the attributes cached for the old one.
    ///
    /// Descriptors that are open remain valid under the old number.
    fn renew(&self, inode: &Arc<Inode>, old: INodeNo) {
        self.overlay.inodes().replace_node_id(inode, old.0);
        self.invalidate_attr(old.0);
    }
}

/// Whether a file is usually replaced, not written in place, so that the policy permits passthrough. `fd` is a descriptor
/// of its content.
fn is_replaced(policy: Policy, op: &Op<'_>, handle: &FileHandle, fd: &OwnedFd) -> Result<bool> {
    if policy.large != LargeFiles::None {
        let stat = sys::stat::stat_fd(fd)?;
        let is_selected = || -> Result<bool> {
            if policy.large == LargeFiles::All {
                return Ok(true);
            }
            Ok(match handle.usual_change(fd) {
                UsualChange::Replace => true,
                UsualChange::InPlace => false,
                // The mode of the content is another one after a copy-up of the attributes.
                UsualChange::Unknown => {
                    handle.is_in_package_tree()
                        || op.stat_on_disk(handle.inode())?.perm() & WRITE == 0
                }
            })
        };
        if stat.size >= LARGE && is_selected()? {
            return Ok(true);
        }
    }
    Ok(policy.programs && handle.is_program(fd)?)
}

/// Whether a file that was opened for writing may have setuid or setgid bits.
///
/// The kernel may have cached its mode before the open was counted, and would show the bits even after a passthrough
/// write has cleared them.
fn may_have_setid(handle: &FileHandle, descriptor: Option<&VersionedDescriptor>) -> bool {
    let Some((fd, _)) = descriptor else {
        return true;
    };
    match sys::stat::stat_fd(&**fd) {
        Ok(stat) => stat.perm() & SETID != 0,
        Err(error) => {
            log::warn!("cannot stat inode {}: {error}", handle.inode().ino());
            true
        }
    }
}
