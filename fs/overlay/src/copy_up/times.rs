//! Times over a copy-up. A copy-up changes nothing that a process sees, so no time may change by it: neither
//! those of the directory in which the copy gets its name, nor the object's own. Modification times are set
//! back. Change times cannot be, so the old one is shown until a real change, or for as long as the mount
//! lives. Without this, tar(1) reports that a directory changed while it was read.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::inode::{Inode, InodeTable};
use crate::reach::{Context, access_path_and_stat, stat_on_disk};
use cowl_layers::error::Result;
use cowl_layers::layer::LayerDir;
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::stat::{Stat, Time};

/// Runs `change` on an object without exposing a new ctime. `change` gets the object's descriptor and
/// attributes.
pub(crate) fn preserving_ctime<T>(
    cx: &Context<'_>,
    inodes: &InodeTable,
    inode: &Arc<Inode>,
    change: impl FnOnce(&OwnedFd, &Stat) -> Result<T>,
) -> Result<T> {
    let (fd, stat) = access_path_and_stat(inode)?;
    preserving(cx, inodes, inode, (&stat, None), || change(&fd, &stat))
}

/// Runs `change` in a directory, whose location in the upper is `dir`, without exposing new times. The caller
/// must hold the directory's `names`.
pub(crate) fn preserving_times<T>(
    cx: &Context<'_>,
    inodes: &InodeTable,
    inode: &Arc<Inode>,
    dir: &LayerDir,
    change: impl FnOnce(BorrowedFd<'_>) -> Result<T>,
) -> Result<T> {
    let fd = dir.fd()?;
    let fd = (*fd).as_fd();
    let before = sys::stat::stat_fd(fd)?;
    let shown = (&before, Some(before.mtime));
    preserving(cx, inodes, inode, shown, || {
        let done = change(fd)?;
        let restored = sys::attr::utimens(fd, SetTime::At(before.atime), SetTime::At(before.mtime));
        // The change is made: an error here would report that it is not.
        if let Err(error) = restored {
            log::warn!("cannot restore the times of {dir:?}: {error}");
        }
        Ok(done)
    })
}

/// Runs `change` without exposing a new ctime, nor a new mtime where one is given. Concurrent readers get the
/// times that hold before and after.
fn preserving<T>(
    cx: &Context<'_>,
    inodes: &InodeTable,
    inode: &Arc<Inode>,
    (before, mtime): (&Stat, Option<Time>),
    change: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let shown = inode.visible_ctime(before.ctime);
    let held = inode.override_times(shown, mtime);
    let done = change().inspect_err(|_| {
        inode.end_times_override(held);
    })?;
    match stat_on_disk(inode) {
        Ok(now) => {
            // The request that caused this does not imply it to the kernel: a copy has other blocks, and a
            // directory that now lies in two layers another link count.
            let seen = |stat: &Stat| (stat.dev, stat.ino, stat.size, stat.blocks);
            if seen(&now) != seen(before) {
                cx.note_stale(inode);
            }
            inodes.override_ctime(inode, now.ctime, shown);
        }
        // The change is made: an error here would report that it is not.
        Err(error) => {
            inode.end_times_override(held);
            log::warn!("the change time of {} moves: {error}", inode.ino());
        }
    }
    Ok(done)
}
