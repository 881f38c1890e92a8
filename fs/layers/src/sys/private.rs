//! A mount of our own, which nobody else sees, of a folder that others have mounted.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::mount::OpenTreeFlags;

use crate::error::{Errno, Error, Result};

/// What goes through a private mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Through {
    /// Reading, which leaves no trace: no access time moves.
    Reading,
    /// Everything.
    Writing,
    /// Writing, and reading that leaves no trace.
    WritingNoAtime,
}

/// The folder behind `dir` through a mount of its own. As long as the descriptor lives, the file
/// system lives; but its place in the tree can be unmounted by whoever mounted it there (an open
/// descriptor would make it busy). What is mounted below the folder is left out. The kernel's overlayfs
/// does the same to its layers. Devices cannot be opened through it.
///
/// Fails where making mounts is not allowed. A user namespace may not change what holds for access
/// times and read-only mounts above it: then as much is set as can be.
pub fn mount_of(dir: BorrowedFd<'_>, through: Through) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = rustix::mount::open_tree(dir, "", flags)?;
    let read_only = libc::MOUNT_ATTR_RDONLY;
    let noatime = libc::MOUNT_ATTR_NOATIME;
    // Any process may give up these. Nodes can be made on such a mount, and the client's kernel opens those
    // that the overlay shows. Not noexec: what the kernel maps by passthrough is a file of this mount.
    let always = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;
    let wishes: &[u64] = match through {
        Through::Reading => &[read_only | noatime, read_only, 0],
        Through::Writing => &[0],
        Through::WritingNoAtime => &[noatime, 0],
    };
    let mut last = Err(Error::Errno(Errno::PERM));
    for wish in wishes {
        last = set(mount.as_fd(), *wish | always);
        if last.is_ok() {
            break;
        }
    }
    last.map(|()| mount)
}

/// Sets attributes of a mount, and that mounts made elsewhere do not appear in it.
fn set(mount: BorrowedFd<'_>, attributes: u64) -> Result<()> {
    let noatime = attributes & libc::MOUNT_ATTR_NOATIME != 0;
    let wanted = libc::mount_attr {
        attr_set: attributes,
        // The ways to keep access times exclude each other: the old one has to go.
        attr_clr: if noatime { libc::MOUNT_ATTR__ATIME } else { 0 },
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the descriptor is open, the path is an empty string with its NUL, and `wanted` is a whole
    // struct of the size that is passed, which the kernel only reads.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const wanted,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(nix::errno::Errno::last().into())
    }
}
