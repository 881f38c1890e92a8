//! Extended attributes: everything a user sets, nothing of the overlay's own.

use std::borrow::Cow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::thread::CapabilitySet;

use super::copy_up::CAPABILITY;
use super::{Caller, Op};
use crate::idmap::IdMap;
use crate::inode::{BARE, Inode};
use crate::reach;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::foreign::is_attribute;
use cowl_layers::layer::zero_device;
use cowl_layers::sys;

const ACCESS_ACL: &[u8] = b"system.posix_acl_access";
const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";

/// setxattr(2): only where there is none.
const XATTR_CREATE: u32 = 1;
/// setxattr(2): only where there is one.
const XATTR_REPLACE: u32 = 2;

fn is_acl(name: &[u8]) -> bool {
    name == ACCESS_ACL || name == DEFAULT_ACL
}

impl Op<'_> {
    /// The value of an attribute; ENODATA where there is none.
    pub fn get_xattr(&self, inode: &Arc<Inode>, name: &[u8]) -> Result<Vec<u8>> {
        self.refuse_acl(name)?;
        if sys::xattr::is_alias(name) {
            return Err(Error::Errno(Errno::NODATA));
        }
        let capability = name == CAPABILITY;
        // The kernel asks for it at the first write to every file.
        if capability && inode.is_bare() {
            return Err(Error::Errno(Errno::NODATA));
        }
        let before = inode.known();
        let space = self.cx.stack.space();
        let target = reach::access_path(inode)?;
        let disk = space.to_disk(name);
        if self.is_ours(target.as_fd(), &disk)? {
            return Err(Error::Errno(Errno::NODATA));
        }
        let value = self.value(target.as_fd(), &disk).inspect_err(|error| {
            if capability && error.errno() == Errno::NODATA {
                inode.found(before, BARE);
            }
        })?;
        let ids = &self.cx.behaviour;
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

    /// All names, each ended by a NUL, as listxattr(2) returns them. As on a plain folder, trusted.*
    /// shows to those alone who have CAP_SYS_ADMIN.
    pub fn list_xattr(&self, caller: Caller, inode: &Arc<Inode>) -> Result<Vec<u8>> {
        let space = self.cx.stack.space();
        let target = reach::access_path(inode)?;
        let mut names = Vec::new();
        // Asked only when there is something to show or not.
        let mut admin = None;
        for name in sys::xattr::list(target.as_fd())? {
            if self.is_ours(target.as_fd(), &name)? {
                continue;
            }
            if self.cx.behaviour.no_acl && is_acl(&name) {
                continue;
            }
            if let Some(shown) = space.to_mount(&name) {
                if shown.starts_with(b"trusted.") {
                    let asked = match admin {
                        Some(known) => known,
                        None => reach::is_capable(caller, CapabilitySet::SYS_ADMIN)?,
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

    /// Sets an attribute; `flags` as setxattr(2) takes them.
    pub fn set_xattr(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        name: &[u8],
        value: &[u8],
        flags: u32,
    ) -> Result<()> {
        self.refuse_acl(name)?;
        // It would be the ACL on one file system and a stray attribute on another.
        if sys::xattr::is_alias(name) {
            return Err(Error::Errno(Errno::OPNOTSUPP));
        }
        self.cx.stack.upper()?;
        if is_attribute(name) && self.cx.stack.reads_foreign() {
            return Err(Error::Errno(Errno::PERM));
        }
        let disk = self.cx.stack.space().to_disk(name);
        if !self.is_any_up(inode)? {
            self.refuse_set(inode, &disk, flags)?;
        }
        self.any_up(inode)?;
        let target = reach::access_path(inode)?;
        inode.unknown(BARE);
        let _after = Setting(inode);
        self.changing_xattrs(inode, &target, || {
            self.set_in_upper(caller, inode, &target, (name, &disk), value, flags)
        })
    }

    /// Fails as the call on the copy would, so that nothing is copied up for a call that changes nothing.
    fn refuse_set(&self, inode: &Arc<Inode>, disk: &[u8], flags: u32) -> Result<()> {
        let before = reach::access_path(inode)?;
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

    /// Runs a change of an object's attributes, which is in the upper. The kernel learns from the request
    /// that the change time moves; what it is not told is that blocks may come or go.
    fn changing_xattrs<T>(
        &self,
        inode: &Arc<Inode>,
        target: &OwnedFd,
        change: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let before = sys::stat::stat_fd(target)?.blocks;
        let done = change()?;
        inode.changed();
        if sys::stat::stat_fd(target)?.blocks != before {
            self.cx.note_stale(inode);
        }
        Ok(done)
    }

    /// Sets an attribute of an object in the upper. `names`: as the caller names it, and as it lies on disk.
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
            // What does not show is not there to a user.
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
        let ids = &self.cx.behaviour;
        let value = if ids.uids.is_identity() && ids.gids.is_identity() {
            Cow::Borrowed(value)
        } else {
            Cow::Owned(map_acl(value, IdMap::to_disk, &ids.uids, &ids.gids)?)
        };
        // As the caller: the file system drops setgid for one outside the file's group. It asks for the
        // caller's group or a supplementary one; here the one that counts takes the first's place.
        let stat = sys::stat::stat_fd(target)?;
        let mut who = self.cx.ids_on_disk(caller)?;
        if stat.perm() & 0o2000 != 0 && self.cx.is_member(caller, stat.gid)? {
            who.gid = stat.gid;
        }
        sys::creds::as_caller(who, || {
            sys::xattr::set_with(target.as_fd(), disk, &value, flags)
        })
    }

    /// Removes an attribute; ENODATA where there is none.
    pub fn remove_xattr(&self, inode: &Arc<Inode>, name: &[u8]) -> Result<()> {
        self.refuse_acl(name)?;
        self.cx.stack.upper()?;
        if sys::xattr::is_alias(name) {
            return Err(Error::Errno(Errno::NODATA));
        }
        // Nothing is copied up for what is not there.
        let disk = self.cx.stack.space().to_disk(name);
        let before = reach::access_path(inode)?;
        if self.is_ours(before.as_fd(), &disk)? {
            return Err(Error::Errno(Errno::NODATA));
        }
        match self.value(before.as_fd(), &disk) {
            // File systems take an ACL that is not there for removed.
            Err(error) if is_acl(name) && error.errno() == Errno::NODATA => return Ok(()),
            other => other.map(drop)?,
        }
        self.any_up(inode)?;
        let target = reach::access_path(inode)?;
        self.changing_xattrs(inode, &target, || sys::xattr::remove(target.as_fd(), &disk))
    }

    /// The value of an attribute on disk; ENODATA where there is none. A lower may lie on a file system that
    /// keeps none of this kind, and that must not show where the topmost layer's would keep it.
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

    /// Whether an attribute on disk has a user's name and yet no user set it: an escaped mark that goes
    /// with a device 0:0.
    fn is_ours(&self, fd: BorrowedFd<'_>, disk: &[u8]) -> Result<bool> {
        if is_attribute(disk) && self.cx.stack.reads_foreign() {
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
        if self.cx.behaviour.no_acl && is_acl(name) {
            return Err(Error::Errno(Errno::OPNOTSUPP));
        }
        Ok(())
    }
}

/// An attribute is being set: what was known of them before does not hold after it either.
struct Setting<'a>(&'a Inode);

impl Drop for Setting<'_> {
    fn drop(&mut self) {
        self.0.unknown(BARE);
    }
}

/// Translates the ids inside an ACL's value: a version word, then entries of tag, permissions and id
/// (the kernel's posix_acl_xattr.h).
fn map_acl(
    value: &[u8],
    map: impl Fn(&IdMap, u32) -> Option<u32>,
    uids: &IdMap,
    gids: &IdMap,
) -> Result<Vec<u8>> {
    const USER: u16 = 0x02;
    const GROUP: u16 = 0x08;
    let invalid = Error::Errno(Errno::INVAL);
    let (version, entries) = value.split_first_chunk::<4>().ok_or(invalid)?;
    let (entries, rest) = entries.as_chunks::<8>();
    if !rest.is_empty() {
        return Err(invalid);
    }
    let mut mapped = version.to_vec();
    for entry in entries {
        let [t0, t1, p0, p1, i0, i1, i2, i3] = *entry;
        let id = u32::from_le_bytes([i0, i1, i2, i3]);
        let id = match u16::from_le_bytes([t0, t1]) {
            USER => map(uids, id).ok_or(invalid)?,
            GROUP => map(gids, id).ok_or(invalid)?,
            _ => id,
        };
        mapped.extend_from_slice(&[t0, t1, p0, p1]);
        mapped.extend_from_slice(&id.to_le_bytes());
    }
    Ok(mapped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_inside_an_acl_are_mapped() {
        let map = IdMap::new(IdMap::parse("1000:0:10").unwrap(), None);
        let entry = |tag: u16, id: u32| {
            [
                &tag.to_le_bytes()[..],
                &7_u16.to_le_bytes(),
                &id.to_le_bytes(),
            ]
            .concat()
        };
        let acl = |user, group, other| {
            let parts = [entry(0x02, user), entry(0x08, group), entry(0x20, other)];
            [2_u32.to_le_bytes().to_vec(), parts.concat()].concat()
        };
        let (mount, disk) = (acl(1, 2, u32::MAX), acl(1001, 1002, u32::MAX));
        assert_eq!(map_acl(&mount, IdMap::to_disk, &map, &map).unwrap(), disk);
        let back = map_acl(&disk, |map, id| Some(map.to_mount(id)), &map, &map);
        assert_eq!(back.unwrap(), mount);
        assert!(map_acl(&disk[..7], IdMap::to_disk, &map, &map).is_err());
        assert!(map_acl(&acl(11, 0, 0), IdMap::to_disk, &map, &map).is_err());
    }
}
