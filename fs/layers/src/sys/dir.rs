//! Opens, reads, locks and syncs directories.

use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags, RawDir};

use super::open;
use crate::error::{Errno, Result};
use crate::sys::stat::FileKind;

/// A directory entry as getdents64(2) returns it.
#[derive(Clone, Debug)]
pub struct RawEntry {
    /// The name.
    pub name: Box<[u8]>,
    /// The type; `None` if the file system does not report it (DT_UNKNOWN).
    pub kind: Option<FileKind>,
    /// The inode number.
    pub ino: u64,
}

/// Opens a directory by its path, with O_PATH. Follows links, because the path is from a user.
pub fn open_root(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(open::openat(CWD, path, flags, Mode::empty())?)
}

/// Opens the directory `name` in `dir`, with O_PATH. Does not follow links.
pub fn open_dir(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(open::openat(dir, name, flags, Mode::empty())?)
}

/// Opens the directory `name` in `dir` for reading. Does not follow links.
pub fn open_dir_to_read(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(open::openat(dir, name, flags, Mode::empty())?)
}

/// Opens the object `name` in `dir`, of any type, with O_PATH. Does not follow links.
pub fn open_path(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(open::openat(dir, name, flags, Mode::empty())?)
}

/// Opens a directory for reading, given any descriptor of it.
pub fn reopen_dir(dir: BorrowedFd<'_>) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(open::openat(dir, ".", flags, Mode::empty())?)
}

/// Syncs the file system that holds a directory.
pub fn sync_fs(dir: BorrowedFd<'_>) -> Result<()> {
    Ok(rustix::fs::syncfs(reopen_dir(dir)?)?)
}

/// Returns all entries of a directory except for `.` and `..`, in the order of the file system.
pub fn entries(dir: BorrowedFd<'_>) -> Result<Vec<RawEntry>> {
    read(&reopen_dir(dir)?)
}

/// Like [`entries`], for a descriptor that is open for reading and at offset 0.
pub fn read(fd: &OwnedFd) -> Result<Vec<RawEntry>> {
    let mut found = Vec::new();
    let mut buffer = [MaybeUninit::uninit(); 32 * 1024];
    let mut raw = RawDir::new(fd, &mut buffer);
    while let Some(entry) = raw.next() {
        let entry = match entry {
            // An open directory that was removed is empty.
            Err(Errno::NOENT) => break,
            other => other?,
        };
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        found.push(RawEntry {
            name: name.into(),
            kind: kind_of(entry.file_type()),
            ino: entry.ino(),
        });
    }
    Ok(found)
}

fn kind_of(kind: FileType) -> Option<FileKind> {
    Some(match kind {
        FileType::RegularFile => FileKind::Regular,
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Symlink,
        FileType::Fifo => FileKind::Fifo,
        FileType::Socket => FileKind::Socket,
        FileType::CharacterDevice => FileKind::CharDevice,
        FileType::BlockDevice => FileKind::BlockDevice,
        FileType::Unknown => return None,
    })
}

/// Takes an exclusive flock on a directory, which the returned descriptor holds.
///
/// Returns `None` if another open file description holds a lock on it.
pub fn lock_exclusive(dir: BorrowedFd<'_>) -> Result<Option<OwnedFd>> {
    lock(dir, FlockOperation::NonBlockingLockExclusive)
}

/// Takes a shared flock on a directory, which the returned descriptor holds.
///
/// Returns `None` if another open file description holds an exclusive lock on it.
pub fn lock_shared(dir: BorrowedFd<'_>) -> Result<Option<OwnedFd>> {
    lock(dir, FlockOperation::NonBlockingLockShared)
}

/// Converts an exclusive flock to a shared one.
pub fn lock_to_shared(lock: &OwnedFd) -> Result<()> {
    Ok(rustix::fs::flock(
        lock,
        FlockOperation::NonBlockingLockShared,
    )?)
}

/// Converts a shared flock to an exclusive one. Fails with EWOULDBLOCK, and may lose the lock, if another one is held.
pub fn lock_to_exclusive(lock: &OwnedFd) -> Result<()> {
    Ok(rustix::fs::flock(
        lock,
        FlockOperation::NonBlockingLockExclusive,
    )?)
}

/// Returns another descriptor of the same open file description.
pub fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, 3)?)
}

/// Releases the flock that a descriptor holds.
pub fn unlock(lock: &OwnedFd) -> Result<()> {
    Ok(rustix::fs::flock(lock, FlockOperation::Unlock)?)
}

fn lock(dir: BorrowedFd<'_>, how: FlockOperation) -> Result<Option<OwnedFd>> {
    let fd = reopen_dir(dir)?;
    match rustix::fs::flock(&fd, how) {
        Ok(()) => Ok(Some(fd)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Makes the entries of a directory durable (fsync(2)).
pub fn sync_dir(dir: BorrowedFd<'_>) -> Result<()> {
    let _change = crate::sys::fault::begin()?;
    Ok(rustix::fs::fsync(reopen_dir(dir)?)?)
}

/// Reads the target of the symbolic link `name` in `dir`.
pub fn readlink(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Vec<u8>> {
    Ok(rustix::fs::readlinkat(dir, name, Vec::new())?.into_bytes())
}

/// Reads the target of the symbolic link behind an O_PATH descriptor.
pub fn readlink_fd(link: &OwnedFd) -> Result<Vec<u8>> {
    Ok(rustix::fs::readlinkat(link, "", Vec::new())?.into_bytes())
}
