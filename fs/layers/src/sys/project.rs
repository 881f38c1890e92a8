//! Projects, by which XFS and ext4 limit the space that directories use.

#![allow(unsafe_code)]

use std::os::fd::BorrowedFd;

use rustix::ioctl::{Getter, Opcode, opcode};

use crate::error::Result;

/// The ioctl FS_IOC_FSGETXATTR.
const GET: Opcode = opcode::read::<Attributes>(b'X', 31);
/// FS_XFLAG_PROJINHERIT.
const INHERITED: u32 = 0x200;

/// `struct fsxattr`.
#[repr(C)]
struct Attributes {
    flags: u32,
    _extent_size: u32,
    _extents: u32,
    project: u32,
    _cow_extent_size: u32,
    _padding: [u8; 8],
}

/// The project of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Project {
    /// Its id.
    pub id: u32,
    /// Whether a directory gives it to what is created in it, and accepts no link and no rename of a file of another one.
    pub is_inherited: bool,
}

/// Returns the project of a file that is open for reading or writing; `None` if the file system has no projects.
pub fn of(file: BorrowedFd<'_>) -> Result<Option<Project>> {
    // SAFETY: the kernel writes one `Attributes`.
    let request = unsafe { Getter::<GET, Attributes>::new() };
    // SAFETY: this ioctl only reads attributes.
    match unsafe { rustix::ioctl::ioctl(file, request) } {
        Ok(found) => Ok(Some(Project {
            id: found.project,
            is_inherited: found.flags & INHERITED != 0,
        })),
        Err(rustix::io::Errno::NOTTY | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL) => {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}
