//! The shapes of replies that several handlers share.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use fuser::{FileAttr, INodeNo, ReplyEmpty, ReplyStatfs, ReplyXattr};

use super::convert::{attr, errno};
use rustix::fs::StatVfs;

use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::sys::stat::Stat;
use cowl_overlay::inode::Inode;
use cowl_overlay::{Attr, Op};

pub(super) fn empty(done: Result<()>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}

/// An answer to getxattr or listxattr: its size when that is asked, else its bytes.
pub(super) fn xattr(done: Result<Vec<u8>>, size: u32, reply: ReplyXattr) {
    match done {
        Err(error) => reply.error(errno(error)),
        Ok(value) if size == 0 => reply.size(u32::try_from(value.len()).unwrap_or(u32::MAX)),
        Ok(value) if value.len() > size as usize => reply.error(fuser::Errno::ERANGE),
        Ok(value) => reply.data(&value),
    }
}

/// Logs an error that speaks of a damaged layer or of the machine; others are a program's own.
pub(super) fn log_failure(what: &str, ino: INodeNo, name: Option<&OsStr>, error: Error) {
    if matches!(
        error,
        Error::Damaged(_) | Error::Errno(Errno::IO | Errno::MFILE)
    ) {
        let name = name.map(|n| n.as_bytes().escape_ascii().to_string());
        log::error!("{what} of {ino} {}: {error}", name.unwrap_or_default());
    }
}

/// What statfs(2) shows.
pub(super) fn statfs(done: Result<StatVfs>, reply: ReplyStatfs) {
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
        Err(error) => reply.error(errno(error)),
    }
}

/// Number 0 says "absent, and you may remember that".
pub(super) fn absent() -> FileAttr {
    attr(&Attr {
        ino: 0,
        stat: Stat::default(),
    })
}

/// An object with its attributes.
pub(super) fn with_attr(op: &Op<'_>, inode: Arc<Inode>) -> Result<(Arc<Inode>, Attr)> {
    let attr = op.attr(&inode)?;
    Ok((inode, attr))
}
