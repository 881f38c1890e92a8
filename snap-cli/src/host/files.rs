//! Files outside the store that other users may modify: LXC's configs and the files next to them.
//!
//! An LXC directory may belong to a user other than root, and that user can create any object at any name. Therefore
//! every open uses [`resolve`], which resolves the path component by component with O_PATH descriptors, so that no
//! object is opened before its type is checked. A symbolic link of another user is followed only to objects of the same
//! user (the rule of the kernel's fs.protected_symlinks, applied to every directory). Reads are bounded. A write goes to
//! a temporary file that is renamed to its destination, relative to the directory that was resolved.

use std::collections::VecDeque;
use std::fs::{File, Permissions};
use std::io::{Error as IoError, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::Path;

use cowl_layers::error::Errno;
use cowl_layers::sys::stat::{FileKind, Stat, stat_fd};
use cowl_layers::sys::{content, dir, node};
use rustix::fs::{AtFlags, OFlags};

use crate::error::{Error, Result};

/// The size limit of files that are read, in bytes. A config of LXC has a few kilobytes.
const LIMIT: u64 = 4 << 20;

/// The maximum number of links in a path, as in the kernel.
const LINKS: u32 = 40;

/// The result of a path resolution.
#[derive(Debug)]
struct Resolved {
    /// The directory that contains the name.
    dir: OwnedFd,
    /// The name in it; empty for the root directory.
    name: Vec<u8>,
    /// An O_PATH descriptor of the object; `None` if the name is unused.
    found: Option<OwnedFd>,
}

fn io_error(error: cowl_layers::Error) -> IoError {
    IoError::from(error.errno())
}

/// Splits a path into its components.
fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> {
    path.split(|&byte| byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(<[u8]>::to_vec)
}

/// The treatment of a symbolic link in the last component of a path.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FinalLink {
    Follow,
    NoFollow,
}

/// Resolves a path without opening any object for reading or writing.
///
/// The last name may be unused, but its directory must exist.
fn resolve(path: &Path, last: FinalLink) -> std::io::Result<Resolved> {
    let path = std::path::absolute(path)?;
    let root = || dir::open_root(Path::new("/")).map_err(io_error);
    let own = rustix::process::geteuid().as_raw();
    let mut owners = Vec::new();
    let mut pending: VecDeque<Vec<u8>> = parts(path.as_os_str().as_bytes()).collect();
    let mut at = Resolved {
        dir: root()?,
        name: Vec::new(),
        found: Some(root()?),
    };
    let mut links = 0;
    while let Some(name) = pending.pop_front() {
        let Some(here) = at.found else {
            return Err(Errno::NOENT.into());
        };
        let found = match dir::open_path(here.as_fd(), &name) {
            Ok(found) => Some(found),
            Err(error) if error.errno() == Errno::NOENT => None,
            Err(error) => return Err(io_error(error)),
        };
        let stat = found.as_ref().map(stat_fd).transpose().map_err(io_error)?;
        if let (Some(link), Some(stat)) = (&found, &stat)
            && stat.kind() == FileKind::Symlink
            && (last == FinalLink::Follow || !pending.is_empty())
        {
            links += 1;
            if links > LINKS {
                return Err(Errno::LOOP.into());
            }
            if stat.uid != 0 && stat.uid != own {
                owners.push(stat.uid);
            }
            let target = dir::readlink_fd(link).map_err(io_error)?;
            for part in parts(&target).rev() {
                pending.push_front(part);
            }
            let is_absolute = target.first() == Some(&b'/');
            at.found = Some(if is_absolute { root()? } else { here });
            continue;
        }
        at = Resolved {
            dir: here,
            name,
            found,
        };
    }
    let end = stat_fd(at.found.as_ref().unwrap_or(&at.dir)).map_err(io_error)?;
    match owners.iter().find(|owner| **owner != end.uid) {
        Some(owner) => Err(IoError::new(
            ErrorKind::PermissionDenied,
            format!(
                "a symbolic link of uid {owner} leads to a file of uid {}",
                end.uid
            ),
        )),
        None => Ok(at),
    }
}

/// Fails if an object is not a regular file.
fn check_regular(stat: &Stat) -> std::io::Result<()> {
    match stat.kind() {
        FileKind::Regular => Ok(()),
        FileKind::Directory => Err(ErrorKind::IsADirectory.into()),
        _ => Err(IoError::new(ErrorKind::InvalidInput, "not a regular file")),
    }
}

/// Reads a whole regular file through its O_PATH descriptor.
fn read_found(found: &OwnedFd) -> std::io::Result<Vec<u8>> {
    check_regular(&stat_fd(found).map_err(io_error)?)?;
    let file = File::from(content::reopen(found.as_fd(), OFlags::RDONLY).map_err(io_error)?);
    let mut bytes = Vec::new();
    file.take(LIMIT + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > LIMIT {
        true => Err(IoError::new(
            ErrorKind::FileTooLarge,
            format!("larger than {LIMIT} bytes"),
        )),
        false => Ok(bytes),
    }
}

/// Reads a whole file; `None` if it does not exist.
pub fn read_opt(path: &Path) -> Result<Option<Vec<u8>>> {
    let read = || match resolve(path, FinalLink::Follow)?.found {
        Some(found) => read_found(&found).map(Some),
        None => Ok(None),
    };
    match read() {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        done => done.map_err(|error| Error::at("read", path, error)),
    }
}

/// Reads a whole file that must exist.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    read_opt(path)?.ok_or_else(|| Error::at("read", path, IoError::from(ErrorKind::NotFound)))
}

/// Replaces a file atomically.
///
/// A symbolic link is followed. Owner and mode are preserved; a new file gets `mode`.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    resolve(path, FinalLink::Follow)
        .and_then(|target| replace_resolved(&target, bytes, mode))
        .map_err(|error| Error::at("write", path, error))
}

/// Replaces a file atomically, like [`replace`], but replaces a symbolic link instead of following it.
pub fn replace_name(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    resolve(path, FinalLink::NoFollow)
        .and_then(|mut target| {
            target.found = None;
            replace_resolved(&target, bytes, mode)
        })
        .map_err(|error| Error::at("write", path, error))
}

/// Replaces the object at a resolved path with a regular file; if none was found, creates one with `mode`.
fn replace_resolved(target: &Resolved, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    let old = target.found.as_ref().map(stat_fd).transpose();
    let old = old.map_err(io_error)?;
    old.as_ref().map_or(Ok(()), check_regular)?;
    let temporary = [b".".as_slice(), &target.name, b".cowl"].concat();
    // Remove the file that an interrupted command may have left.
    unlink(target, &temporary)?;
    let write = || -> std::io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW;
        let created =
            node::create(target.dir.as_fd(), &temporary, 0o600, flags).map_err(io_error)?;
        let mut file = File::from(created);
        file.write_all(bytes)?;
        if let Some(old) = &old {
            fchown(&file, Some(old.uid), Some(old.gid))?;
        }
        let mode = old.as_ref().map_or(mode, |old| old.mode & 0o7777);
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        rustix::fs::renameat(
            &target.dir,
            temporary.as_slice(),
            &target.dir,
            target.name.as_slice(),
        )?;
        Ok(())
    };
    if let Err(error) = write() {
        unlink(target, &temporary)?;
        return Err(error);
    }
    dir::sync_dir(target.dir.as_fd()).map_err(io_error)
}

/// Removes a name in the directory of a resolved path, if it exists.
fn unlink(target: &Resolved, name: &[u8]) -> std::io::Result<()> {
    match rustix::fs::unlinkat(&target.dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Copies a regular file to a new one, with its mode. A symbolic link is not followed.
pub fn copy_new(from: &Path, to: &Path) -> Result<()> {
    let copy = || -> std::io::Result<()> {
        let found = resolve(from, FinalLink::NoFollow)?.found;
        let found = found.ok_or(ErrorKind::NotFound)?;
        let stat = stat_fd(&found).map_err(io_error)?;
        check_regular(&stat)?;
        let mut source =
            File::from(content::reopen(found.as_fd(), OFlags::RDONLY).map_err(io_error)?);
        let target = resolve(to, FinalLink::NoFollow)?;
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW;
        let created =
            node::create(target.dir.as_fd(), &target.name, 0o600, flags).map_err(io_error)?;
        let mut copy = File::from(created);
        std::io::copy(&mut source, &mut copy)?;
        copy.set_permissions(Permissions::from_mode(stat.mode & 0o777))
    };
    copy().map_err(|error| Error::at("copy", from, error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn reads_only_regular_files_up_to_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "text").unwrap();
        symlink("file", at("link")).unwrap();
        symlink(dir.path(), at("up")).unwrap();
        symlink("round", at("round")).unwrap();
        symlink("absent", at("dangling")).unwrap();
        for name in ["file", "link", "up/up/link", "up/./file"] {
            assert_eq!(read(&at(name)).unwrap(), b"text", "{name}");
        }
        assert_eq!(read_opt(&at("absent")).unwrap(), None);
        assert_eq!(read_opt(&at("dangling")).unwrap(), None);
        assert!(
            read(&at("absent"))
                .unwrap_err()
                .to_string()
                .contains("absent")
        );
        assert!(read(&at("round")).is_err());
        let opened = dir::open_root(dir.path()).unwrap();
        node::mknod(opened.as_fd(), b"fifo", FileKind::Fifo, 0o600, 0).unwrap();
        for (path, reason) in [
            (at("fifo"), "not a regular file"),
            (Path::new("/dev/null").to_owned(), "not a regular file"),
            (dir.path().to_owned(), "directory"),
        ] {
            let error = read_opt(&path).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
            assert!(replace(&path, b"x", 0o600).is_err());
        }
        File::create(at("long"))
            .unwrap()
            .set_len(LIMIT + 1)
            .unwrap();
        assert!(
            read(&at("long"))
                .unwrap_err()
                .to_string()
                .contains("larger")
        );
    }

    #[test]
    fn replacing_preserves_the_mode_and_a_symbolic_link() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "old").unwrap();
        std::fs::set_permissions(at("file"), Permissions::from_mode(0o604)).unwrap();
        symlink("file", at("link")).unwrap();
        // A leftover of a killed command is replaced, even if it is a symbolic link.
        symlink("/nowhere", at(".file.cowl")).unwrap();
        replace(&at("link"), b"new", 0o640).unwrap();
        assert!(at("link").is_symlink());
        assert_eq!(std::fs::read(at("file")).unwrap(), b"new");
        assert_eq!(mode(&at("file")), 0o604);
        replace(&at("made"), b"made", 0o640).unwrap();
        assert_eq!(mode(&at("made")), 0o640);
        replace_name(&at("link"), b"own", 0o644).unwrap();
        assert!(!at("link").is_symlink());
        assert_eq!(std::fs::read(at("file")).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);

        symlink("file", at("again")).unwrap();
        copy_new(&at("file"), &at("copy")).unwrap();
        assert_eq!(mode(&at("copy")), 0o604);
        assert!(
            copy_new(&at("file"), &at("copy")).is_err(),
            "the target exists"
        );
        assert!(
            copy_new(&at("again"), &at("other")).is_err(),
            "a link is not followed"
        );
        assert_eq!(read_opt(&at("other")).unwrap(), None);
    }
}
