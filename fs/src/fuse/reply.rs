//! The shapes of replies that several handlers share.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use fuser::{FileAttr, INodeNo, ReplyEmpty, ReplyStatfs, ReplyXattr};

use super::convert::{attr, errno};
use rustix::fs::StatVfs;

use crate::error::{Errno, Error, Result};
use crate::inode::Inode;
use crate::name::Name;
use crate::overlay::{Attr, DirEntry, DirHandle, Op};
use crate::sys::stat::Stat;

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

/// The rest of a listing from `offset` on, each entry with the offset behind it.
pub(super) fn from(entries: &[DirEntry], offset: u64) -> impl Iterator<Item = (u64, &DirEntry)> {
    let skip = usize::try_from(offset).unwrap_or(usize::MAX);
    (offset + 1..).zip(entries.iter().skip(skip))
}

/// What a listing with attributes says of one entry.
pub(super) struct Plus {
    /// The object, of which the kernel then counts a lookup.
    pub(super) inode: Option<Arc<Inode>>,
    pub(super) attr: Attr,
    /// Whether the kernel may keep it.
    pub(super) keep: bool,
}

/// `None` when the entry is gone. Of `.` and `..` the kernel takes only number and type, and counts no
/// lookup. One damaged entry does not hide the others: it is named, and whoever asks for it gets the
/// error.
pub(super) fn plus_entry(
    op: &Op<'_>,
    handle: &DirHandle,
    entry: &DirEntry,
) -> Result<Option<Plus>> {
    let bare = Plus {
        inode: None,
        attr: Attr {
            ino: entry.ino,
            stat: Stat {
                mode: entry.kind.mode_bits(),
                ..Stat::default()
            },
        },
        keep: false,
    };
    if matches!(&*entry.name, b"." | b"..") {
        return Ok(Some(bare));
    }
    let name = Name::new(&entry.name)?;
    let looked = op.lookup(handle.inode(), &name).and_then(|found| {
        let with_attr = |inode| with_attr(op, inode).map(Some);
        found.map_or(Ok(None), with_attr)
    });
    match looked {
        Ok(found) => Ok(found.map(|(inode, attr)| Plus {
            inode: Some(inode),
            attr,
            keep: true,
        })),
        Err(error) => {
            let folder = INodeNo(handle.inode().ino());
            log_failure("listing", folder, Some(OsStr::from_bytes(&name)), error);
            Ok(Some(bare))
        }
    }
}

/// An object with its attributes.
pub(super) fn with_attr(op: &Op<'_>, inode: Arc<Inode>) -> Result<(Arc<Inode>, Attr)> {
    let attr = op.attr(&inode)?;
    Ok((inode, attr))
}
