//! A copy-up changes nothing that anybody sees, so no time may move by it: not those of the folder in
//! which the copy gets its name, and not the object's own. Modification times are put back; change
//! times can't be, so the old one is shown for as long as the mount lives and nothing really changes.
//! Without this, tar(1) says that a folder changed as it read it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::Op;
use crate::inode::Inode;
use crate::reach;
use cowl_layers::error::Result;
use cowl_layers::layer::LayerDir;
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::stat::{Stat, Time};

impl Op<'_> {
    /// Makes a change of an object that is none to its users. `change` is told where it lies now.
    pub(super) fn keeping_ctime<T>(
        &self,
        inode: &Arc<Inode>,
        change: impl FnOnce(&OwnedFd, &Stat) -> Result<T>,
    ) -> Result<T> {
        let (fd, stat) = reach::access_path_and_stat(inode)?;
        self.keeping(inode, &stat, None, || change(&fd, &stat))
    }

    /// The same, with a modification time that is put back before the change ends. Whoever asks meanwhile
    /// is told what holds before and after.
    fn keeping<T>(
        &self,
        inode: &Arc<Inode>,
        was: &Stat,
        mtime: Option<Time>,
        change: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let shown = inode.shown_ctime(was.ctime);
        let before = inode.hold_times(shown, mtime);
        let done = change().inspect_err(|_| {
            inode.hold_instead(before);
        })?;
        match reach::stat_on_disk(inode) {
            Ok(now) => {
                // The request that needed this says nothing of it to the kernel: a copy has other blocks, and
                // a directory that came to lie in two layers another link count.
                let seen = |stat: &Stat| (stat.dev, stat.ino, stat.size, stat.blocks);
                if seen(&now) != seen(was) {
                    self.cx.note_stale(inode);
                }
                self.overlay.inodes.hold_ctime(inode, now.ctime, shown);
            }
            // The change is made: an error here would tell that it is not.
            Err(error) => {
                inode.hold_instead(before);
                log::warn!("the change time of {} moves: {error}", inode.ino());
            }
        }
        Ok(done)
    }

    /// Makes a change in a folder, whose place in the upper is `dir`, that is none to its users. The
    /// folder's `names` are held.
    pub(super) fn keeping_times<T>(
        &self,
        inode: &Arc<Inode>,
        dir: &LayerDir,
        change: impl FnOnce(BorrowedFd<'_>) -> Result<T>,
    ) -> Result<T> {
        let fd = dir.fd()?;
        let fd = (*fd).as_fd();
        let before = sys::stat::stat_fd(fd)?;
        self.keeping(inode, &before, Some(before.mtime), || {
            let done = change(fd)?;
            let back = sys::attr::utimens(fd, SetTime::At(before.atime), SetTime::At(before.mtime));
            // The change is made: an error here would tell that it is not.
            if let Err(error) = back {
                log::warn!("cannot put the times of {dir:?} back: {error}");
            }
            Ok(done)
        })
    }
}
