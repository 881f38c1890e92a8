//! Opens files by path inside a tree with untrusted content.
//!
//! Such a tree is a container's root filesystem, or a directory that another user may write to. Any name in such a
//! tree can be a link out of it, a device, a FIFO, or a file with a lease. The path is therefore resolved beneath the
//! tree (openat2(2)), without magic links and without crossing a mount. The first descriptor is an O_PATH one, which
//! neither blocks nor has side effects. Its type is checked, and only a regular file is then opened, through
//! /proc/self/fd with O_NONBLOCK (a lease fails with EAGAIN instead of blocking).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::open;
use crate::error::{Errno, Result};
use crate::sys::content;
#[cfg(test)]
use crate::sys::dir;
use crate::sys::stat::{FileKind, stat_fd};

/// The treatment of symbolic links in the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SymlinkPolicy {
    /// SymlinkPolicy are followed as by a process that has the tree as its root.
    InTree,
    /// A link ends the resolution: the path names no file.
    Refused,
}

/// The object at a path inside a tree.
#[derive(Debug)]
pub enum OpenedObject {
    /// A regular file, opened.
    File(OwnedFd),
    /// No object, or a path that leads through a file, in a loop, out of the tree, or onto another mount.
    Nothing,
    /// An object that is never opened: a directory, a device, a FIFO, a socket, or a link that is not followed.
    Other(FileKind),
}

/// The number of times that a resolution is retried after a race with a rename.
const TRIES: u32 = 16;

/// Opens the regular file `path` inside the tree `root`, with the access mode of `access`.
pub fn open(
    root: BorrowedFd<'_>,
    path: &[u8],
    links: SymlinkPolicy,
    access: OFlags,
) -> Result<OpenedObject> {
    let found = match resolve(root, path, links) {
        Ok(found) => found,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::NAMETOOLONG) => {
            return Ok(OpenedObject::Nothing);
        }
        Err(error) => return Err(error.into()),
    };
    match stat_fd(&found)?.kind() {
        FileKind::Regular => Ok(OpenedObject::File(content::reopen(found.as_fd(), access)?)),
        other => Ok(OpenedObject::Other(other)),
    }
}

fn resolve(
    root: BorrowedFd<'_>,
    path: &[u8],
    links: SymlinkPolicy,
) -> std::result::Result<OwnedFd, Errno> {
    let mut flags = OFlags::PATH | OFlags::CLOEXEC;
    let mut how = ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    match links {
        SymlinkPolicy::InTree => how |= ResolveFlags::IN_ROOT,
        SymlinkPolicy::Refused => {
            how |= ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            flags |= OFlags::NOFOLLOW;
        }
    }
    let mut tries = TRIES;
    loop {
        match open::openat2(root, path, flags, Mode::empty(), how) {
            Err(Errno::AGAIN) if tries > 0 => tries -= 1,
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::*;

    fn tree() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("etc/inner")).unwrap();
        std::fs::write(dir.path().join("outside"), "secret").unwrap();
        std::fs::write(root.join("etc/file"), "text").unwrap();
        std::fs::write(root.join("outside"), "own").unwrap();
        let opened = dir::open_root(&root).unwrap();
        (dir, opened)
    }

    fn text(root: &OwnedFd, path: &str, links: SymlinkPolicy) -> Option<String> {
        match open(root.as_fd(), path.as_bytes(), links, OFlags::RDONLY).unwrap() {
            OpenedObject::File(fd) => {
                let mut text = String::new();
                std::fs::File::from(fd).read_to_string(&mut text).unwrap();
                Some(text)
            }
            OpenedObject::Nothing | OpenedObject::Other(_) => None,
        }
    }

    #[test]
    fn symlinks_do_not_escape_the_tree() {
        let (dir, root) = tree();
        let path = dir.path().join("root");
        let outside = dir.path().join("outside");
        let link = |to: &Path, at: &str| symlink(to, path.join(at)).unwrap();
        link(Path::new("../../outside"), "etc/up");
        link(&outside, "etc/absolute");
        link(Path::new("/outside"), "etc/rooted");
        link(Path::new("etc"), "linked");
        link(Path::new("/proc/self/root/etc/passwd"), "etc/magic");
        link(Path::new("round"), "etc/round");
        // `..` stops at the tree's root, as for a process in a chroot.
        assert_eq!(
            text(&root, "etc/up", SymlinkPolicy::InTree).as_deref(),
            Some("own")
        );
        assert_eq!(
            text(&root, "etc/rooted", SymlinkPolicy::InTree).as_deref(),
            Some("own")
        );
        assert_eq!(
            text(&root, "linked/file", SymlinkPolicy::InTree).as_deref(),
            Some("text")
        );
        for path in [
            "etc/absolute",
            "etc/magic",
            "etc/round",
            "etc/absent",
            "etc/file/x",
        ] {
            assert_eq!(text(&root, path, SymlinkPolicy::InTree), None, "{path}");
        }
        for path in [
            "etc/up",
            "etc/rooted",
            "linked/file",
            "../outside",
            "/etc/passwd",
        ] {
            assert_eq!(text(&root, path, SymlinkPolicy::Refused), None, "{path}");
        }
        assert_eq!(
            text(&root, "etc/file", SymlinkPolicy::Refused).as_deref(),
            Some("text")
        );
    }

    #[test]
    fn only_regular_files_are_opened() {
        let (dir, root) = tree();
        let path = dir.path().join("root/etc");
        let made = dir::open_root(&path).unwrap();
        crate::sys::node::mknod(made.as_fd(), b"fifo", FileKind::Fifo, 0o600, 0).unwrap();
        drop(std::os::unix::net::UnixListener::bind(path.join("socket")).unwrap());
        for (path, kind) in [
            ("etc/fifo", FileKind::Fifo),
            ("etc/socket", FileKind::Socket),
            ("etc/inner", FileKind::Directory),
        ] {
            for access in [OFlags::RDONLY, OFlags::WRONLY | OFlags::TRUNC] {
                let found =
                    open(root.as_fd(), path.as_bytes(), SymlinkPolicy::InTree, access).unwrap();
                assert!(
                    matches!(found, OpenedObject::Other(other) if other == kind),
                    "{path}: {found:?}"
                );
            }
        }
    }
}
