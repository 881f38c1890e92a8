//! Operations on a descriptor of /dev/fuse that the protocol library lacks.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::error::Result;

/// Makes `number` a descriptor of the same open file as `of` (dup3(2)). Threads that use the number notice nothing.
///
/// The number must belong to a socket of this process that its owner takes for a FUSE device.
pub fn substitute(number: BorrowedFd<'_>, of: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: both numbers are open descriptors, which the borrows keep open. The kernel replaces the open file behind
    // the first one atomically, so its owner, which closes it later, owns a valid descriptor at every moment.
    let done = unsafe { libc::dup3(of.as_raw_fd(), number.as_raw_fd(), libc::O_CLOEXEC) };
    if done < 0 {
        return Err(nix::errno::Errno::last().into());
    }
    Ok(())
}

/// Whether a descriptor is one of /dev/fuse.
pub fn is_device(device: impl AsFd) -> io::Result<bool> {
    /// The device number of /dev/fuse, which is the same on all machines.
    const NUMBER: (u32, u32) = (10, 229);
    let stat = rustix::fs::fstat(device)?;
    let number = (
        rustix::fs::major(stat.st_rdev),
        rustix::fs::minor(stat.st_rdev),
    );
    let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
    Ok(kind == rustix::fs::FileType::CharacterDevice && number == NUMBER)
}

/// The ioctl FUSE_DEV_IOC_BACKING_CLOSE.
const BACKING_CLOSE: libc::Ioctl = rustix::ioctl::opcode::write::<u32>(229, 2) as libc::Ioctl;

/// Unregisters a backing file for passthrough.
pub fn close_backing(device: impl AsFd, id: u32) -> Result<()> {
    // SAFETY: the descriptor is open, and the kernel only reads a number of 32 bits at the address.
    let done = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), BACKING_CLOSE, &raw const id) };
    if done < 0 {
        return Err(nix::errno::Errno::last().into());
    }
    Ok(())
}

/// Makes the kernel send again every request that a process has read and not answered (FUSE_NOTIFY_RESEND).
pub fn resend(device: impl AsFd) -> io::Result<()> {
    /// The code of the notification.
    const RESEND: i32 = 7;
    /// The size of `struct fuse_out_header`.
    const LENGTH: u32 = 16;
    let mut header = [0_u8; LENGTH as usize];
    // The length, the code as an error number, and 0 as the id of a request.
    let fields = LENGTH.to_ne_bytes().into_iter().chain(RESEND.to_ne_bytes());
    for (byte, value) in header.iter_mut().zip(fields) {
        *byte = value;
    }
    let written = rustix::io::write(device, &header)?;
    if written != header.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    Ok(())
}
