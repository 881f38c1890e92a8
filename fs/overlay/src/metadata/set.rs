//! Changes of owner, mode, size and times.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::thread::CapabilitySet;

use super::acl::permits_write;
use super::read::{Attr, Attributes};
use crate::content::{Content, FileHandle, change_for_caller, truncate};
use crate::copy_up::{CopyExtent, CopyUp};
use crate::inode::{Inode, PLAIN_DATA};
use crate::reach::{
    Caller, Context, access_path, has_capability, lock_capabilities, open_content, stat_on_disk,
};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::{ACL_ACCESS, CAPABILITY};
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::stat::{FileKind, Stat};

/// The attribute changes of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner, as visible through the mount.
    pub uid: Option<u32>,
    /// Group, as visible through the mount.
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

/// Execution of attribute changes.
#[derive(Clone, Copy)]
pub(crate) struct SetAttributes<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) copy_up: CopyUp<'o>,
    pub(crate) content: Content<'o>,
    pub(crate) attributes: Attributes<'o>,
}

impl SetAttributes<'_> {
    /// Changes attributes, and returns the new ones.
    ///
    /// An empty change is the kernel's request to drop setuid, setgid and capabilities (FUSE_HANDLE_KILLPRIV_V2).
    pub(crate) fn set_attr(
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
        let ids = self.cx.options;
        let overflow = Error::Errno(Errno::OVERFLOW);
        let uid = set.uid.map(|id| ids.uids.to_disk(id).ok_or(overflow));
        let gid = set.gid.map(|id| ids.gids.to_disk(id).ok_or(overflow));
        let (uid, gid) = (uid.transpose()?, gid.transpose()?);
        let capabilities_removed = inode.flags().take_capabilities_removed();
        let dropped = if *set != SetAttr::default() {
            None
        } else if capabilities_removed && self.is_privileged_write(caller, inode)? {
            return self.attributes.attr(inode);
        } else {
            Some(self.privileges_to_drop(caller, inode)?)
        };
        if let Some(size) = set.size {
            self.set_size(caller, inode, size, handle)?;
        }
        self.copy_up.copy_up_any(inode)?;
        // Locked against concurrent copy-ups in the directory, which would overwrite the new times with the old
        // ones.
        let _names = inode.names().ok().map(|names| names.lock());
        let target = access_path(inode)?;
        let fd = target.as_fd();
        if let Some(bits) = dropped {
            let _locked = lock_capabilities(inode);
            drop_privileges(&target, bits)?;
            // chown(2) updates the change time even without a new owner or group.
            sys::attr::chown(fd, None, None)?;
        }
        if set.uid.is_some() || set.gid.is_some() {
            change_for_caller(self.cx, caller, inode, &target, || {
                sys::attr::chown(fd, uid, gid)
            })?;
        }
        if let Some(mode) = set.mode {
            sys::attr::chmod(fd, mode)?;
            // A plain data file may have become executable.
            inode.facts().forget(PLAIN_DATA);
        }
        if set.atime != SetTime::Keep || set.mtime != SetTime::Keep {
            sys::attr::utimens(fd, set.atime, set.mtime)?;
        }
        inode.note_change();
        self.attributes.attr(inode)
    }

    /// Truncates or extends a regular file.
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
        let extent = if size == 0 {
            CopyExtent::Truncate
        } else {
            CopyExtent::Data
        };
        if !self.copy_up.is_in_upper(inode)? {
            self.refuse_size(size)?;
        }
        self.copy_up.copy_up_file(inode, extent)?;
        let fd = match handle.filter(|handle| handle.is_writable()) {
            Some(handle) => self.content.descriptor(handle)?,
            None => Arc::new(open_content(inode, OFlags::RDWR)?),
        };
        truncate(self.cx, caller, inode, &fd, size)
    }

    /// Returns EFBIG if a file of this size is too large for the upper layer's file system, before anything is copied
    /// up.
    ///
    /// No call reports the maximum, so this sets the size of a temporary file.
    fn refuse_size(&self, size: u64) -> Result<()> {
        /// A size that every file system supports.
        const SUPPORTED: u64 = (1 << 31) - 1;
        if size <= SUPPORTED {
            return Ok(());
        }
        let (_staged, fd) = self
            .cx
            .stack
            .upper()?
            .work
            .stage(|dir, name| sys::node::create(dir, name, 0o600, OFlags::RDWR))?;
        sys::attr::truncate(&fd, size)
    }

    /// Returns the mode bits that an empty request drops; EPERM if the caller may not drop them.
    ///
    /// The kernel sends the request for a change of the content, when a process has the file open for writing, and for
    /// a chown(2) without changes, when only the owner of the file may remove setuid. The kernel leaves this check to
    /// the daemon. Without it, any user could remove setuid from any program.
    fn privileges_to_drop(&self, caller: Caller, inode: &Inode) -> Result<u32> {
        let stat = stat_on_disk(inode)?;
        if stat.kind() == FileKind::Directory {
            return Ok(0);
        }
        // The kernel's setattr_should_drop_sgid.
        let setgid = stat.perm() & 0o2000 != 0
            && (stat.perm() & 0o010 != 0
                || (!has_capability(caller, CapabilitySet::FSETID)?
                    && !self.cx.is_member(caller, stat.gid)?));
        let drop = 0o4000 | if setgid { 0o2000 } else { 0 };
        if stat.perm() & drop != 0 {
            let is_owner = caller.uid == 0 || self.cx.is_user(caller, stat.uid);
            if !is_owner && !self.may_be_writing(caller, inode, &stat)? {
                return Err(Error::Errno(Errno::PERM));
            }
        }
        Ok(drop)
    }

    /// Whether an empty request that follows the removal of the file capabilities is part of a write that keeps setuid
    /// and setgid.
    ///
    /// Before a write to a file with capabilities, the kernel removes them (REMOVEXATTR) and sends an empty SETATTR. If
    /// the writer has CAP_FSETID, the bits must remain; otherwise the kernel wants them dropped. For a chown(2) without
    /// changes, which drops them for every caller, the kernel sends the same two requests; it is recognized by the
    /// absence of writers (docs/semantics.md).
    fn is_privileged_write(&self, caller: Caller, inode: &Inode) -> Result<bool> {
        let may_have_writers = self.content.opens.may_have_writers(inode);
        Ok(may_have_writers && has_capability(caller, CapabilitySet::FSETID)?)
    }

    /// Whether the caller may have the file open for writing.
    ///
    /// Without open requests, its descriptors show that. If they are not visible, the permission to open the file
    /// decides: such a caller could drop the bits by a write.
    fn may_be_writing(&self, caller: Caller, inode: &Inode, stat: &Stat) -> Result<bool> {
        if !self.content.opens.are_unknown() {
            return Ok(inode.has_writers());
        }
        if let Some(is_writer) = self.content.opens.is_writer(caller, inode) {
            return Ok(is_writer);
        }
        if has_capability(caller, CapabilitySet::DAC_OVERRIDE)? {
            return Ok(true);
        }
        let acl = match sys::xattr::get((*access_path(inode)?).as_fd(), ACL_ACCESS) {
            Err(error) if error.errno() == Errno::OPNOTSUPP => None,
            found => found?,
        };
        let is_user = |uid| self.cx.is_user(caller, uid);
        let is_member = |gid| self.cx.is_member(caller, gid);
        permits_write(stat, acl.as_deref(), is_user, is_member)
    }
}

/// Removes mode bits and the file capabilities from an object that is not a directory.
fn drop_privileges(target: &OwnedFd, bits: u32) -> Result<()> {
    let stat = sys::stat::stat_fd(target)?;
    if stat.kind() == FileKind::Directory {
        return Ok(());
    }
    if stat.perm() & bits != 0 {
        sys::attr::chmod(target.as_fd(), stat.perm() & !bits)?;
    }
    let capabilities = match sys::xattr::get(target.as_fd(), CAPABILITY) {
        Err(error) if error.errno() == Errno::OPNOTSUPP => None,
        found => found?,
    };
    // Like the kernel, retain an empty value, which setxattr(2) accepts and which grants nothing.
    if capabilities.is_none_or(|value| value.is_empty()) {
        return Ok(());
    }
    match sys::xattr::remove(target.as_fd(), CAPABILITY) {
        Err(error) if !matches!(error.errno(), Errno::NODATA | Errno::OPNOTSUPP) => Err(error),
        _ => Ok(()),
    }
}
