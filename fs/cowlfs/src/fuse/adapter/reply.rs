//! Replies that several handlers share.

use std::ffi::OsStr;
use std::sync::Arc;

use fuser::{FileAttr, INodeNo, ReplyEmpty, ReplyStatfs, ReplyXattr};

use super::convert::{to_errno, to_file_attr};
use rustix::fs::StatVfs;

use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::shown::Show as _;
use cowl_layers::sys::stat::Stat;
use cowl_overlay::inode::Inode;
use cowl_overlay::{Attr, Op};

/// Sends a reply without data.
pub(super) fn reply_empty(done: Result<()>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(to_errno(error)),
    }
}

/// Sends a reply to GETXATTR or LISTXATTR: the size of the value if `size` is zero, otherwise the value.
pub(super) fn reply_xattr(done: Result<Vec<u8>>, size: u32, reply: ReplyXattr) {
    match done {
        Err(error) => reply.error(to_errno(error)),
        Ok(value) if size == 0 => reply.size(u32::try_from(value.len()).unwrap_or(u32::MAX)),
        Ok(value) if value.len() > size as usize => reply.error(fuser::Errno::ERANGE),
        Ok(value) => reply.data(&value),
    }
}

/// Logs an error that is caused by a damaged layer or by the machine. Other errors are caused by the calling program.
pub(super) fn log_failure(request: &str, ino: INodeNo, name: Option<&OsStr>, error: Error) {
    if matches!(
        error,
        Error::Damaged(_) | Error::Errno(Errno::IO | Errno::MFILE)
    ) {
        match name {
            Some(name) => log::error!("{request} of inode {ino}, name {}: {error}", name.shown()),
            None => log::error!("{request} of inode {ino}: {error}"),
        }
    }
}

/// Logs a request that is refused because it has ended two daemons.
pub(super) fn log_refused(request: &str, ino: INodeNo, name: Option<&OsStr>) {
    const WHY: &str = "refused with EIO, because it has ended two daemons";
    match name {
        Some(name) => log::error!("{request} of inode {ino}, name {}: {WHY}", name.shown()),
        None => log::error!("{request} of inode {ino}: {WHY}"),
    }
}

/// Sends a reply to STATFS.
pub(super) fn reply_statfs(done: Result<StatVfs>, reply: ReplyStatfs) {
    match done {
        Ok(s) => reply.statfs(
            s.f_blocks,
            s.f_bfree,
            s.f_bavail,
            s.f_files,
            s.f_ffree,
            u32::try_from(s.f_bsize).unwrap_or(4096),
            u32::try_from(s.f_namemax).unwrap_or(255),
            u32::try_from(s.f_frsize).unwrap_or(4096),
        ),
        Err(error) => reply.error(to_errno(error)),
    }
}

/// Returns the attributes of a negative LOOKUP reply.
///
/// On inode number 0 the kernel caches that the name does not exist.
pub(super) fn negative_attr() -> FileAttr {
    to_file_attr(&Attr {
        ino: 0,
        stat: Stat::default(),
    })
}

/// Returns an inode with its attributes.
pub(super) fn with_attr(op: &Op<'_>, inode: Arc<Inode>) -> Result<(Arc<Inode>, Attr)> {
    let attr = op.attr(&inode)?;
    Ok((inode, attr))
}
