//! Opens file content, from regular files only.
//!
//! Names and types in a layer are untrusted. A redirect, or a name that was exchanged a moment ago, may lead to a
//! device, a FIFO or a socket. Opening a device can have side effects (a tape rewinds, a watchdog starts), so the
//! type must be known before the open. There are two sequences:
//!
//! - On a mount with `nodev` ([`super::private`]), the kernel refuses devices before it calls the driver
//!   (`may_open_dev`). FIFOs and directories can still be opened, but that has no effect and, with O_NONBLOCK, does
//!   not block. The type is checked on the descriptor that is returned.
//! - Elsewhere, an O_PATH descriptor is opened first, which calls no driver. Its type is checked, and that descriptor
//!   is reopened through /proc. No mount is crossed, because a device may be mounted over a file.
//!
//! Neither follows symbolic links. Compared with a plain open, the first takes one more system call, the second
//! three.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use super::open;
use crate::error::{Errno, Error, Result};
use crate::sys::stat::{FileKind, stat_at, stat_fd};

/// The error for content that is not a regular file. Programs get EIO.
const NOT_REGULAR: Error = Error::Damaged("the content of a file is not a regular file");

/// Opens the content of the regular file `name` in `dir`.
pub fn open(dir: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> Result<OwnedFd> {
    let path_only = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let found = match open::openat2(dir, name, path_only, Mode::empty(), resolve) {
        // A seccomp filter rejects openat2(2).
        Err(Errno::NOSYS) => open::openat(dir, name, path_only, Mode::empty())?,
        // The path has one component, so it is a symbolic link or a mount point.
        Err(Errno::LOOP | Errno::XDEV) => return Err(NOT_REGULAR),
        other => other?,
    };
    reopen(found.as_fd(), flags)
}

/// Opens the content of the regular file `name` in `dir`, which was reached through a mount with `nodev`.
pub fn open_nodev(dir: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> Result<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW | harmless();
    match open::openat(dir, name, flags, Mode::empty()) {
        Ok(file) => {
            check(file.as_fd())?;
            Ok(file)
        }
        // EACCES for a device, ENXIO for a socket, ELOOP for a link, EISDIR for a directory.
        Err(error) => match stat_at(dir, name) {
            Ok(stat) if stat.kind() != FileKind::Regular => Err(NOT_REGULAR),
            Ok(_) | Err(_) => Err(error.into()),
        },
    }
}

/// Opens the content of the regular file behind an O_PATH descriptor.
pub fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd> {
    check(fd)?;
    Ok(open::openat(
        CWD,
        crate::sys::proc_path(fd).as_slice(),
        flags | harmless(),
        Mode::empty(),
    )?)
}

/// Returns flags with which an open neither blocks nor acquires a controlling terminal.
fn harmless() -> OFlags {
    OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY
}

fn check(fd: BorrowedFd<'_>) -> Result<()> {
    match stat_fd(fd)?.kind() {
        FileKind::Regular => Ok(()),
        _ => Err(NOT_REGULAR),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::node;
    use crate::sys::private::{Through, clone_mount};

    /// Checks that objects of each other type are refused without blocking.
    ///
    /// Both access modes are tried, because an open of a FIFO blocks with O_RDONLY, but not with O_RDWR.
    #[test]
    fn only_regular_files_have_content() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "text").unwrap();
        std::fs::create_dir(dir.path().join("dir")).unwrap();
        std::os::unix::fs::symlink("file", dir.path().join("link")).unwrap();
        let plain = crate::sys::dir::open_root(dir.path()).unwrap();
        let mut names = vec!["dir", "link", "fifo", "socket"];
        let make =
            |name: &str, kind, rdev| node::mknod(plain.as_fd(), name.as_bytes(), kind, 0o666, rdev);
        make("fifo", FileKind::Fifo, 0).unwrap();
        make("socket", FileKind::Socket, 0).unwrap();
        for (name, kind, rdev) in [
            ("null", FileKind::CharDevice, 0x103),
            ("disk", FileKind::BlockDevice, 0x700),
            ("none", FileKind::CharDevice, 0),
        ] {
            match make(name, kind, rdev) {
                Ok(()) => names.push(name),
                Err(error) => assert_eq!(error.errno(), Errno::PERM),
            }
        }
        // Without the privilege to mount, only the first sequence is tested.
        let private = clone_mount(plain.as_fd(), Through::WRITING).ok();
        for flags in [OFlags::RDONLY, OFlags::RDWR] {
            for name in &names {
                let name = name.as_bytes();
                assert_eq!(open(plain.as_fd(), name, flags).unwrap_err(), NOT_REGULAR);
                let found = crate::sys::dir::open_path(plain.as_fd(), name).unwrap();
                assert_eq!(reopen(found.as_fd(), flags).unwrap_err(), NOT_REGULAR);
                if let Some(private) = &private {
                    let refused = open_nodev(private.as_fd(), name, flags).unwrap_err();
                    assert_eq!(refused, NOT_REGULAR, "{}", name.escape_ascii());
                }
            }
            open(plain.as_fd(), b"file", flags).unwrap();
            if let Some(private) = &private {
                open_nodev(private.as_fd(), b"file", flags).unwrap();
            }
        }
        let absent = open(plain.as_fd(), b"absent", OFlags::RDONLY).unwrap_err();
        assert!(absent.is_absent());
        let outside = open(plain.as_fd(), b"..", OFlags::RDONLY);
        assert!(outside.is_err());
    }

    /// Checks that a private mount refuses devices by itself, before any check of the type.
    #[test]
    fn private_mount_refuses_devices() {
        let dir = tempfile::tempdir().unwrap();
        let plain = crate::sys::dir::open_root(dir.path()).unwrap();
        let made = node::mknod(plain.as_fd(), b"null", FileKind::CharDevice, 0o666, 0x103);
        let Ok(private) = clone_mount(plain.as_fd(), Through::Reading) else {
            return;
        };
        if made.is_ok() {
            let opened = rustix::fs::openat(&private, "null", OFlags::RDONLY, Mode::empty());
            assert_eq!(opened.unwrap_err(), Errno::ACCESS);
        }
    }
}
