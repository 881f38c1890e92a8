//! Locks on layers: exclusive for an upper layer and its work directory, shared for lower layers.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::Layer;
use crate::error::Result;
use crate::setup::{SetupError, SetupKind, shown};
use crate::sys;

/// The time limit for a lock. The daemon of an unmounted file system releases its locks shortly after the unmount.
const PATIENCE: Duration = Duration::from_secs(3);

/// Takes the exclusive lock of a mount that writes to a directory. `role` describes the directory in the message.
pub(super) fn for_writing(
    role: &str,
    path: &Path,
    dir: BorrowedFd<'_>,
) -> Result<OwnedFd, SetupError> {
    retry(path, || sys::dir::lock_exclusive(dir))?.ok_or_else(|| {
        SetupError::new(
            SetupKind::Busy,
            format!("the {role} {} is in use by another mount", shown(path)),
            "unmount that one first; two mounts that write one layer would corrupt it",
        )
    })
}

/// Takes the shared lock that prevents a lower layer from being written or garbage-collected.
pub fn for_reading(layer: &Layer) -> Result<OwnedFd, SetupError> {
    retry(layer.path(), || sys::dir::lock_shared(layer.root_fd()))?.ok_or_else(|| {
        SetupError::new(
            SetupKind::Busy,
            format!("another mount writes to the layer {}", shown(layer.path())),
            "unmount that one first: a lower layer must not change",
        )
    })
}

/// Retries `take` until it returns a lock, for up to [`PATIENCE`].
fn retry(
    path: &Path,
    take: impl Fn() -> Result<Option<OwnedFd>>,
) -> Result<Option<OwnedFd>, SetupError> {
    let deadline = Instant::now() + PATIENCE;
    let mut notified = false;
    loop {
        let lock = take().map_err(|error| SetupError::at("cannot lock", path, error))?;
        if lock.is_some() || Instant::now() >= deadline {
            return Ok(lock);
        }
        if !notified {
            notified = true;
            notify_holders(path);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Signals the daemons that hold a lock on a layer to check whether their mount is still in use.
///
/// A daemon exits if the only remaining mounts are copies in other mount namespaces that no process uses.
fn notify_holders(path: &Path) {
    let (Ok(meta), Ok(locks)) = (std::fs::metadata(path), sys::flocks::read()) else {
        return;
    };
    let ino = std::os::unix::fs::MetadataExt::ino(&meta);
    for lock in locks.iter().filter(|lock| lock.ino == ino) {
        match sys::process::ask_to_check(lock.pid) {
            Ok(true) => log::debug!("notified pid {} to check its mount", lock.pid),
            // The process is a daemon of another version, or not a daemon.
            Ok(false) => {}
            Err(error) => log::debug!("cannot notify pid {}: {error}", lock.pid),
        }
    }
}
