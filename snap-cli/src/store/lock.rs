//! Locks between commands: flock(2) on files in the store's directory `locks`.
//!
//! The kernel releases a lock when its holder ends, even if it is killed, so locks never become stale. A lock file
//! contains its holder's process id and command, for the message of a command that gives up waiting.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::disk;
use crate::error::{Error, Result};
use crate::wait::poll_until;
use cowl_layers::shown::Show as _;

/// The mode of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Held by one process.
    Exclusive,
    /// Held by any number of processes; excludes an exclusive lock.
    Shared,
}

/// A held lock. Dropping it releases the lock.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    // Holds the flock.
    file: File,
}

/// The interval between attempts to acquire a lock.
const POLL: Duration = Duration::from_millis(10);

impl Lock {
    /// Acquires the lock at `path`, waiting up to `patience`.
    ///
    /// If the lock is exclusive, `command` is written to the file, for the messages of waiting commands.
    pub fn take(path: &Path, mode: Mode, command: &str, patience: Duration) -> Result<Self> {
        wait(path, patience, || Self::try_take(path, mode, command))
    }

    /// Acquires an exclusive lock without recording the holder, for locks that no other command waits for.
    pub fn take_anonymous(path: &Path, patience: Duration) -> Result<Self> {
        wait(path, patience, || {
            Self::open_and_lock(path, Mode::Exclusive)
        })
    }

    /// Acquires the lock without waiting; `None` if another process holds it.
    pub fn try_take(path: &Path, mode: Mode, command: &str) -> Result<Option<Self>> {
        let Some(mut lock) = Self::open_and_lock(path, mode)? else {
            return Ok(None);
        };
        if mode == Mode::Exclusive {
            lock.record_holder(std::process::id(), command);
        }
        Ok(Some(lock))
    }

    /// Opens the lock file, creating it if necessary, and locks it; `None` if another process holds the lock.
    fn open_and_lock(path: &Path, mode: Mode) -> Result<Option<Self>> {
        let at = |error: std::io::Error| Error::at("lock", path, error);
        let how = match mode {
            Mode::Exclusive => FlockOperation::NonBlockingLockExclusive,
            Mode::Shared => FlockOperation::NonBlockingLockShared,
        };
        loop {
            let made = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .custom_flags(disk::NO_LINK)
                .open(path);
            let file = match made {
                Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => {
                    return Self::without_writing(path, how);
                }
                other => other.map_err(at)?,
            };
            match rustix::fs::flock(&file, how) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(at(error.into())),
            }
            // Retry after a race: the file may have been removed between opening and locking it.
            if is_still_at(&file, path).map_err(at)? {
                return Ok(Some(Self {
                    path: path.to_path_buf(),
                    file,
                }));
            }
        }
    }

    /// Locks on a read-only file system, where the store can still be read.
    ///
    /// Locks the file if it exists, otherwise the directory that would contain it.
    fn without_writing(path: &Path, how: FlockOperation) -> Result<Option<Self>> {
        let at = |error: std::io::Error| Error::at("lock", path, error);
        let file = match disk::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                File::open(path.parent().unwrap_or(path)).map_err(at)?
            }
            other => other.map_err(at)?,
        };
        match rustix::fs::flock(&file, how) {
            Ok(()) => Ok(Some(Self {
                path: path.to_path_buf(),
                file,
            })),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(at(error.into())),
        }
    }

    /// Returns the lock of an open file that a predecessor of this process has locked.
    pub fn of_predecessor(path: &Path, file: OwnedFd) -> Self {
        Self {
            path: path.to_path_buf(),
            file: File::from(file),
        }
    }

    /// Returns another descriptor of the locked file. The lock is released when all of them are closed.
    pub fn share(&self) -> Result<OwnedFd> {
        let file = self.file.try_clone();
        file.map(OwnedFd::from)
            .map_err(|error| Error::at("share the lock", &self.path, error))
    }

    /// Records a process as the holder.
    pub fn record_holder(&mut self, pid: u32, command: &str) {
        let line = format!("{pid} {command}\n");
        let written = self
            .file
            .set_len(0)
            .and_then(|()| self.file.rewind())
            .and_then(|()| self.file.write_all(line.as_bytes()));
        // The holder's name only improves messages. On a full disk, where the write fails, a command that frees
        // space must still get the lock.
        if let Err(error) = written {
            log::debug!("cannot record the holder of {}: {error}", self.path.shown());
        }
    }

    /// Returns the lock as standard input for a child process that shares it. It is released when both have closed it.
    pub fn for_child(&self) -> Result<std::process::Stdio> {
        let file = self.file.try_clone();
        file.map(Into::into)
            .map_err(|error| Error::at("share the lock", &self.path, error))
    }

    /// Returns whether a process holds the lock at `path` exclusively.
    pub fn is_held(path: &Path) -> Result<bool> {
        let file = match disk::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(Error::at("inspect the lock", path, error)),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(error) => Err(Error::at("inspect the lock", path, error)),
        }
    }

    /// Returns whether a process holds the lock at `path` in any mode.
    pub fn is_used(path: &Path) -> Result<bool> {
        let file = File::open(path).map_err(|e| Error::at("inspect the lock", path, e))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(error) => Err(Error::at("inspect the lock", path, error)),
        }
    }

    /// Releases the lock and removes its file. Only for exclusive locks.
    pub fn remove(self) -> Result<()> {
        // Remove the file before releasing the lock: a waiting command notices the removal and opens a new file.
        let removed = std::fs::remove_file(&self.path);
        drop(self.file);
        match removed {
            // On a read-only file system, no file was created.
            Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => Ok(()),
            other => other.map_err(|error| Error::at("remove", &self.path, error)),
        }
    }
}

/// Repeats `attempt` until it returns a lock or `patience` is over.
fn wait(
    path: &Path,
    patience: Duration,
    attempt: impl FnMut() -> Result<Option<Lock>>,
) -> Result<Lock> {
    poll_until(Instant::now() + patience, POLL, attempt)?
        .ok_or_else(|| timeout_error(path, patience))
}

/// Returns whether `path` still refers to the open file.
fn is_still_at(file: &File, path: &Path) -> std::io::Result<bool> {
    let held = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(there) => Ok(there.dev() == held.dev() && there.ino() == held.ino()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Returns the error that names the holder of a lock.
fn timeout_error(path: &Path, waited: Duration) -> Error {
    let mut text = String::new();
    let read = disk::open(path).and_then(|mut file| file.read_to_string(&mut text));
    let holder = match (read, text.trim().split_once(' ')) {
        (Ok(_), Some((pid, command))) => format!("pid {pid} ({command})"),
        _ => "another command".to_owned(),
    };
    Error::busy(format!(
        "waited {} s for {holder}, which is still at work",
        waited.as_secs()
    ))
    .hint("try again when it has ended, or wait longer: --wait SECONDS")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_timeout_names_the_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let held = Lock::take(&path, Mode::Exclusive, "cowl snapshot web", Duration::ZERO).unwrap();
        assert!(Lock::is_held(&path).unwrap());
        let error = Lock::take(&path, Mode::Exclusive, "y", Duration::from_millis(30)).unwrap_err();
        assert_eq!(error.kind, Kind::Busy);
        assert!(error.what.contains("cowl snapshot web"), "{error}");
        assert!(
            error.what.contains(&std::process::id().to_string()),
            "{error}"
        );
        held.remove().unwrap();
        assert!(!Lock::is_held(&path).unwrap());
        assert!(!path.try_exists().unwrap());
    }

    #[test]
    fn a_symlink_in_place_of_a_lock_file_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("x"), dir.path().join("other"));
        std::os::unix::fs::symlink(&other, &path).unwrap();
        Lock::try_take(&path, Mode::Exclusive, "a").unwrap_err();
        assert!(!other.try_exists().unwrap());
    }

    #[test]
    fn shared_locks_exclude_an_exclusive_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let one = Lock::try_take(&path, Mode::Shared, "a").unwrap();
        let two = Lock::try_take(&path, Mode::Shared, "b").unwrap();
        assert!(one.is_some() && two.is_some());
        assert!(
            Lock::try_take(&path, Mode::Exclusive, "c")
                .unwrap()
                .is_none()
        );
        drop((one, two));
        assert!(
            Lock::try_take(&path, Mode::Exclusive, "c")
                .unwrap()
                .is_some()
        );
    }

    #[test]
    fn a_lock_is_exclusive_even_if_its_file_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let inside = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        let lock = Lock::take(&path, Mode::Exclusive, "t", Duration::from_secs(20));
                        let lock = lock.unwrap();
                        let before = inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        assert_eq!(before, 0);
                        inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        lock.remove().unwrap();
                    }
                });
            }
        });
    }
}
