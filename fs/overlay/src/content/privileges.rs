//! Removal of setuid and setgid when a file's content changes, as on a plain directory.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::thread::CapabilitySet;

use crate::inode::Inode;
use crate::reach::{Caller, Context, has_capability};
use cowl_layers::error::Result;
use cowl_layers::sys;

/// The mode bits S_ISUID and S_ISGID.
pub const SETID: u32 = 0o6000;

/// Sets a file's size.
///
/// Unless the caller may keep setuid and setgid, the system call runs with the caller's ids and without
/// CAP_FSETID. A layer on another FUSE mount then sees the caller's ids; `fuser` does not forward the kernel's request
/// to drop the bits.
pub(crate) fn truncate(
    cx: &Context<'_>,
    caller: Caller,
    inode: &Arc<Inode>,
    fd: &OwnedFd,
    size: u64,
) -> Result<()> {
    if keeps_setid(caller, fd)? {
        sys::attr::truncate(fd, size)?;
    } else {
        sys::creds::as_caller(cx.ids_on_disk(caller), || {
            as_unprivileged(cx, caller, inode, fd, || sys::attr::truncate(fd, size))
        })?;
    }
    // A file that was truncated is written back early, at its close.
    if cx.early()?.after_cut(size) {
        inode.flags().set_truncated();
    }
    Ok(())
}

/// Runs a change that removes setuid and setgid unless the caller has CAP_FSETID.
pub(crate) fn change_for_caller<T>(
    cx: &Context<'_>,
    caller: Caller,
    inode: &Arc<Inode>,
    fd: &OwnedFd,
    change: impl FnOnce() -> Result<T>,
) -> Result<T> {
    if keeps_setid(caller, fd)? {
        return change();
    }
    as_unprivileged(cx, caller, inode, fd, change)
}

/// Runs a change of a file's content for a caller without CAP_FSETID.
///
/// If bits may have been removed, lists the object as stale: the kernel does not invalidate the cached mode after a
/// write, and uses it in execve(2).
pub(crate) fn as_unprivileged<T>(
    cx: &Context<'_>,
    caller: Caller,
    inode: &Arc<Inode>,
    fd: &OwnedFd,
    change: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let stat = sys::stat::stat_fd(fd)?;
    if stat.perm() & SETID == 0 {
        return change();
    }
    cx.note_stale(inode);
    // Without group execute permission, setgid marks a file for mandatory locking, and a member of the group may
    // keep it.
    let keeps = stat.perm() & 0o2010 == 0o2000 && cx.is_member(caller, stat.gid)?;
    let own = cx.ids_on_disk(caller).gid;
    sys::creds::dropping_setid(if keeps { stat.gid } else { own }, change)
}

/// Whether a change by this caller keeps setuid and setgid.
fn keeps_setid(caller: Caller, fd: &OwnedFd) -> Result<bool> {
    let perm = sys::stat::stat_fd(fd)?.perm();
    Ok(perm & SETID == 0 || has_capability(caller, CapabilitySet::FSETID)?)
}
