//! Locks on layers: one mount writes an upper, any number read a lower, and nobody does both.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::Layer;
use crate::error::Result;
use crate::setup::{SetupError, SetupKind, shown};
use crate::sys;

/// How long to wait for a lock: an unmounted daemon needs a moment to let go.
const PATIENCE: Duration = Duration::from_secs(3);

/// Locks a folder for the one mount that writes there; `what` names it in the message.
pub(super) fn for_writing(
    what: &str,
    path: &Path,
    dir: BorrowedFd<'_>,
) -> Result<OwnedFd, SetupError> {
    patiently(path, || sys::dir::lock_exclusive(dir))?.ok_or_else(|| {
        SetupError::new(
            SetupKind::Busy,
            format!("the {what} {} is in use by another mount", shown(path)),
            "unmount that one first; two mounts that write one layer would destroy it",
        )
    })
}

/// Takes the shared lock that keeps a lower from being written or collected.
pub fn for_reading(layer: &Layer) -> Result<OwnedFd, SetupError> {
    patiently(layer.path(), || sys::dir::lock_shared(layer.root_fd()))?.ok_or_else(|| {
        SetupError::new(
            SetupKind::Busy,
            format!("another mount writes to the layer {}", shown(layer.path())),
            "unmount that one first: a lower layer must not change",
        )
    })
}

fn patiently(
    path: &Path,
    take: impl Fn() -> Result<Option<OwnedFd>>,
) -> Result<Option<OwnedFd>, SetupError> {
    let deadline = Instant::now() + PATIENCE;
    let mut asked = false;
    loop {
        let lock = take().map_err(|error| SetupError::at("cannot lock", path, error))?;
        if lock.is_some() || Instant::now() >= deadline {
            return Ok(lock);
        }
        if !asked {
            asked = true;
            ask_holders(path);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Has daemons that hold a lock on a layer check whether their mount is gone but for copies in other mount
/// namespaces that no process uses: then they end.
fn ask_holders(path: &Path) {
    let (Ok(meta), Ok(locks)) = (std::fs::metadata(path), sys::flocks::read()) else {
        return;
    };
    let ino = std::os::unix::fs::MetadataExt::ino(&meta);
    for lock in locks.iter().filter(|lock| lock.ino == ino) {
        match sys::process::ask_to_check(lock.pid) {
            Ok(true) => log::debug!("asked pid {} whether its mount is in use", lock.pid),
            // Of another version, or no daemon.
            Ok(false) => {}
            Err(error) => log::debug!("cannot ask pid {}: {error}", lock.pid),
        }
    }
}
