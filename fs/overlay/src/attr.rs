//! Owner, mode, size, times.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::thread::CapabilitySet;

use super::copy_up::CAPABILITY;
use super::files::FileHandle;
use super::stage::CopyUp;
use super::{Caller, Op};
use crate::inode::{FileState, Inode, PLAIN};
use crate::reach::{self, Attempt, retry_while_moved};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::zero_device;
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::stat::{FileKind, Stat};

/// How many links a merged folder shows: the subfolders lie in several layers, and 1 says "not counted" to
/// find(1) and fts(3).
pub(super) const UNCOUNTED: u64 = 1;

/// The mode bits with which a program runs as another user or group: S_ISUID and S_ISGID.
pub const SETID: u32 = 0o6000;

/// What stat shows of an object: `stat` with the owner as the mount shows it, and the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// The number.
    pub ino: u64,
    /// Everything else; its own `dev` and `ino` are the layer's.
    pub stat: Stat,
}

/// Changes of attributes, as one request brings them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner, as the mount shows it.
    pub uid: Option<u32>,
    /// Group, as the mount shows it.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Access time.
    pub atime: SetTime,
    /// Modification time.
    pub mtime: SetTime,
}

impl Default for SetAttr {
    fn default() -> Self {
        Self {
            mode: None,
            uid: None,
            gid: None,
            size: None,
            atime: SetTime::Keep,
            mtime: SetTime::Keep,
        }
    }
}

impl Op<'_> {
    /// What stat shows.
    pub fn attr(&self, inode: &Arc<Inode>) -> Result<Attr> {
        let read = || {
            if inode.is_dir() {
                self.dir_stat(inode)
            } else {
                self.file_stat(inode)
            }
        };
        let mut turn = inode.held_turn();
        let mut stat = read()?;
        // Times that were read in the middle of a copy-up are nobody's once it has ended.
        while turn != inode.held_turn() {
            turn = inode.held_turn();
            stat = read()?;
        }
        // The kernel writes to some files by itself, which is told of nowhere but in these times; a copy-up
        // sets the one back.
        if inode.kind() != FileKind::Regular || stat.mtime != stat.ctime {
            stat.ctime = inode.shown_ctime(stat.ctime);
        }
        stat.mtime = inode.shown_mtime(stat.mtime);
        Ok(self.shown(inode, stat))
    }

    /// What stat shows where the disk says `stat`, and links and times are those to show.
    pub(super) fn shown(&self, inode: &Inode, mut stat: Stat) -> Attr {
        let ids = &self.cx.behaviour;
        stat.uid = ids.uids.to_mount(stat.uid);
        stat.gid = ids.gids.to_mount(stat.gid);
        if ids.static_nlink && !inode.is_dir() {
            stat.nlink = 1;
        }
        Attr {
            ino: inode.ino(),
            stat,
        }
    }

    fn dir_stat(&self, inode: &Inode) -> Result<Stat> {
        let dir = inode.dir()?;
        let mut stat = sys::stat::stat_fd(&*dir.top()?.fd()?)?;
        if dir.removed {
            stat.nlink = 0;
        } else if dir.locs.len() > 1 {
            stat.nlink = UNCOUNTED;
        }
        Ok(stat)
    }

    fn file_stat(&self, inode: &Arc<Inode>) -> Result<Stat> {
        retry_while_moved(inode, |file| {
            let stat = match &file.anchor {
                Some(anchor) => sys::stat::stat_fd(&**anchor),
                None => file.loc.stat(),
            };
            let mut stat = match stat {
                Err(error) if error.is_absent() => return Ok(Attempt::OtherObject),
                other => other?,
            };
            if file.anchor.is_none() && stat.ino != file.identity.ino {
                return Ok(Attempt::OtherObject);
            }
            if stat.kind() != inode.kind() {
                stat = zero_device::shown(stat);
            }
            if let Some(data) = &file.data {
                stat.blocks = data.stat()?.blocks;
            }
            if file.orphan {
                stat.nlink = 0;
            } else if self.cx.behaviour.static_nlink {
                stat.nlink = 1;
            } else if stat.nlink > 1 {
                stat.nlink = self.visible_links(inode, &file, stat.nlink)?;
            }
            Ok(Attempt::Done(stat))
        })
    }

    /// The number of names under which a file with several links shows. A layer above its own may hide
    /// some of them, which the count on disk does not know.
    fn visible_links(&self, inode: &Arc<Inode>, file: &FileState, on_disk: u64) -> Result<u64> {
        if self.cx.stack.in_upper(file) {
            return Ok(on_disk);
        }
        if let Some(visible) = file.visible {
            return Ok(visible.get());
        }
        let visible = self.visible_names(inode, file)?.len() as u64;
        inode.change_file(|now| now.note_visible(file.identity, visible))?;
        Ok(visible)
    }

    /// Changes attributes. An empty change is the kernel's request to drop setuid, setgid and
    /// capabilities (FUSE_HANDLE_KILLPRIV_V2).
    pub fn set_attr(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        set: &SetAttr,
        handle: Option<&FileHandle>,
    ) -> Result<Attr> {
        self.cx.stack.upper()?;
        if set.mode.is_some() && inode.kind() == FileKind::Symlink {
            return Err(Error::Errno(Errno::OPNOTSUPP));
        }
        let ids = &self.cx.behaviour;
        let overflow = Error::Errno(Errno::OVERFLOW);
        let uid = set.uid.map(|id| ids.uids.to_disk(id).ok_or(overflow));
        let gid = set.gid.map(|id| ids.gids.to_disk(id).ok_or(overflow));
        let (uid, gid) = (uid.transpose()?, gid.transpose()?);
        let dropped = if *set == SetAttr::default() {
            Some(self.privileges_to_drop(caller, inode)?)
        } else {
            None
        };
        if let Some(size) = set.size {
            self.set_size(caller, inode, size, handle)?;
        }
        self.any_up(inode)?;
        // A copy-up in a folder puts the folder's times back, but not over what is set here.
        let _names = inode.is_dir().then(|| inode.names.lock());
        let target = reach::access_path(inode)?;
        let fd = target.as_fd();
        if let Some(bits) = dropped {
            drop_privileges(&target, bits)?;
            // A chown that names neither owner nor group moves the change time all the same.
            sys::attr::chown(fd, None, None)?;
        }
        if set.uid.is_some() || set.gid.is_some() {
            self.for_caller(caller, inode, &target, || sys::attr::chown(fd, uid, gid))?;
        }
        if let Some(mode) = set.mode {
            sys::attr::chmod(fd, mode)?;
            // What may be run now was nothing but data before.
            inode.unknown(PLAIN);
        }
        if set.atime != SetTime::Keep || set.mtime != SetTime::Keep {
            sys::attr::utimens(fd, set.atime, set.mtime)?;
        }
        inode.changed();
        self.attr(inode)
    }

    fn set_size(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        size: u64,
        handle: Option<&FileHandle>,
    ) -> Result<()> {
        if inode.kind() != FileKind::Regular {
            let errno = if inode.is_dir() {
                Errno::ISDIR
            } else {
                Errno::INVAL
            };
            return Err(Error::Errno(errno));
        }
        let how = if size == 0 {
            CopyUp::Truncate
        } else {
            CopyUp::Data
        };
        self.file_up(inode, how)?;
        let fd = match handle.filter(|handle| handle.writes()) {
            Some(handle) => self.content(handle)?,
            None => Arc::new(reach::open_content(inode, OFlags::RDWR)?),
        };
        self.cut(caller, inode, &fd, size)
    }

    /// Returns the mode bits that the empty request drops. It comes for a change of the content, for
    /// which a process has the file open for writing, and for a chown that changes nothing, for which
    /// setuid goes only when the caller owns the file. The kernel leaves that check to the daemon; without
    /// it any user could take setuid away from any program.
    fn privileges_to_drop(&self, caller: Caller, inode: &Inode) -> Result<u32> {
        let stat = reach::stat_on_disk(inode)?;
        if stat.kind() == FileKind::Directory {
            return Ok(0);
        }
        // The kernel's setattr_should_drop_sgid.
        let setgid = stat.perm() & 0o2000 != 0
            && (stat.perm() & 0o010 != 0
                || (!reach::is_capable(caller, CapabilitySet::FSETID)?
                    && !self.cx.is_member(caller, stat.gid)?));
        let drop = 0o4000 | if setgid { 0o2000 } else { 0 };
        if stat.perm() & drop != 0 {
            let who = self.cx.ids_on_disk(caller)?;
            if caller.uid != 0 && who.uid != stat.uid && !inode.is_written() {
                return Err(Error::Errno(Errno::PERM));
            }
        }
        Ok(drop)
    }

    /// Sets a file's size; setuid and setgid go as they do for the caller on a plain folder. With the
    /// caller's ids as well as without the right to keep the bits: a layer on another FUSE mount is told
    /// who asks, but the crate does not pass the kernel's request to drop them on.
    pub(super) fn cut(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        fd: &OwnedFd,
        size: u64,
    ) -> Result<()> {
        if self.takes_no_setid(caller, fd)? {
            sys::attr::truncate(fd, size)?;
        } else {
            sys::creds::as_caller(self.cx.ids_on_disk(caller)?, || {
                self.unprivileged(caller, inode, fd, || sys::attr::truncate(fd, size))
            })?;
        }
        self.note_cut(inode, size)
    }

    /// Makes a change at which setuid and setgid may go, as the layer's file system makes it for the
    /// caller.
    fn for_caller<T>(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        fd: &OwnedFd,
        change: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if self.takes_no_setid(caller, fd)? {
            return change();
        }
        self.unprivileged(caller, inode, fd, change)
    }

    /// Whether a change by this caller leaves setuid and setgid as they are.
    fn takes_no_setid(&self, caller: Caller, fd: &OwnedFd) -> Result<bool> {
        let perm = sys::stat::stat_fd(fd)?.perm();
        Ok(perm & SETID == 0 || reach::is_capable(caller, CapabilitySet::FSETID)?)
    }

    /// Changes a file's content for a caller without CAP_FSETID.
    ///
    /// The kernel caches the mode beyond a write and runs programs by the cached one, so the object is listed
    /// for [`Op::take_stale`] when bits may have gone.
    pub(super) fn unprivileged<T>(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        fd: &OwnedFd,
        change: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let stat = sys::stat::stat_fd(fd)?;
        if stat.perm() & SETID == 0 {
            return change();
        }
        self.cx.note_stale(inode);
        // Without the right to execute, setgid is an old mark for locking, which a member may keep.
        let keeps = stat.perm() & 0o2010 == 0o2000 && self.cx.is_member(caller, stat.gid)?;
        let own = self.cx.ids_on_disk(caller)?.gid;
        sys::creds::dropping_setid(if keeps { stat.gid } else { own }, change)
    }
}

/// Drops these mode bits, and capabilities.
fn drop_privileges(target: &OwnedFd, bits: u32) -> Result<()> {
    let stat = sys::stat::stat_fd(target)?;
    if stat.kind() == FileKind::Directory {
        return Ok(());
    }
    if stat.perm() & bits != 0 {
        sys::attr::chmod(target.as_fd(), stat.perm() & !bits)?;
    }
    match sys::xattr::remove(target.as_fd(), CAPABILITY) {
        Err(error) if !matches!(error.errno(), Errno::NODATA | Errno::OPNOTSUPP) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use crate::{Behaviour, Overlay};
    use cowl_layers::format::XattrSpace;
    use cowl_layers::layer::{Layer, Upper};

    /// Names were counted in the lower layer, and the count was noted when the file had been copied up already.
    #[test]
    fn names_counted_before_a_copy_up_do_not_count_after_it() {
        let top = tempfile::tempdir().unwrap();
        let space = XattrSpace::detect();
        let at = |name: &str| top.path().join(name);
        let upper = |dir: &str, work: &str| {
            std::fs::create_dir(at(dir)).unwrap();
            std::fs::create_dir(at(work)).unwrap();
            Upper::open(&at(dir), &at(work), space).unwrap()
        };
        std::fs::create_dir(at("lower")).unwrap();
        std::fs::write(at("lower/a"), "text").unwrap();
        for name in ["b", "c", "d"] {
            std::fs::hard_link(at("lower/a"), at("lower").join(name)).unwrap();
        }
        let lower = Layer::open(&at("lower"), space).unwrap();
        let top_layer = Some(upper("upper", "work"));
        let overlay = Overlay::new(top_layer, vec![lower], Behaviour::default()).unwrap();
        let unlink = |name: &[u8]| {
            let name = crate::Name::new(name).unwrap();
            overlay.begin().unlink(overlay.root(), &name).unwrap();
        };
        let inode = overlay.begin().find(b"a").unwrap();
        let before = inode.file().unwrap();
        unlink(b"b");
        overlay.begin().visible_links(&inode, &before, 4).unwrap();
        unlink(b"c");
        overlay.push_layer(upper("next", "next-work")).unwrap();
        assert_eq!(overlay.begin().attr(&inode).unwrap().stat.nlink, 2);
    }
}
