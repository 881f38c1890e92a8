//! Setuid and setgid bits at a change of a file's content, which are removed as they are for the caller on a
//! plain directory.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::thread::CapabilitySet;

use crate::inode::Inode;
use crate::reach::{Caller, Context, has_capability};
use cowl_layers::error::Result;
use cowl_layers::sys;

/// The mode bits with which a program runs as another user or group: S_ISUID and S_ISGID.
pub const SETID: u32 = 0o6000;

/// Sets a file's size. Done with the caller's ids, and without the right to keep the bits: a layer on another
/// FUSE mount gets the caller's ids, but the crate does not pass the kernel's request to drop the bits on.
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
        sys::creds::as_caller(cx.ids_on_disk(caller)?, || {
            as_unprivileged(cx, caller, inode, fd, || sys::attr::truncate(fd, size))
        })?;
    }
    // The new content is written back early.
    if cx.early()?.after_cut(size) {
        inode.flags().set_truncated();
    }
    Ok(())
}

/// Runs a change at which setuid and setgid may be removed, as the layer's file system runs it for the caller.
pub(crate) fn for_caller<T>(
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
/// The kernel caches the mode beyond a write and runs programs by the cached one, so the object is listed as
/// stale if bits may have been removed.
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
    // Without the right to execute, setgid marks a file for mandatory locking, which a member may keep.
    let keeps = stat.perm() & 0o2010 == 0o2000 && cx.is_member(caller, stat.gid)?;
    let own = cx.ids_on_disk(caller)?.gid;
    sys::creds::dropping_setid(if keeps { stat.gid } else { own }, change)
}

/// Whether a change by this caller leaves setuid and setgid as they are.
fn keeps_setid(caller: Caller, fd: &OwnedFd) -> Result<bool> {
    let perm = sys::stat::stat_fd(fd)?.perm();
    Ok(perm & SETID == 0 || has_capability(caller, CapabilitySet::FSETID)?)
}
