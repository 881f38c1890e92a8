//! Files outside the store that other users may modify: LXC's configs and the files next to them.
//!
//! An LXC directory may belong to a user other than root, who can create any object at any name. Every open goes
//! through [`chase`], which resolves the path component by component with O_PATH descriptors, so that nothing is
//! opened before its type is known. A link that another user owns is followed only to objects of the same user (the
//! rule of the kernel's fs.protected_symlinks, applied to every directory). Reads are bounded. A write goes to a
//! temporary file that is renamed to its destination, relative to the directory that was resolved.

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

/// The size limit of files that are read. A config of LXC has some kilobytes.
const LIMIT: u64 = 4 << 20;

/// The maximum number of links in a path, as in the kernel.
const LINKS: u32 = 40;

/// The result of a path resolution.
#[derive(Debug)]
struct Chased {
    /// The directory that contains the name.
    dir: OwnedFd,
    /// The name in it; empty for the root directory.
    name: Vec<u8>,
    /// An O_PATH descriptor of the object; `None` if the name is unused.
    found: Option<OwnedFd>,
}

fn lost(error: cowl_layers::Error) -> IoError {
    IoError::from(error.errno())
}

fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> {
    path.split(|&byte| byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(<[u8]>::to_vec)
}

/// Whether a symbolic link in the last component of a path is followed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LastLink {
    Follow,
    Keep,
}

/// Resolves a path.
fn chase(path: &Path, last: LastLink) -> std::io::Result<Chased> {
    let path = std::path::absolute(path)?;
    let root = || dir::open_root(Path::new("/")).map_err(lost);
    let own = rustix::process::geteuid().as_raw();
    let mut owners = Vec::new();
    let mut todo: VecDeque<Vec<u8>> = parts(path.as_os_str().as_bytes()).collect();
    let mut at = Chased {
        dir: root()?,
        name: Vec::new(),
        found: Some(root()?),
    };
    let mut links = 0;
    while let Some(name) = todo.pop_front() {
        let Some(here) = at.found else {
            return Err(Errno::NOENT.into());
        };
        let found = match dir::open_path(here.as_fd(), &name) {
            Ok(found) => Some(found),
            Err(error) if error.errno() == Errno::NOENT => None,
            Err(error) => return Err(lost(error)),
        };
        let stat = found.as_ref().map(stat_fd).transpose().map_err(lost)?;
        if let (Some(link), Some(stat)) = (&found, &stat)
            && stat.kind() == FileKind::Symlink
            && (last == LastLink::Follow || !todo.is_empty())
        {
            links += 1;
            if links > LINKS {
                return Err(Errno::LOOP.into());
            }
            if stat.uid != 0 && stat.uid != own {
                owners.push(stat.uid);
            }
            let target = dir::readlink_fd(link).map_err(lost)?;
            for part in parts(&target).rev() {
                todo.push_front(part);
            }
            let absolute = target.first() == Some(&b'/');
            at.found = Some(if absolute { root()? } else { here });
            continue;
        }
        at = Chased {
            dir: here,
            name,
            found,
        };
    }
    let end = stat_fd(at.found.as_ref().unwrap_or(&at.dir)).map_err(lost)?;
    match owners.iter().find(|owner| **owner != end.uid) {
        Some(owner) => Err(IoError::new(
            ErrorKind::PermissionDenied,
            format!(
                "it leads through a link of uid {owner} to a file of uid {}",
                end.uid
            ),
        )),
        None => Ok(at),
    }
}

fn is_regular(stat: &Stat) -> std::io::Result<()> {
    match stat.kind() {
        FileKind::Regular => Ok(()),
        FileKind::Directory => Err(ErrorKind::IsADirectory.into()),
        _ => Err(IoError::new(
            ErrorKind::InvalidInput,
            "it is not a regular file",
        )),
    }
}

fn read_found(found: &OwnedFd) -> std::io::Result<Vec<u8>> {
    is_regular(&stat_fd(found).map_err(lost)?)?;
    let file = File::from(content::reopen(found.as_fd(), OFlags::RDONLY).map_err(lost)?);
    let mut bytes = Vec::new();
    file.take(LIMIT + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > LIMIT {
        true => Err(IoError::new(
            ErrorKind::FileTooLarge,
            format!("it is longer than {LIMIT} bytes"),
        )),
        false => Ok(bytes),
    }
}

/// Reads a whole file; `None` if it does not exist.
pub fn read_opt(path: &Path) -> Result<Option<Vec<u8>>> {
    let read = || match chase(path, LastLink::Follow)?.found {
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
    chase(path, LastLink::Follow)
        .and_then(|place| replace_in(&place, bytes, mode))
        .map_err(|error| Error::at("write", path, error))
}

/// Like [`replace`], but replaces a symbolic link instead of following it.
pub fn replace_name(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    chase(path, LastLink::Keep)
        .and_then(|mut place| {
            place.found = None;
            replace_in(&place, bytes, mode)
        })
        .map_err(|error| Error::at("write", path, error))
}

fn replace_in(place: &Chased, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    let old = place.found.as_ref().map(stat_fd).transpose();
    let old = old.map_err(lost)?;
    old.as_ref().map_or(Ok(()), is_regular)?;
    let temporary = [b".".as_slice(), &place.name, b".cowl"].concat();
    // An interrupted command may have left it.
    unlink(place, &temporary)?;
    let write = || -> std::io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW;
        let made = node::create(place.dir.as_fd(), &temporary, 0o600, flags).map_err(lost)?;
        let mut file = File::from(made);
        file.write_all(bytes)?;
        if let Some(old) = &old {
            fchown(&file, Some(old.uid), Some(old.gid))?;
        }
        let mode = old.as_ref().map_or(mode, |old| old.mode & 0o7777);
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        rustix::fs::renameat(
            &place.dir,
            temporary.as_slice(),
            &place.dir,
            place.name.as_slice(),
        )?;
        Ok(())
    };
    if let Err(error) = write() {
        unlink(place, &temporary)?;
        return Err(error);
    }
    dir::sync_dir(place.dir.as_fd()).map_err(lost)
}

fn unlink(place: &Chased, name: &[u8]) -> std::io::Result<()> {
    match rustix::fs::unlinkat(&place.dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Copies a regular file to a new one, with its mode. A symbolic link is not followed.
pub fn copy_new(from: &Path, to: &Path) -> Result<()> {
    let copy = || -> std::io::Result<()> {
        let found = chase(from, LastLink::Keep)?.found;
        let found = found.ok_or(ErrorKind::NotFound)?;
        let stat = stat_fd(&found).map_err(lost)?;
        is_regular(&stat)?;
        let mut source = File::from(content::reopen(found.as_fd(), OFlags::RDONLY).map_err(lost)?);
        let place = chase(to, LastLink::Keep)?;
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW;
        let made = node::create(place.dir.as_fd(), &place.name, 0o600, flags).map_err(lost)?;
        let mut target = File::from(made);
        std::io::copy(&mut source, &mut target)?;
        target.set_permissions(Permissions::from_mode(stat.mode & 0o777))
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
    fn only_regular_files_are_read_and_only_so_much_of_them() {
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
        for (path, why) in [
            (at("fifo"), "not a regular file"),
            (Path::new("/dev/null").to_owned(), "not a regular file"),
            (dir.path().to_owned(), "directory"),
        ] {
            let error = read_opt(&path).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
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
                .contains("longer")
        );
    }

    #[test]
    fn what_is_replaced_keeps_its_mode_and_a_link_stays_one() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "old").unwrap();
        std::fs::set_permissions(at("file"), Permissions::from_mode(0o604)).unwrap();
        symlink("file", at("link")).unwrap();
        // What a killed command left does not hold it up, not even a link.
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
        assert!(copy_new(&at("file"), &at("copy")).is_err(), "it is there");
        assert!(
            copy_new(&at("again"), &at("other")).is_err(),
            "a link is not followed"
        );
        assert_eq!(read_opt(&at("other")).unwrap(), None);
    }
}
