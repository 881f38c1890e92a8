//! Owner, mode, times, size of an object that is named by a descriptor (O_PATH will do, but for size).
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::fs::{AtFlags, CWD, Gid, Mode, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid};

use crate::error::{Errno, Result};
use crate::sys::stat::Time;
use crate::sys::{by_descriptor, fault, proc_path};

/// A change of one of the two times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// Leave it.
    Keep,
    /// The kernel's present time.
    Now,
    /// This moment.
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

/// Sets permission bits. Not for symbolic links, whose mode Linux does not change.
pub fn chmod(fd: BorrowedFd<'_>, mode: u32) -> Result<()> {
    fault::hit()?;
    let mode = Mode::from_raw_mode(mode & 0o7777);
    Ok(by_descriptor(
        || rustix::fs::fchmod(fd, mode),
        || match fchmodat2(fd, mode) {
            // Before Linux 6.6, or kept from us by a filter that does not know the call. The old way tells a
            // right that lacks from a call that does.
            Err(Errno::NOSYS | Errno::PERM) => {
                rustix::fs::chmodat(CWD, proc_path(fd).as_slice(), mode, AtFlags::empty())
            }
            done => done,
        },
    )?)
}

/// fchmodat2(2) of what an O_PATH descriptor stands for.
fn fchmodat2(fd: BorrowedFd<'_>, mode: Mode) -> std::result::Result<(), Errno> {
    // The same on all architectures but alpha and mips.
    const FCHMODAT2: libc::c_long = 452;
    if cfg!(any(target_arch = "mips", target_arch = "mips64")) {
        return Err(Errno::NOSYS);
    }
    // SAFETY: the descriptor is open, and the name is a constant that ends with a NUL.
    let done = unsafe {
        libc::syscall(
            FCHMODAT2,
            fd.as_raw_fd(),
            c"".as_ptr(),
            mode.as_raw_mode(),
            libc::AT_EMPTY_PATH,
        )
    };
    match nix::errno::Errno::result(done) {
        Ok(_) => Ok(()),
        Err(error) => Err(Errno::from_raw_os_error(error as i32)),
    }
}

/// Sets owner and group; `None` leaves one.
pub fn chown(fd: BorrowedFd<'_>, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
    fault::hit()?;
    Ok(rustix::fs::chownat(
        fd,
        "",
        uid.map(Uid::from_raw),
        gid.map(Gid::from_raw),
        AtFlags::EMPTY_PATH,
    )?)
}

/// Sets access and modification time.
pub fn utimens(fd: BorrowedFd<'_>, atime: SetTime, mtime: SetTime) -> Result<()> {
    fault::hit()?;
    let times = Timestamps {
        last_access: atime.to_kernel(),
        last_modification: mtime.to_kernel(),
    };
    match rustix::fs::utimensat(fd, "", &times, AtFlags::EMPTY_PATH) {
        // Before Linux 5.8 there is no such flag.
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
    fault::hit()?;
    Ok(rustix::fs::ftruncate(fd, size)?)
}
