//! Folder descriptors: opening, and reading what is in one.

use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags, RawDir};

use crate::error::{Errno, Result};
use crate::sys::stat::FileKind;

/// One entry as the folder itself tells it.
#[derive(Clone, Debug)]
pub struct RawEntry {
    /// The name's bytes.
    pub name: Box<[u8]>,
    /// The type, where the file system tells it in the folder.
    pub kind: Option<FileKind>,
    /// The inode number told in the folder.
    pub ino: u64,
}

/// Opens a folder by its path, following links (for what a user names on the command line).
pub fn open_root(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?)
}

/// Opens the folder `name` in `dir` as an O_PATH descriptor, following no link.
pub fn open_dir(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

/// The same as one that can be read.
pub fn open_dir_to_read(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

/// Opens anything named `name` in `dir` as an O_PATH descriptor, following no link.
pub fn open_path(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

/// A readable descriptor of the folder behind an O_PATH one.
pub fn reopen_dir(dir: BorrowedFd<'_>) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, ".", flags, Mode::empty())?)
}

/// Syncs the file system that a directory lies on.
pub fn sync_fs(dir: BorrowedFd<'_>) -> Result<()> {
    Ok(rustix::fs::syncfs(reopen_dir(dir)?)?)
}

/// Reads a whole folder, without `.` and `..`, in the file system's order.
pub fn entries(dir: BorrowedFd<'_>) -> Result<Vec<RawEntry>> {
    read(&reopen_dir(dir)?)
}

/// The same by a descriptor that can be read and is at its beginning.
pub fn read(fd: &OwnedFd) -> Result<Vec<RawEntry>> {
    let mut found = Vec::new();
    let mut buffer = [MaybeUninit::uninit(); 32 * 1024];
    let mut raw = RawDir::new(fd, &mut buffer);
    while let Some(entry) = raw.next() {
        let entry = match entry {
            // A folder that was removed while open has nothing in it.
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

/// Takes the exclusive lock of a folder for as long as the returned descriptor lives;
/// `None` when somebody else holds it.
pub fn lock_exclusive(dir: BorrowedFd<'_>) -> Result<Option<OwnedFd>> {
    lock(dir, FlockOperation::NonBlockingLockExclusive)
}

/// Takes a shared lock of a folder; `None` when somebody holds the exclusive one.
pub fn lock_shared(dir: BorrowedFd<'_>) -> Result<Option<OwnedFd>> {
    lock(dir, FlockOperation::NonBlockingLockShared)
}

/// Turns an exclusive lock into a shared one.
pub fn lock_to_shared(lock: &OwnedFd) -> Result<()> {
    Ok(rustix::fs::flock(
        lock,
        FlockOperation::NonBlockingLockShared,
    )?)
}

fn lock(dir: BorrowedFd<'_>, how: FlockOperation) -> Result<Option<OwnedFd>> {
    let fd = reopen_dir(dir)?;
    match rustix::fs::flock(&fd, how) {
        Ok(()) => Ok(Some(fd)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Writes a folder's entries to the disk.
pub fn sync_dir(dir: BorrowedFd<'_>) -> Result<()> {
    crate::sys::fault::hit()?;
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
