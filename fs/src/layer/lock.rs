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
pub(crate) fn for_reading(layer: &Layer) -> Result<OwnedFd, SetupError> {
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
    loop {
        let lock = take().map_err(|error| SetupError::at("cannot lock", path, error))?;
        if lock.is_some() || Instant::now() >= deadline {
            return Ok(lock);
        }
        thread::sleep(Duration::from_millis(5));
    }
}
