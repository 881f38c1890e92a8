//! Xattrs: all that users set, and none of the overlay's markers.

use std::borrow::Cow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::thread::CapabilitySet;

use super::acl::{is_acl, map_acl};
use crate::copy_up::CopyUp;
use crate::idmap::IdMap;
use crate::inode::{Inode, NO_CAPABILITIES};
use crate::reach::{Caller, Context, access_path, has_capability};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::CAPABILITY;
use cowl_layers::format::foreign::is_attribute;
use cowl_layers::layer::zero_device;
use cowl_layers::sys;

/// setxattr(2): fail if the xattr exists.
const XATTR_CREATE: u32 = 1;
/// setxattr(2): fail if the xattr does not exist.
const XATTR_REPLACE: u32 = 2;

/// Access to xattrs.
#[derive(Clone, Copy)]
pub(crate) struct Xattrs<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) copy_up: CopyUp<'o>,
}

impl Xattrs<'_> {
    /// Returns the value of an xattr; ENODATA if it does not exist.
    pub(crate) fn get(&self, inode: &Arc<Inode>, name: &[u8]) -> Result<Vec<u8>> {
        self.refuse_acl(name)?;
        if sys::xattr::is_alias(name) {
            return Err(Error::Errno(Errno::NODATA));
        }
        let capability = name == CAPABILITY;
        // The kernel queries it at the first write to every file.
        if capability && inode.facts().has_no_capabilities() {
            return Err(Error::Errno(Errno::NODATA));
        }
        let before = inode.facts().snapshot();
        let space = self.cx.stack.space();
        let target = access_path(inode)?;
        let disk = space.to_disk(name);
        if self.is_ours(target.as_fd(), &disk)? {
            return Err(Error::Errno(Errno::NODATA));
        }
        let value = self.value(target.as_fd(), &disk).inspect_err(|error| {
            if capability && error.errno() == Errno::NODATA {
                inode.facts().note(before, NO_CAPABILITIES);
            }
        })?;
        let ids = self.cx.options;
        if is_acl(name) && !(ids.uids.is_identity() && ids.gids.is_identity()) {
            return map_acl(
                &value,
                |map, id| Some(map.to_mount(id)),
                &ids.uids,
                &ids.gids,
            );
        }
        Ok(value)
    }

    /// Returns all names, each followed by a NUL, as listxattr(2) does. As on a plain directory, trusted.* is
    /// shown only to callers with CAP_SYS_ADMIN.
    pub(crate) fn list(&self, caller: Caller, inode: &Arc<Inode>) -> Result<Vec<u8>> {
        let space = self.cx.stack.space();
        let target = access_path(inode)?;
        let mut names = Vec::new();
        // Checked only if there is a trusted.* name.
        let mut admin = None;
        for name in sys::xattr::list(target.as_fd())? {
            if self.is_ours(target.as_fd(), &name)? {
                continue;
            }
            if self.cx.options.no_acl && is_acl(&name) {
                continue;
            }
            if let Some(shown) = space.to_mount(&name) {
                if shown.starts_with(b"trusted.") {
                    let asked = match admin {
                        Some(known) => known,
                        None => has_capability(caller, CapabilitySet::SYS_ADMIN)?,
                    };
                    admin = Some(asked);
                    if !asked {
                        continue;
                    }
                }
                names.extend_from_slice(&shown);
                names.push(0);
            }
        }
        Ok(names)
    }

    /// Sets an xattr; `flags` as setxattr(2) takes them.
    pub(crate) fn set(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        name: &[u8],
        value: &[u8],
        flags: u32,
    ) -> Result<()> {
        self.refuse_acl(name)?;
        // It would be the ACL on one file system and an unrelated xattr on another.
        if sys::xattr::is_alias(name) {
            return Err(Error::Errno(Errno::OPNOTSUPP));
        }
        self.cx.stack.upper()?;
        if is_attribute(name) && self.cx.stack.has_foreign_layers() {
            return Err(Error::Errno(Errno::PERM));
        }
        let disk = self.cx.stack.space().to_disk(name);
        if !self.copy_up.is_any_up(inode)? {
            self.refuse_set(inode, &disk, flags)?;
        }
        self.copy_up.any_up(inode)?;
        let target = access_path(inode)?;
        inode.facts().forget(NO_CAPABILITIES);
        let _after = Setting(inode);
        self.changing_xattrs(inode, &target, || {
            self.set_in_upper(caller, inode, &target, (name, &disk), value, flags)
        })
    }

    /// Fails as the call on the copy would, so that nothing is copied up for a call that changes nothing.
    fn refuse_set(&self, inode: &Arc<Inode>, disk: &[u8], flags: u32) -> Result<()> {
        let before = access_path(inode)?;
        let hidden = self.is_ours(before.as_fd(), disk)?;
        let there = match self.value(before.as_fd(), disk) {
            Ok(_) => !hidden,
            Err(error) if error.errno() == Errno::NODATA => false,
            Err(error) => return Err(error),
        };
        if there && flags & XATTR_CREATE != 0 {
            return Err(Error::Errno(Errno::EXIST));
        }
        if !there && flags & XATTR_REPLACE != 0 {
            return Err(Error::Errno(Errno::NODATA));
        }
        Ok(())
    }

    /// Runs a change of the xattrs of an object in the upper. The kernel learns from the request that the change
    /// time moves, but not that the number of blocks may change.
    fn changing_xattrs<T>(
        &self,
        inode: &Arc<Inode>,
        target: &OwnedFd,
        change: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let before = sys::stat::stat_fd(target)?.blocks;
        let done = change()?;
        inode.note_change();
        if sys::stat::stat_fd(target)?.blocks != before {
            self.cx.note_stale(inode);
        }
        Ok(done)
    }

    /// Sets an xattr of an object in the upper. `name`: as the caller names it; `disk`: as it is stored.
    fn set_in_upper(
        &self,
        caller: Caller,
        inode: &Inode,
        target: &OwnedFd,
        (name, disk): (&[u8], &[u8]),
        value: &[u8],
        flags: u32,
    ) -> Result<()> {
        let mut flags = flags;
        if self.is_ours(target.as_fd(), disk)? {
            // An xattr that does not show does not exist to a user.
            if flags & XATTR_REPLACE != 0 {
                return Err(Error::Errno(Errno::NODATA));
            }
            flags &= !XATTR_CREATE;
        }
        if disk == self.cx.stack.space().escaped_opaque().as_bytes() && inode.is_dir() {
            zero_device::opaque_is_a_users(target.as_fd(), self.cx.stack.space())?;
        }
        if !is_acl(name) {
            return sys::xattr::set_with(target.as_fd(), disk, value, flags);
        }
        let ids = self.cx.options;
        let value = if ids.uids.is_identity() && ids.gids.is_identity() {
            Cow::Borrowed(value)
        } else {
            Cow::Owned(map_acl(value, IdMap::to_disk, &ids.uids, &ids.gids)?)
        };
        // As the caller: the file system drops setgid for a caller outside the file's group. It checks the
        // caller's group and the supplementary ones; here the matching one replaces the first.
        let stat = sys::stat::stat_fd(target)?;
        let mut who = self.cx.ids_on_disk(caller)?;
        if stat.perm() & 0o2000 != 0 && self.cx.is_member(caller, stat.gid)? {
            who.gid = stat.gid;
        }
        sys::creds::as_caller(who, || {
            sys::xattr::set_with(target.as_fd(), disk, &value, flags)
        })
    }

    /// Removes an xattr; ENODATA if it does not exist.
    pub(crate) fn remove(&self, inode: &Arc<Inode>, name: &[u8]) -> Result<()> {
        self.refuse_acl(name)?;
        self.cx.stack.upper()?;
        if sys::xattr::is_alias(name) {
            return Err(Error::Errno(Errno::NODATA));
        }
        // Nothing is copied up for an xattr that does not exist.
        let disk = self.cx.stack.space().to_disk(name);
        let before = access_path(inode)?;
        if self.is_ours(before.as_fd(), &disk)? {
            return Err(Error::Errno(Errno::NODATA));
        }
        match self.value(before.as_fd(), &disk) {
            // File systems succeed in removing an ACL that does not exist.
            Err(error) if is_acl(name) && error.errno() == Errno::NODATA => return Ok(()),
            other => other.map(drop)?,
        }
        self.copy_up.any_up(inode)?;
        let target = access_path(inode)?;
        self.changing_xattrs(inode, &target, || sys::xattr::remove(target.as_fd(), &disk))
    }

    /// Returns the value of an xattr on disk; ENODATA if it does not exist. A lower may lie on a file system
    /// without support for this kind, and that must not show if the topmost layer's supports it.
    fn value(&self, fd: BorrowedFd<'_>, disk: &[u8]) -> Result<Vec<u8>> {
        let unsupported = Error::Errno(Errno::OPNOTSUPP);
        match (
            sys::xattr::value(fd, disk),
            self.cx.stack.view().layers().first(),
        ) {
            (Err(error), Some(top)) if error == unsupported => {
                match sys::xattr::value(top.root_fd(), disk) {
                    Err(error) if error == unsupported => Err(error),
                    _ => Err(Error::Errno(Errno::NODATA)),
                }
            }
            (found, _) => found,
        }
    }

    /// Whether an xattr on disk has a user's name although no user set it: an escaped marker that belongs to a
    /// device 0:0.
    fn is_ours(&self, fd: BorrowedFd<'_>, disk: &[u8]) -> Result<bool> {
        if is_attribute(disk) && self.cx.stack.has_foreign_layers() {
            return Ok(true);
        }
        let space = self.cx.stack.space();
        let escaped = [space.escaped_whiteout(), space.escaped_opaque()];
        if !escaped.iter().any(|mark| disk == mark.as_bytes()) {
            return Ok(false);
        }
        let ours = space.not_a_users(|mark| sys::xattr::get(fd, mark.as_bytes()))?;
        Ok(ours.is_some_and(|ours| disk == ours.as_bytes()))
    }

    fn refuse_acl(&self, name: &[u8]) -> Result<()> {
        if self.cx.options.no_acl && is_acl(name) {
            return Err(Error::Errno(Errno::OPNOTSUPP));
        }
        Ok(())
    }
}

/// The time during which an xattr is set: a fact that was found out in it does not hold after it.
struct Setting<'a>(&'a Inode);

impl Drop for Setting<'_> {
    fn drop(&mut self) {
        self.0.facts().forget(NO_CAPABILITIES);
    }
}
