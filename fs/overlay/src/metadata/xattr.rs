//! Extended attributes, without the overlay's own markers.

use std::borrow::Cow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::thread::CapabilitySet;

use super::acl::{is_acl, map_acl};
use super::capability;
use crate::content::OpenCounts;
use crate::copy_up::CopyUp;
use crate::idmap::IdMap;
use crate::inode::{Inode, NO_CAPABILITIES};
use crate::ledger::{Change, Intent};
use crate::reach::{Caller, Context, access_path, has_capability, lock_capabilities};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::CAPABILITY;
use cowl_layers::format::foreign::is_marker_xattr;
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
    pub(crate) opens: &'o OpenCounts,
}

impl Xattrs<'_> {
    /// Returns the value of an xattr; ENODATA if it does not exist.
    pub(crate) fn get(&self, inode: &Arc<Inode>, name: &[u8]) -> Result<Vec<u8>> {
        self.refuse_acl(name)?;
        if sys::xattr::is_alias(name) {
            return Err(Error::Errno(Errno::NODATA));
        }
        let capability = name == CAPABILITY;
        // The result is cached, because the kernel requests this xattr at the first write to every file.
        if capability && inode.facts().has_no_capabilities() {
            return Err(Error::Errno(Errno::NODATA));
        }
        let before = inode.facts().snapshot();
        let space = self.cx.stack.space();
        let target = access_path(inode)?;
        let disk = space.to_disk(name);
        if self.is_internal(target.as_fd(), &disk)? {
            return Err(Error::Errno(Errno::NODATA));
        }
        let value = self
            .read_value(target.as_fd(), &disk)
            .inspect_err(|error| {
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
        if name == CAPABILITY {
            return Ok(capability::to_mount(value, &ids.uids));
        }
        Ok(value)
    }

    /// Returns the names of all xattrs, each followed by a NUL, as listxattr(2) does.
    ///
    /// As on a plain directory, trusted.* is visible only to callers with CAP_SYS_ADMIN.
    pub(crate) fn list(&self, caller: Caller, inode: &Arc<Inode>) -> Result<Vec<u8>> {
        let space = self.cx.stack.space();
        let target = access_path(inode)?;
        let mut names = Vec::new();
        // Checked only if there is a trusted.* name.
        let mut has_sys_admin = None;
        for name in sys::xattr::list(target.as_fd())? {
            if self.is_internal(target.as_fd(), &name)? {
                continue;
            }
            if self.cx.options.no_acl && is_acl(&name) {
                continue;
            }
            if let Some(shown) = space.to_mount(&name) {
                if shown.starts_with(b"trusted.") {
                    let is_admin = match has_sys_admin {
                        Some(known) => known,
                        None => has_capability(caller, CapabilitySet::SYS_ADMIN)?,
                    };
                    has_sys_admin = Some(is_admin);
                    if !is_admin {
                        continue;
                    }
                }
                names.extend_from_slice(&shown);
                names.push(0);
            }
        }
        Ok(names)
    }

    /// Sets an xattr; `flags` are those of setxattr(2).
    pub(crate) fn set(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        name: &[u8],
        value: &[u8],
        flags: u32,
    ) -> Result<()> {
        self.refuse_acl(name)?;
        // This name is an alias of an ACL on some file systems, and an unrelated xattr on others.
        if sys::xattr::is_alias(name) {
            return Err(Error::Errno(Errno::OPNOTSUPP));
        }
        self.cx.stack.upper()?;
        if is_marker_xattr(name) && self.cx.stack.has_foreign_layers() {
            return Err(Error::Errno(Errno::PERM));
        }
        let disk = self.cx.stack.space().to_disk(name);
        let value = self.value_to_disk(name, value)?;
        let is_add = flags & XATTR_CREATE != 0;
        if is_add && self.cx.is_resumed(Change::AddXattr) && self.get(inode, name).is_ok() {
            return Ok(());
        }
        if !self.copy_up.is_in_upper(inode)? {
            self.refuse_set(inode, &disk, flags)?;
        }
        self.copy_up.copy_up_any(inode)?;
        let target = access_path(inode)?;
        inode.facts().forget(NO_CAPABILITIES);
        let _forget_after = ForgetNoCapabilities(inode);
        let set = || {
            let _locked = (disk == CAPABILITY).then(|| lock_capabilities(inode));
            self.set_in_upper(caller, inode, &target, (name, &disk), &value, flags)
        };
        self.change_xattrs(inode, &target, || {
            // Without the flag, the change can be repeated. With it, one that fails must not be taken for one that was
            // made: the value must be absent before.
            if is_add && self.get(inode, name).is_err() {
                self.cx.commit(&intent(Change::AddXattr, inode), set)
            } else {
                set()
            }
        })
    }

    /// Returns the error that setting the xattr on the copy would return, before anything is copied up.
    fn refuse_set(&self, inode: &Arc<Inode>, disk: &[u8], flags: u32) -> Result<()> {
        let before = access_path(inode)?;
        let is_hidden = self.is_internal(before.as_fd(), disk)?;
        let exists = self.exists(before.as_fd(), disk)? && !is_hidden;
        if exists && flags & XATTR_CREATE != 0 {
            return Err(Error::Errno(Errno::EXIST));
        }
        if !exists && flags & XATTR_REPLACE != 0 {
            return Err(Error::Errno(Errno::NODATA));
        }
        Ok(())
    }

    /// Runs a change of the xattrs of an object in the upper layer.
    ///
    /// The kernel invalidates the cached change time by itself. If the number of blocks changes, the object is listed
    /// as stale.
    fn change_xattrs<T>(
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

    /// Sets an xattr of an object in the upper layer.
    ///
    /// `name` is the caller's name of the xattr, `disk` the stored one. `value` is the value to store.
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
        if self.is_internal(target.as_fd(), disk)? {
            // To the caller, a hidden xattr does not exist.
            if flags & XATTR_REPLACE != 0 {
                return Err(Error::Errno(Errno::NODATA));
            }
            flags &= !XATTR_CREATE;
        }
        if !is_acl(name) {
            sys::xattr::set_with(target.as_fd(), disk, value, flags)?;
            if disk == self.cx.stack.space().escaped_opaque().as_bytes() && inode.is_dir() {
                zero_device::give_opaque_to_user(target.as_fd(), self.cx.stack.space())?;
            }
            return Ok(());
        }
        // Set the ACL with the caller's ids: the file system drops setgid for a caller outside the file's group. It
        // also checks the supplementary groups, which are not set here; so for a member, use the file's group as the
        // primary one.
        let stat = sys::stat::stat_fd(target)?;
        let mut ids_on_disk = self.cx.ids_on_disk(caller);
        if stat.perm() & 0o2000 != 0 && self.cx.is_member(caller, stat.gid)? {
            ids_on_disk.gid = stat.gid;
        }
        sys::creds::as_caller(ids_on_disk, || {
            sys::xattr::set_with(target.as_fd(), disk, value, flags)
        })
    }

    /// Returns the value to store: an ACL or file capabilities with the ids on disk; EINVAL or EPERM if it has an id that
    /// is not mapped.
    fn value_to_disk<'v>(&self, name: &[u8], value: &'v [u8]) -> Result<Cow<'v, [u8]>> {
        let ids = self.cx.options;
        if name == CAPABILITY {
            return capability::to_disk(value, &ids.uids);
        }
        if !is_acl(name) || (ids.uids.is_identity() && ids.gids.is_identity()) {
            return Ok(Cow::Borrowed(value));
        }
        map_acl(value, IdMap::to_disk, &ids.uids, &ids.gids).map(Cow::Owned)
    }

    /// Removes an xattr; ENODATA if it does not exist.
    pub(crate) fn remove(&self, inode: &Arc<Inode>, name: &[u8]) -> Result<()> {
        self.refuse_acl(name)?;
        self.cx.stack.upper()?;
        if sys::xattr::is_alias(name) {
            return Err(Error::Errno(Errno::NODATA));
        }
        if self.cx.is_resumed(Change::RemoveXattr)
            && self.get(inode, name) == Err(Error::Errno(Errno::NODATA))
        {
            return Ok(());
        }
        // Do not copy up the object for an xattr that does not exist.
        let disk = self.cx.stack.space().to_disk(name);
        let before = access_path(inode)?;
        if self.is_internal(before.as_fd(), &disk)? {
            return Err(Error::Errno(Errno::NODATA));
        }
        if !self.exists(before.as_fd(), &disk)? {
            // On a plain directory, too, the removal of an absent ACL succeeds.
            return if is_acl(name) {
                Ok(())
            } else {
                Err(Error::Errno(Errno::NODATA))
            };
        }
        self.copy_up.copy_up_any(inode)?;
        let target = access_path(inode)?;
        let intent = intent(Change::RemoveXattr, inode);
        self.change_xattrs(inode, &target, || {
            let _locked = (disk == CAPABILITY).then(|| lock_capabilities(inode));
            self.cx
                .commit(&intent, || sys::xattr::remove(target.as_fd(), &disk))
        })?;
        if disk == CAPABILITY && self.opens.may_have_writers(inode) {
            inode.flags().set_capabilities_removed();
        }
        Ok(())
    }

    /// Whether an xattr exists on disk, even if its value cannot be read.
    fn exists(&self, fd: BorrowedFd<'_>, disk: &[u8]) -> Result<bool> {
        match self.read_value(fd, disk) {
            Ok(_) => Ok(true),
            Err(error) if sys::xattr::is_invalid(disk, &error) => Ok(true),
            Err(error) if error.errno() == Errno::NODATA => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Returns the value of an xattr on disk; ENODATA if it does not exist.
    ///
    /// If a lower layer's file system does not support this kind of xattr but the topmost layer's does, also returns
    /// ENODATA.
    fn read_value(&self, fd: BorrowedFd<'_>, disk: &[u8]) -> Result<Vec<u8>> {
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

    /// Whether an xattr on disk was set by the overlay, although it has the stored name of a user's xattr.
    ///
    /// Such are the escaped markers of devices 0:0, and fuse-overlayfs's markers where the mount reads them.
    fn is_internal(&self, fd: BorrowedFd<'_>, disk: &[u8]) -> Result<bool> {
        if is_marker_xattr(disk) && self.cx.stack.has_foreign_layers() {
            return Ok(true);
        }
        let space = self.cx.stack.space();
        let escaped = [space.escaped_whiteout(), space.escaped_opaque()];
        if !escaped.iter().any(|marker| disk == marker.as_bytes()) {
            return Ok(false);
        }
        let internal = space.internal_xattr(|marker| sys::xattr::get(fd, marker.as_bytes()))?;
        Ok(internal.is_some_and(|internal| disk == internal.as_bytes()))
    }

    /// Returns EOPNOTSUPP for an ACL if the mount has ACLs disabled.
    fn refuse_acl(&self, name: &[u8]) -> Result<()> {
        if self.cx.options.no_acl && is_acl(name) {
            return Err(Error::Errno(Errno::OPNOTSUPP));
        }
        Ok(())
    }
}

/// Returns the intent of a change of an xattr.
fn intent(change: Change, inode: &Inode) -> Intent<'static> {
    Intent {
        change,
        parents: (inode.ino(), 0),
        names: (b"", b""),
        object: inode.ino(),
    }
}

/// A guard that invalidates the cached fact [`NO_CAPABILITIES`] when the setting of an xattr ends.
///
/// A concurrent reader may have cached the fact while the xattr was being set.
struct ForgetNoCapabilities<'a>(&'a Inode);

impl Drop for ForgetNoCapabilities<'_> {
    fn drop(&mut self) {
        self.0.facts().forget(NO_CAPABILITIES);
    }
}
