//! Access from an inode to its object on disk.
//!
//! Operations that read attributes or open a file do not lock the object's name. A rename can therefore race with them:
//! it may move the object after they read its location and before they use it. They detect this and retry with the
//! new location.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::inode::{FileState, Inode};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::sys;
use cowl_layers::sys::stat::Stat;

/// The maximum number of attempts to use a location.
const ATTEMPTS: usize = 8;

/// The outcome of one attempt to use a file's location.
pub(crate) enum Attempt<T> {
    /// The location was valid.
    Done(T),
    /// The location refers to another object now.
    OtherObject,
    /// The location does not exist any more. The error is returned if no further attempt succeeds.
    Moved(Error),
}

/// Runs `attempt` with the current state of a file until it returns [`Attempt::Done`].
///
/// Fails with ESTALE, or with the error of the last [`Attempt::Moved`], after [`ATTEMPTS`] attempts.
pub(crate) fn retry_while_moved<T>(
    inode: &Inode,
    mut attempt: impl FnMut(FileState) -> Result<Attempt<T>>,
) -> Result<T> {
    let mut last = Error::Errno(Errno::STALE);
    for _ in 0..ATTEMPTS {
        match attempt(inode.file()?)? {
            Attempt::Done(done) => return Ok(done),
            Attempt::OtherObject => {}
            Attempt::Moved(error) => last = error,
        }
    }
    Err(last)
}

/// Returns an O_PATH descriptor of an object of any type.
pub(crate) fn access_path(inode: &Inode) -> Result<Arc<OwnedFd>> {
    access_path_and_stat(inode).map(|(fd, _)| fd)
}

/// Returns an O_PATH descriptor of an object of any type, and its attributes on disk.
pub(crate) fn access_path_and_stat(inode: &Inode) -> Result<(Arc<OwnedFd>, Stat)> {
    let with_stat = |fd: Arc<OwnedFd>| {
        let stat = sys::stat::stat_fd(&*fd)?;
        Ok((fd, stat))
    };
    if inode.is_dir() {
        return with_stat(inode.dir()?.top()?.fd()?);
    }
    retry_while_moved(inode, |file| {
        if let Some(anchor) = file.anchor {
            return with_stat(anchor).map(Attempt::Done);
        }
        match file.loc.open_path() {
            Ok(fd) => {
                let found = with_stat(Arc::new(fd))?;
                if found.1.ino == file.identity.ino {
                    Ok(Attempt::Done(found))
                } else {
                    Ok(Attempt::OtherObject)
                }
            }
            Err(error) if error.is_absent() => Ok(Attempt::Moved(error)),
            Err(error) => Err(error),
        }
    })
}

/// Returns the attributes of an object on disk, unmodified.
pub(crate) fn stat_on_disk(inode: &Inode) -> Result<Stat> {
    if !inode.is_dir() {
        let file = inode.file()?;
        if file.anchor.is_none()
            && let Ok(stat) = file.loc.stat()
            && stat.ino == file.identity.ino
        {
            return Ok(stat);
        }
    }
    // The name was moved by a concurrent rename, or the object has none.
    Ok(access_path_and_stat(inode)?.1)
}

/// Opens the content of a file at its current location.
pub(crate) fn open_content(inode: &Inode, access: OFlags) -> Result<OwnedFd> {
    match open_content_with(inode, access) {
        // Only the owner of a file may use O_NOATIME. The caller is the owner on the mount, but the owner on disk can
        // be outside of this process's user namespace.
        Err(error) if error.errno() == Errno::PERM && access.contains(OFlags::NOATIME) => {
            open_content_with(inode, access - OFlags::NOATIME)
        }
        done => done,
    }
}

/// Whether another object has the name of a file. That happens in live layers, to which another mount writes.
fn is_replaced(file: &FileState) -> bool {
    file.data.is_none()
        && file.anchor.is_none()
        && file
            .loc
            .stat()
            .is_ok_and(|stat| stat.ino != file.identity.ino)
}

fn open_content_with(inode: &Inode, access: OFlags) -> Result<OwnedFd> {
    retry_while_moved(inode, |file| {
        let opened = match (&file.data, &file.anchor) {
            (None, Some(anchor)) => sys::content::reopen((**anchor).as_fd(), access),
            _ => file.data_loc().open(access),
        };
        match opened {
            Ok(fd) => {
                let own = file.data.is_some()
                    || file.anchor.is_some()
                    || sys::stat::stat_fd(&fd)?.ino == file.identity.ino;
                Ok(if own {
                    Attempt::Done(fd)
                } else {
                    Attempt::OtherObject
                })
            }
            Err(error) => {
                // The error may be about another object that has the name now: opening a whiteout fails with ENXIO.
                let now = inode.file()?;
                let same = now.loc.is_same_location(&file.loc)
                    && now.anchor.is_some() == file.anchor.is_some();
                if is_replaced(&file) {
                    return Ok(Attempt::OtherObject);
                }
                if same && !error.is_absent() {
                    return Err(error);
                }
                Ok(Attempt::Moved(error))
            }
        }
    })
}
