//! Sets the owner, mode, times and size of an object by its descriptor, which may be O_PATH except for the size.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, CWD, Gid, Mode, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid};

use crate::error::{Errno, Result};
use crate::sys::stat::Time;
use crate::sys::{by_descriptor, fault, proc_path};

/// A change of a timestamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// No change (UTIME_OMIT).
    Keep,
    /// The current time of the kernel (UTIME_NOW).
    Now,
    /// A specific time.
    At(Time),
}

impl SetTime {
    fn to_kernel(self) -> Timespec {
        match self {
            Self::Keep => Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_OMIT,
            },
            Self::Now => Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_NOW,
            },
            Self::At(time) => Timespec {
                tv_sec: time.secs,
                tv_nsec: i64::from(time.nanos),
            },
        }
    }
}

/// Sets the permission bits. Must not be called for symbolic links, whose mode Linux cannot change.
pub fn chmod(fd: BorrowedFd<'_>, mode: u32) -> Result<()> {
    let _change = fault::begin()?;
    let mode = Mode::from_raw_mode(mode & 0o7777);
    Ok(by_descriptor(
        || rustix::fs::fchmod(fd, mode),
        || rustix::fs::chmodat(CWD, proc_path(fd).as_slice(), mode, AtFlags::empty()),
    )?)
}

/// Sets the owner and group; `None` leaves one unchanged.
pub fn chown(fd: BorrowedFd<'_>, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
    let _change = fault::begin()?;
    Ok(rustix::fs::chownat(
        fd,
        "",
        uid.map(Uid::from_raw),
        gid.map(Gid::from_raw),
        AtFlags::EMPTY_PATH,
    )?)
}

/// Sets the access and modification times.
pub fn utimens(fd: BorrowedFd<'_>, atime: SetTime, mtime: SetTime) -> Result<()> {
    let _change = fault::begin()?;
    let times = Timestamps {
        last_access: atime.to_kernel(),
        last_modification: mtime.to_kernel(),
    };
    match rustix::fs::utimensat(fd, "", &times, AtFlags::EMPTY_PATH) {
        // Linux before 5.8 rejects AT_EMPTY_PATH.
        Err(Errno::INVAL) => {}
        done => return Ok(done?),
    }
    let path = proc_path(fd);
    Ok(rustix::fs::utimensat(
        CWD,
        path.as_slice(),
        &times,
        AtFlags::empty(),
    )?)
}

/// Sets the size of a file that is open for writing.
pub fn truncate(fd: impl AsFd, size: u64) -> Result<()> {
    let _change = fault::begin()?;
    Ok(rustix::fs::ftruncate(fd, size)?)
}
