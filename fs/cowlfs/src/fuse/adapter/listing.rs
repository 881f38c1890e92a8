//! Looking names up and reading folders.
//!
//! Folders are not opened: the kernel takes ENOSYS for "there is no need" (fc->no_opendir), asks for
//! listings with handle 0, and keeps every listing until the folder changes through it
//! (fs/fuse/readdir.c). What it can't know is told it here, see [`Adapter::before_end`] and
//! [`Adapter::after_rename`]; docs/decisions/0011 has the reasons.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;

use fuser::{INodeNo, ReplyAttr, ReplyDirectory, ReplyDirectoryPlus, ReplyEntry, ReplyOpen};

use super::attributes::Accepted;
use super::convert::{attr, errno, kind, name_of};
use super::reply::{absent, log_failure};
use super::{Adapter, GENERATION};
use cowl_layers::error::{Error, Result};
use cowl_layers::name::Name;
use cowl_layers::sys::stat::Stat;
use cowl_overlay::inode::Inode;
use cowl_overlay::{Attr, DirEntry, Op, RenameFlags};

/// What a listing with attributes says of one entry.
struct Plus {
    /// The object, of which the kernel then counts a lookup.
    inode: Option<Arc<Inode>>,
    attr: Attr,
}

impl Adapter {
    /// Replies with a new or found object, and only then counts that the kernel knows it.
    pub(super) fn entry(
        &self,
        done: Result<(Arc<Inode>, Attr)>,
        accepted: Accepted,
        reply: ReplyEntry,
    ) {
        match done {
            Ok((inode, found)) => {
                let number = self.overlay.inodes().node_id(&inode);
                self.overlay.inodes().count_lookup_as(&inode, number);
                let mut keep = self.keep_attr(&inode, number, &found, accepted);
                let mut found = attr(&found);
                if number != inode.ino() {
                    // The crate has one field for both numbers: what stat shows is asked for at once.
                    found.ino = INodeNo(number);
                    keep = Duration::ZERO;
                }
                reply.entry_with_ttls(&keep, &self.keep, &found, GENERATION);
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    /// Replies with the attributes of what the kernel knows by this number.
    pub(super) fn attributes(
        &self,
        ino: INodeNo,
        done: Result<(Arc<Inode>, Attr)>,
        accepted: Accepted,
        reply: ReplyAttr,
    ) {
        match done {
            Ok((inode, found)) => {
                let keep = self.keep_attr(&inode, ino.0, &found, accepted);
                reply.attr(&keep, &attr(&found));
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    pub(super) fn look_up(&self, parent: INodeNo, name: &OsStr, out: ReplyEntry) {
        let done = self.run("lookup", parent, Some(name), |op| {
            op.lookup_attr(&op.inode(parent.0)?, &name_of(name)?)?
                .ok_or(Error::NOT_FOUND)
        });
        match done {
            Err(error) if error == Error::NOT_FOUND => {
                out.entry(&self.keep, &absent(), GENERATION);
            }
            other => self.entry(other, Accepted::IfCurrent, out),
        }
    }

    pub(super) fn open_dir(&self, out: ReplyOpen) {
        if self.keep_listings {
            out.error(fuser::Errno::ENOSYS);
        } else {
            out.opened(fuser::FileHandle(0), fuser::FopenFlags::empty());
        }
    }

    pub(super) fn list(&self, ino: INodeNo, offset: u64, mut out: ReplyDirectory) {
        let done = self.run("readdir", ino, None, |op| {
            let inode = op.inode(ino.0)?;
            let listing = op.listing(&inode, offset)?;
            let mut empty = true;
            for (next, entry) in listing.entries_from(offset) {
                let ino = op.entry_ino(&listing, entry)?;
                let name = OsStr::from_bytes(entry.name());
                if out.add(INodeNo(ino), next, kind(entry.kind()), name) {
                    break;
                }
                empty = false;
            }
            self.before_end(&inode, empty);
            Ok(())
        });
        match done {
            Ok(()) => out.ok(),
            Err(error) => out.error(errno(error)),
        }
    }

    pub(super) fn list_plus(&self, ino: INodeNo, offset: u64, mut out: ReplyDirectoryPlus) {
        let done = self.run("readdirplus", ino, None, |op| {
            let inode = op.inode(ino.0)?;
            let listing = op.listing(&inode, offset)?;
            let mut empty = true;
            for (next, entry) in listing.entries_from(offset) {
                // Removed since the listing was taken: passed over.
                let Some(plus) = plus_entry(op, &inode, entry)? else {
                    continue;
                };
                let name = OsStr::from_bytes(entry.name());
                let mut found = attr(&plus.attr);
                let mut keep = Duration::ZERO;
                if let Some(inode) = &plus.inode {
                    let number = self.overlay.inodes().node_id(inode);
                    let allowed = self.keep_attr(inode, number, &plus.attr, Accepted::IfCurrent);
                    if number == inode.ino() {
                        keep = allowed;
                    }
                    found.ino = INodeNo(number);
                }
                if out.add(found.ino, next, name, &keep, &found, GENERATION) {
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
            Err(error) => out.error(errno(error)),
        }
    }

    /// To be called before a part of a listing is answered. An empty one is the end, and makes the kernel
    /// keep what it was told before. From then on it looks for the positions of all that are still reading
    /// the folder in what it kept, and takes one that it does not find there for the end: a program
    /// whose position names an entry that was removed lately, by another one, would miss what comes
    /// behind. So the pages of that folder's listing are dropped first, and all of them go on asking.
    fn before_end(&self, inode: &Inode, empty: bool) {
        if empty && self.keep_listings && inode.has_recent_removal() {
            self.drop_listing(inode.ino());
        }
    }

    /// To be called after a rename. A folder that came to another one has another `..`, and the kernel
    /// goes by the folder's own changes.
    pub(super) fn after_rename(
        &self,
        op: &Op<'_>,
        from: (&Arc<Inode>, &Name),
        to: (&Arc<Inode>, &Name),
        flags: RenameFlags,
    ) {
        from.0.note_removal();
        if Arc::ptr_eq(from.0, to.0) || !self.keep_listings {
            return;
        }
        for (parent, name) in [to, from].into_iter().take(1 + usize::from(flags.exchange)) {
            match op.lookup(parent, name) {
                Ok(Some(moved)) if moved.is_dir() => self.drop_listing(moved.ino()),
                Ok(_) => {}
                // The move is made: an error here would tell that it is not.
                Err(error) => log::warn!("cannot look at what was moved to {name}: {error}"),
            }
        }
    }
}

/// `None` when the entry is gone. Of `.` and `..` the kernel takes only number and type, and counts no
/// lookup. One damaged entry does not hide the others: it is named, and whoever asks for it gets the
/// error.
fn plus_entry(op: &Op<'_>, folder: &Arc<Inode>, entry: &DirEntry) -> Result<Option<Plus>> {
    let bare = || {
        Ok(Some(Plus {
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
        return bare();
    }
    match op.lookup_attr(folder, entry.name()) {
        Ok(found) => Ok(found.map(|(inode, attr)| Plus {
            inode: Some(inode),
            attr,
        })),
        Err(error) => {
            let name = OsStr::from_bytes(entry.name());
            log_failure("listing", INodeNo(folder.ino()), Some(name), error);
            bare()
        }
    }
}
