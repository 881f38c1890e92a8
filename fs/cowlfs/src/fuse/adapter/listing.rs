//! Lookup of names, and listings of directories.
//!
//! Directories are not opened: on ENOSYS the kernel stops sending OPENDIR (fc->no_opendir), reads listings with handle
//! 0, and caches each listing until the directory changes through the kernel (fs/fuse/readdir.c). For the changes that
//! the kernel cannot detect, [`Adapter::before_end`] and [`Adapter::after_rename`] invalidate the listing.
//! docs/decisions/0011 has the reasons.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;

use fuser::{INodeNo, ReplyAttr, ReplyDirectory, ReplyDirectoryPlus, ReplyEntry, ReplyOpen};

use super::attributes::Accepted;
#[cfg(debug_assertions)]
use super::blame;
use super::blame::Blame;
use super::convert::{parse_name, to_errno, to_file_attr, to_file_type};
use super::reply::{log_failure, negative_attr};
use super::{Adapter, GENERATION};
use crate::fuse::workers::IdleWork;
use cowl_layers::error::{Error, Result};
use cowl_layers::name::Name;
use cowl_layers::panics;
use cowl_layers::shown::Show as _;
use cowl_layers::sys::stat::Stat;
use cowl_overlay::inode::Inode;
use cowl_overlay::{Attr, DirEntry, Op, RenameFlags};

/// One entry of a READDIRPLUS reply.
struct PlusEntry {
    /// The inode, for which the kernel counts a lookup.
    inode: Option<Arc<Inode>>,
    attr: Attr,
}

impl Adapter {
    /// Sends a reply with an inode, after counting a lookup of it.
    pub(super) fn reply_entry(
        &self,
        done: Result<(Arc<Inode>, Attr)>,
        accepted: Accepted,
        reply: ReplyEntry,
    ) {
        match done {
            Ok((inode, found)) => {
                let number = self.overlay.inodes().node_id(&inode);
                self.overlay.inodes().count_lookup_as(&inode, number);
                let mut timeout = self.attr_timeout(&inode, number, &found, accepted);
                let mut found = to_file_attr(&found);
                if number != inode.ino() {
                    // `fuser` has one field for two numbers: that of the node, and that in the attributes. With a
                    // timeout of zero the kernel requests the attributes, with the number for stat(2), at once.
                    found.ino = INodeNo(number);
                    timeout = Duration::ZERO;
                }
                reply.entry_with_ttls(&timeout, &self.cache_timeout, &found, GENERATION);
            }
            Err(error) => reply.error(to_errno(error)),
        }
    }

    /// Sends a reply with the attributes of the inode that the kernel knows as `ino`.
    pub(super) fn reply_attr(
        &self,
        ino: INodeNo,
        done: Result<(Arc<Inode>, Attr)>,
        accepted: Accepted,
        reply: ReplyAttr,
    ) {
        match done {
            Ok((inode, found)) => {
                let timeout = self.attr_timeout(&inode, ino.0, &found, accepted);
                reply.attr(&timeout, &to_file_attr(&found));
            }
            Err(error) => reply.error(to_errno(error)),
        }
    }

    /// Answers a LOOKUP request.
    pub(super) fn reply_lookup(&self, parent: INodeNo, name: &OsStr, out: ReplyEntry) {
        let done = self.run("lookup", parent, Some(name), |op| {
            op.lookup_attr(&op.inode(parent.0)?, &parse_name(name)?)?
                .ok_or(Error::NOT_FOUND)
        });
        match done {
            Err(error) if error == Error::NOT_FOUND => {
                out.entry(&self.cache_timeout, &negative_attr(), GENERATION);
            }
            other => self.reply_entry(other, Accepted::IfCurrent, out),
        }
    }

    /// Answers an OPENDIR request.
    pub(super) fn open_dir(&self, out: ReplyOpen) {
        if self.cache_listings {
            out.error(fuser::Errno::ENOSYS);
        } else {
            out.opened(fuser::FileHandle(0), fuser::FopenFlags::empty());
        }
    }

    /// Answers a READDIR request.
    pub(super) fn list(&self, ino: INodeNo, offset: u64, mut out: ReplyDirectory) {
        let done = self.run("readdir", ino, None, |op| {
            let inode = op.inode(ino.0)?;
            let listing = op.listing(&inode, offset)?;
            let mut empty = true;
            for (next, entry) in listing.entries_from(offset) {
                let ino = op.entry_ino(&listing, entry)?;
                let name = OsStr::from_bytes(entry.name());
                if out.add(INodeNo(ino), next, to_file_type(entry.kind()), name) {
                    break;
                }
                empty = false;
            }
            self.before_end(&inode, empty);
            Ok(())
        });
        match done {
            Ok(()) => out.ok(),
            Err(error) => out.error(to_errno(error)),
        }
    }

    /// Answers a READDIRPLUS request.
    pub(super) fn list_plus(&self, ino: INodeNo, offset: u64, mut out: ReplyDirectoryPlus) {
        let done = self.run("readdirplus", ino, None, |op| {
            let inode = op.inode(ino.0)?;
            let listing = op.listing(&inode, offset)?;
            let mut empty = true;
            for (next, entry) in listing.entries_from(offset) {
                // The entry was removed since the listing was read.
                let Some(plus) = plus_entry(op, &inode, entry)? else {
                    continue;
                };
                let name = OsStr::from_bytes(entry.name());
                let mut found = to_file_attr(&plus.attr);
                let mut timeout = Duration::ZERO;
                if let Some(inode) = &plus.inode {
                    let number = self.overlay.inodes().node_id(inode);
                    let allowed = self.attr_timeout(inode, number, &plus.attr, Accepted::IfCurrent);
                    if number == inode.ino() {
                        timeout = allowed;
                    }
                    found.ino = INodeNo(number);
                }
                if out.add(found.ino, next, name, &timeout, &found, GENERATION) {
                    break;
                }
                empty = false;
                if let Some(inode) = plus.inode {
                    self.overlay.inodes().count_lookup_as(&inode, found.ino.0);
                }
            }
            self.before_end(&inode, empty);
            Ok(())
        });
        match done {
            Ok(()) => out.ok(),
            Err(error) => out.error(to_errno(error)),
        }
    }

    /// Prepares the reply to a request for a part of a listing; `empty` means that the part is the end.
    ///
    /// The end makes the kernel cache the parts before it. From then on the kernel searches the cached listing for the
    /// positions of all processes that are still reading the directory, and treats a position that it does not find
    /// as the end. A process whose position is at an entry that another one has just removed would miss the entries
    /// behind it. So the directory's cached listing is invalidated before the reply, and all processes continue with
    /// requests.
    fn before_end(&self, inode: &Inode, empty: bool) {
        if empty && self.cache_listings && inode.has_recent_removal() {
            self.invalidate_listing(inode.ino());
        }
    }

    /// Invalidates the listings that a rename made stale.
    ///
    /// A directory that moved to another parent has another `..`, but the kernel invalidates its listing only on
    /// changes of the directory itself.
    pub(super) fn after_rename(
        &self,
        op: &Op<'_>,
        from: (&Arc<Inode>, &Name),
        to: (&Arc<Inode>, &Name),
        flags: RenameFlags,
    ) {
        from.0.note_removal();
        if Arc::ptr_eq(from.0, to.0) || !self.cache_listings {
            return;
        }
        for (parent, name) in [to, from].into_iter().take(1 + usize::from(flags.exchange)) {
            match op.lookup(parent, name) {
                Ok(Some(moved)) if moved.is_dir() => self.invalidate_listing(moved.ino()),
                Ok(_) => {}
                // Not a failure of the request: the rename is complete.
                Err(error) => log::warn!(
                    "cannot invalidate the listing of the renamed directory {}: {error}",
                    name.shown()
                ),
            }
        }
    }
}

impl IdleWork for Adapter {
    /// Prepares a part of the next listing for a program that walks the tree.
    fn step(&self) -> bool {
        // If it ends the process, there is no request to be refused afterwards (docs/decisions/0035).
        let Some(_blame) = Blame::begin_idle(self.requests.crashes()) else {
            return false;
        };
        let op = self.overlay.begin();
        let done = panics::request(|| {
            #[cfg(debug_assertions)]
            blame::injected::end_at("readahead", None);
            op.read_ahead()
        });
        done.unwrap_or_else(|error| {
            log::debug!("cannot read a directory ahead: {error}");
            false
        })
    }
}

/// Returns an entry with its attributes, or `None` if it was removed.
///
/// Of `.` and `..` the kernel uses only number and type, and counts no lookup. A damaged entry is listed in the same
/// way, so that it does not hide the others: a lookup of it returns the error.
fn plus_entry(op: &Op<'_>, dir: &Arc<Inode>, entry: &DirEntry) -> Result<Option<PlusEntry>> {
    let without_inode = || {
        Ok(Some(PlusEntry {
            inode: None,
            attr: Attr {
                ino: entry.ino_on_disk(),
                stat: Stat {
                    mode: entry.kind().mode_bits(),
                    ..Stat::default()
                },
            },
        }))
    };
    if entry.is_dots() {
        return without_inode();
    }
    match op.lookup_attr(dir, entry.name()) {
        Ok(found) => Ok(found.map(|(inode, attr)| PlusEntry {
            inode: Some(inode),
            attr,
        })),
        Err(error) => {
            let name = OsStr::from_bytes(entry.name());
            log_failure("listing", INodeNo(dir.ino()), Some(name), error);
            without_inode()
        }
    }
}
