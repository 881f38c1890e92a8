//! From an inode to its object on disk.
//!
//! Neither reading attributes nor opening holds a lock that keeps the object's name in place: a rename
//! may move it between the time when its location is read and the time when it is used. Then the location
//! is read again.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::inode::{FileState, Inode};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::sys;
use cowl_layers::sys::stat::Stat;

/// How often a location is read again.
const ATTEMPTS: usize = 8;

/// The outcome of one attempt to use a file's location.
pub(crate) enum Attempt<T> {
    /// It led to the object.
    Done(T),
    /// It led to another object.
    OtherObject,
    /// It led nowhere. The error is returned unless another attempt succeeds.
    Moved(Error),
}

/// Runs `attempt` on the location of a file until it is the file's own; ESTALE, or the last
/// [`Attempt::Moved`], after too many attempts.
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

/// Returns an object's attributes on disk, unmodified.
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
    // Its name was moved meanwhile, or it has none.
    Ok(access_path_and_stat(inode)?.1)
}

/// Opens a file's content where it lies now.
pub(crate) fn open_content(inode: &Inode, access: OFlags) -> Result<OwnedFd> {
    match open_content_with(inode, access) {
        // O_NOATIME is allowed to the file's owner alone. The caller of the mount is the owner there, but
        // the owner on disk can be outside this process's user namespace.
        Err(error) if error.errno() == Errno::PERM && access.contains(OFlags::NOATIME) => {
            open_content_with(inode, access - OFlags::NOATIME)
        }
        done => done,
    }
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
                // It may be the object that took the name that could not be opened: a whiteout gives ENXIO.
                let now = inode.file()?;
                let same = now.loc.is_same_location(&file.loc)
                    && now.anchor.is_some() == file.anchor.is_some();
                if same && !error.is_absent() {
                    return Err(error);
                }
                Ok(Attempt::Moved(error))
            }
        }
    })
}
