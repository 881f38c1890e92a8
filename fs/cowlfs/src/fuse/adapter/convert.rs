//! Conversions between the types of the protocol and those of the overlay. Pure.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    FileAttr, FileType, INodeNo, LockOwner, OpenAccMode, OpenFlags, Request, TimeOrNow, WriteFlags,
};

use crate::choices::Mounter;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::name::Name;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::copy::SyncScope;
use cowl_layers::sys::stat::{FileKind, Time};
use cowl_overlay::{Attr, Caller, OpenOptions, RenameFlags, Writer};

/// The flag of an open for execve(2): `__FMODE_EXEC` in include/linux/fs.h, which fuse_send_open includes in the flags
/// of the request.
const FMODE_EXEC: i32 = 0x20;

/// Returns the error number of a reply.
pub(super) fn to_errno(error: cowl_layers::Error) -> fuser::Errno {
    fuser::Errno::from_i32(error.errno().raw_os_error())
}

/// Returns the process that sent a request, with its umask.
pub(super) fn caller(request: &Request, umask: u32, mounter: Mounter) -> Caller {
    let pid = match mounter {
        Mounter::Daemon => request.pid(),
        // In the pid namespace of this process, another process may have this id.
        Mounter::Other => 0,
    };
    Caller {
        uid: request.uid(),
        gid: request.gid(),
        umask,
        pid,
    }
}

/// Returns the protocol's type of a file.
pub(super) fn to_file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
    }
}

fn system_time(time: Time) -> SystemTime {
    let nanos = Duration::from_nanos(time.nanos.into());
    if time.secs >= 0 {
        UNIX_EPOCH + Duration::from_secs(time.secs.unsigned_abs()) + nanos
    } else {
        UNIX_EPOCH - Duration::from_secs(time.secs.unsigned_abs()) + nanos
    }
}

/// Returns the change of a time that a SETATTR request demands.
pub(super) fn to_set_time(time: Option<TimeOrNow>) -> SetTime {
    match time {
        None => SetTime::Keep,
        Some(TimeOrNow::Now) => SetTime::Now,
        Some(TimeOrNow::SpecificTime(time)) => SetTime::At(from_system_time(time)),
    }
}

/// Returns a time of a request.
///
/// For seconds before 1970, `fuser` subtracts the nanoseconds instead of adding them: -3 s plus 0.5 s arrives as
/// -3.5 s. The mapping is unambiguous, so it is reverted here.
fn from_system_time(time: SystemTime) -> Time {
    let (duration, before) = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => (after, false),
        Err(before) => (before.duration(), true),
    };
    let secs = duration.as_secs().cast_signed();
    Time {
        secs: if before { secs.wrapping_neg() } else { secs },
        nanos: duration.subsec_nanos(),
    }
}

/// Converts a device number of the C library to the protocol's 32 bits (new_encode_dev in the kernel).
fn device_to_protocol(rdev: u64) -> u32 {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// Converts a device number of the protocol to that of the C library (new_decode_dev in the kernel).
pub(super) fn device_from_protocol(rdev: u32) -> u64 {
    let major = (rdev & 0xf_ff00) >> 8;
    let minor = (rdev & 0xff) | ((rdev >> 12) & 0xf_ff00);
    rustix::fs::makedev(major, minor)
}

/// Returns attributes in the form of a reply.
pub(super) fn to_file_attr(attr: &Attr) -> FileAttr {
    let stat = &attr.stat;
    FileAttr {
        ino: INodeNo(attr.ino),
        size: stat.size,
        blocks: stat.blocks,
        atime: system_time(stat.atime),
        mtime: system_time(stat.mtime),
        ctime: system_time(stat.ctime),
        crtime: UNIX_EPOCH,
        kind: to_file_type(stat.kind()),
        // At most twelve bits.
        perm: u16::try_from(stat.perm()).unwrap_or(0o7777),
        nlink: u32::try_from(stat.nlink).unwrap_or(u32::MAX),
        uid: stat.uid,
        gid: stat.gid,
        rdev: device_to_protocol(stat.rdev),
        blksize: stat.blksize,
        flags: 0,
    }
}

/// Returns a validated file name.
pub(super) fn parse_name(name: &OsStr) -> Result<Name> {
    Name::new(name.as_bytes())
}

/// Returns the flags of renameat2(2), or EINVAL for an unknown flag.
pub(super) fn to_rename_flags(flags: fuser::RenameFlags) -> Result<RenameFlags> {
    use fuser::RenameFlags as Wire;
    let known = Wire::RENAME_NOREPLACE | Wire::RENAME_EXCHANGE | Wire::RENAME_WHITEOUT;
    if !known.contains(flags) {
        return Err(Error::Errno(Errno::INVAL));
    }
    Ok(RenameFlags {
        no_replace: flags.contains(Wire::RENAME_NOREPLACE),
        exchange: flags.contains(Wire::RENAME_EXCHANGE),
        whiteout: flags.contains(Wire::RENAME_WHITEOUT),
    })
}

/// Returns the origin of a WRITE request: a mapping, or a process with or without CAP_FSETID.
pub(super) fn writer(caller: Caller, flags: WriteFlags) -> Writer {
    if flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
        Writer::Mapping
    } else if flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID) {
        Writer::Unprivileged(caller)
    } else {
        Writer::Privileged
    }
}

/// Whether a file that is opened with these flags can be mapped shared and writable.
pub(super) fn can_map_writable(flags: OpenFlags) -> bool {
    flags.acc_mode() == OpenAccMode::O_RDWR
}

/// Whether each write must be durable when it returns. O_SYNC includes the bit of O_DSYNC.
pub(super) fn is_synchronous(flags: OpenFlags) -> bool {
    flags.0 & libc::O_DSYNC != 0
}

/// Whether a descriptor with these flags can neither read nor map a file, and writes at its own position, not always at
/// the end of the file.
pub(super) fn is_plain_writer(flags: OpenFlags) -> bool {
    flags.acc_mode() == OpenAccMode::O_WRONLY && flags.0 & libc::O_APPEND == 0
}

/// Returns the sync that a WRITE request with these flags includes.
///
/// The kernel sends FSYNC after a synchronous write through its page cache, but not after a direct one. Only the
/// requests of direct writes have a lock owner (fs/fuse/file.c, verified on Linux 6.18).
pub(super) fn implied_sync(flags: OpenFlags, owner: Option<LockOwner>) -> Option<SyncScope> {
    if owner.is_none() || !is_synchronous(flags) {
        return None;
    }
    Some(match flags.0 & libc::O_SYNC == libc::O_SYNC {
        true => SyncScope::All,
        false => SyncScope::Data,
    })
}

/// Returns the options of an open, and whether the flags include O_DIRECT.
pub(super) fn to_open_options(flags: OpenFlags) -> (OpenOptions, bool) {
    let options = OpenOptions {
        write: flags.acc_mode() != OpenAccMode::O_RDONLY,
        truncate: flags.0 & libc::O_TRUNC != 0,
        exec: flags.0 & FMODE_EXEC != 0,
        keep_atime: flags.0 & libc::O_NOATIME != 0,
    };
    (options, flags.0 & libc::O_DIRECT != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_retain_their_nanoseconds() {
        for (secs, nanos) in [(0, 0), (1, 5), (-1, 0), (-1, 999_999_999), (-1_000_000, 1)] {
            let time = Time { secs, nanos };
            let shown = match system_time(time).duration_since(UNIX_EPOCH) {
                Ok(after) => i128::try_from(after.as_nanos()).unwrap(),
                Err(before) => -i128::try_from(before.duration().as_nanos()).unwrap(),
            };
            assert_eq!(shown, i128::from(secs) * 1_000_000_000 + i128::from(nanos));
            // As `fuser` decodes a request.
            let duration = Duration::new(secs.unsigned_abs(), nanos);
            let decoded = if secs < 0 {
                UNIX_EPOCH - duration
            } else {
                UNIX_EPOCH + duration
            };
            assert_eq!(from_system_time(decoded), time);
        }
    }

    #[test]
    fn device_numbers_round_trip() {
        for (major, minor) in [(1, 3), (8, 300), (4095, 1_048_575), (259, 70_000)] {
            let rdev = rustix::fs::makedev(major, minor);
            assert_eq!(device_from_protocol(device_to_protocol(rdev)), rdev);
        }
    }
}
