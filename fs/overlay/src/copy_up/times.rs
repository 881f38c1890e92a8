//! Preservation of times across a copy-up.
//!
//! A copy-up is invisible to processes, so it must not change the times of the object or of the directory that gets the
//! copy's name. Modification times are restored on disk. Change times cannot be set, so the mount reports the old one
//! until a real change, or until the unmount. Otherwise tar(1), for example, would report that a directory changed
//! while it was read.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::inode::{CopyingTimes, Inode, InodeTable};
use crate::reach::{Context, access_path_and_stat, stat_on_disk};
use cowl_layers::error::Result;
use cowl_layers::layer::LayerDir;
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::stat::Stat;

/// Runs `change` on an object without exposing a new ctime.
///
/// `change` gets a descriptor and the attributes of the object.
pub(crate) fn preserve_ctime<T>(
    cx: &Context<'_>,
    inodes: &InodeTable,
    inode: &Arc<Inode>,
    change: impl FnOnce(&OwnedFd, &Stat) -> Result<T>,
) -> Result<T> {
    let (fd, stat) = access_path_and_stat(inode)?;
    preserve(cx, inodes, inode, (&stat, Shown::Ctime), || {
        change(&fd, &stat)
    })
}

/// Runs `change` in a directory without exposing new times.
///
/// `dir` is the location of the directory in the upper layer. The caller must hold the directory's `names`.
pub(crate) fn preserve_times<T>(
    cx: &Context<'_>,
    inodes: &InodeTable,
    inode: &Arc<Inode>,
    dir: &LayerDir,
    change: impl FnOnce(BorrowedFd<'_>) -> Result<T>,
) -> Result<T> {
    let fd = dir.fd()?;
    let fd = (*fd).as_fd();
    let before = sys::stat::stat_fd(fd)?;
    preserve(cx, inodes, inode, (&before, Shown::AllTimes), || {
        let done = change(fd)?;
        let restored = sys::attr::utimens(fd, SetTime::At(before.atime), SetTime::At(before.mtime));
        // Not an error of the operation: the change itself is complete.
        if let Err(error) = restored {
            log::warn!(
                "cannot restore the times of the directory with inode number {}: {error}",
                inode.ino()
            );
        }
        Ok(done)
    })
}

/// The times that a change does not expose.
#[derive(Clone, Copy)]
enum Shown {
    Ctime,
    AllTimes,
}

/// Runs `change` without exposing new times.
///
/// Concurrent readers get the old times while `change` runs.
fn preserve<T>(
    cx: &Context<'_>,
    inodes: &InodeTable,
    inode: &Arc<Inode>,
    (before, times): (&Stat, Shown),
    change: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let shown = inode.visible_ctime(before.ctime);
    let (mtime, restored) = match times {
        Shown::Ctime => (None, None),
        Shown::AllTimes => (Some(before.mtime), Some((before.atime, before.mtime))),
    };
    let copying = CopyingTimes {
        ctime: shown,
        restored,
    };
    inodes.note_copying(inode, Some(copying));
    let held = inode.override_times(shown, mtime);
    let done = change().inspect_err(|_| {
        inode.end_times_override(held);
        inodes.note_copying(inode, None);
    })?;
    match stat_on_disk(inode) {
        Ok(now) => {
            // The kernel does not expect these attributes to change by the request that caused the copy-up: the copy
            // can have another number of blocks, and a directory that becomes merged another link count.
            let cached = |stat: &Stat| (stat.dev, stat.ino, stat.size, stat.blocks);
            if cached(&now) != cached(before) {
                cx.note_stale(inode);
            }
            inodes.override_ctime(inode, now.ctime, shown);
        }
        // Not an error of the operation: the change itself is complete.
        Err(error) => {
            inode.end_times_override(held);
            log::warn!(
                "cannot preserve the change time of inode {}: {error}",
                inode.ino()
            );
        }
    }
    inodes.note_copying(inode, None);
    Ok(done)
}
