//! Locks on layers: exclusive for an upper layer and its work directory, shared for lower layers.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::Layer;
use crate::error::{Errno, Error, Result};
use crate::setup::{SetupError, SetupKind, shown};
use crate::sys;

/// The time limit for a lock. The daemon of an unmounted file system releases its locks shortly after the unmount.
const PATIENCE: Duration = Duration::from_secs(3);
/// The time limit for a lock without which the layer can be mounted as well.
const LIVE_PATIENCE: Duration = Duration::from_millis(300);

/// Takes the exclusive lock of a mount that writes to a directory. `role` describes the directory in the message.
pub(super) fn for_writing(
    role: &str,
    path: &Path,
    dir: BorrowedFd<'_>,
) -> Result<OwnedFd, SetupError> {
    retry_lock(path, PATIENCE, || sys::dir::lock_exclusive(dir))?.ok_or_else(|| {
        SetupError::new(
            SetupKind::Busy,
            format!("the {role} {} is in use by another mount", shown(path)),
            "unmount that one first; two mounts that write one layer would corrupt it",
        )
    })
}

/// The lock of a layer. It is released when this is dropped.
///
/// The layer's root directory is the descriptor that holds the lock, so a layer costs one descriptor. It may stay open
/// for longer than the lock is held.
#[derive(Debug)]
pub struct LayerLock {
    root: Arc<OwnedFd>,
    /// Whether dropping it releases the lock. Until a process has taken over, the lock belongs to its predecessor.
    is_owned: AtomicBool,
}

impl LayerLock {
    /// Returns the layer with the descriptor of `lock` as its root directory, and the lock.
    pub(super) fn of_layer(layer: Arc<Layer>, lock: OwnedFd) -> (Arc<Layer>, Arc<Self>) {
        let layer = layer.opened_as(lock);
        let lock = Self {
            root: layer.root.clone(),
            is_owned: AtomicBool::new(true),
        };
        (layer, Arc::new(lock))
    }

    /// Returns the exclusive lock that a predecessor of this process holds through the root directory of `layer`.
    ///
    /// The lock belongs to the open file, of which both processes have a descriptor. It is not released when this is
    /// dropped, before [`Self::assume`]. /proc/locks continues to name the predecessor.
    pub(super) fn of_predecessor(layer: &Layer) -> Arc<Self> {
        Arc::new(Self {
            root: layer.root.clone(),
            is_owned: AtomicBool::new(false),
        })
    }

    /// Makes the lock one of this process, whose predecessor has ended.
    pub(super) fn assume(&self) {
        self.is_owned.store(true, Ordering::Release);
    }

    /// Whether this is the lock of `layer`, which [`Self::of_layer`] returned.
    pub fn is_of(&self, layer: &Layer) -> bool {
        Arc::ptr_eq(&self.root, &layer.root)
    }

    /// Returns the lock that the root descriptor of `layer` holds.
    pub(super) fn inherited(layer: &Layer) -> Arc<Self> {
        Arc::new(Self {
            root: layer.root.clone(),
            is_owned: AtomicBool::new(true),
        })
    }

    /// Converts a shared lock to an exclusive one, if no other process has locked the layer.
    pub(super) fn make_exclusive(&self) -> Result<()> {
        sys::dir::lock_to_exclusive(&self.root)
    }

    /// Releases the lock.
    pub(super) fn unlock(&self) -> Result<()> {
        sys::dir::unlock(&self.root)
    }

    /// Converts an exclusive lock to a shared one. The layer is never without a lock in between.
    pub(super) fn share(&self) -> Result<()> {
        sys::dir::lock_to_shared(&self.root)
    }
}

impl Drop for LayerLock {
    fn drop(&mut self) {
        if *self.is_owned.get_mut()
            && let Err(error) = sys::dir::unlock(&self.root)
        {
            log::warn!("cannot unlock a layer: {error}");
        }
    }
}

/// Takes the shared lock that prevents a lower layer from being written or garbage-collected.
///
/// Returns the layer, whose root directory is now the locked descriptor, and the lock.
pub fn for_reading(layer: Arc<Layer>) -> Result<(Arc<Layer>, Arc<LayerLock>), SetupError> {
    let lock = retry_lock(layer.path(), PATIENCE, || {
        sys::dir::lock_shared(layer.root_fd())
    })?;
    let lock = lock.ok_or_else(|| {
        SetupError::new(
            SetupKind::Busy,
            format!("another mount writes to the layer {}", shown(layer.path())),
            "unmount that one first: a lower layer must not change",
        )
    })?;
    Ok(LayerLock::of_layer(layer, lock))
}

/// Takes a shared lock beside that of a predecessor of this process, whose root directory `layer` has.
///
/// Then /proc/locks names this process. The layer is never without a lock in between.
pub fn beside_predecessor(layer: Arc<Layer>) -> Result<(Arc<Layer>, Arc<LayerLock>)> {
    let lock = sys::dir::lock_shared(layer.root_fd())?;
    let lock = lock.ok_or(Error::Errno(Errno::BUSY))?;
    Ok(LayerLock::of_layer(layer, lock))
}

/// Like [`for_reading`], but returns no lock if another mount writes to the layer. The lock would prevent that mount
/// from being mounted again.
pub fn for_reading_live(
    layer: Arc<Layer>,
) -> Result<(Arc<Layer>, Option<Arc<LayerLock>>), SetupError> {
    let lock = retry_lock(layer.path(), LIVE_PATIENCE, || {
        sys::dir::lock_shared(layer.root_fd())
    })?;
    Ok(match lock {
        Some(lock) => {
            let (layer, lock) = LayerLock::of_layer(layer, lock);
            (layer, Some(lock))
        }
        None => (layer, None),
    })
}

/// Whether a mount writes to the layer at `path`. Returns false if that cannot be determined.
pub fn is_written(path: &Path) -> bool {
    let Ok(dir) = sys::dir::open_root(path) else {
        return false;
    };
    let lock = retry_lock(path, LIVE_PATIENCE, || sys::dir::lock_shared(dir.as_fd()));
    matches!(lock, Ok(None))
}

/// An exclusive lock of a layer. If the root directory of the layer held a shared lock, a drop restores it.
pub(super) enum Exclusive<'l> {
    Converted(&'l Layer),
    Separate {
        /// The descriptor that holds the lock.
        _lock: OwnedFd,
    },
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        if let Self::Converted(layer) = self
            && let Err(error) = sys::dir::lock_to_shared(&layer.root)
        {
            log::warn!("{}: cannot share a lock: {error}", shown(layer.path()));
        }
    }
}

/// Locks a layer exclusively. Its root directory may hold a shared lock. Fails if another mount uses the layer.
pub(super) fn exclusively(layer: &Layer) -> Result<Exclusive<'_>> {
    // A conversion that fails may have released the shared lock; the drop takes it again.
    let converted = Exclusive::Converted(layer);
    let taken = retry(PATIENCE, layer.path(), || {
        match sys::dir::lock_to_exclusive(&layer.root) {
            Ok(()) => Ok(Some(true)),
            // A descriptor that only locates the directory holds no lock.
            Err(error) if error.errno() == Errno::BADF => Ok(Some(false)),
            Err(error) if error.errno() == Errno::AGAIN => Ok(None),
            Err(error) => Err(error),
        }
    })?;
    if taken.ok_or(Error::Errno(Errno::AGAIN))? {
        return Ok(converted);
    }
    std::mem::forget(converted);
    let lock = retry(PATIENCE, layer.path(), || {
        sys::dir::lock_exclusive(layer.root_fd())
    })?;
    let lock = lock.ok_or(Error::Errno(Errno::AGAIN))?;
    Ok(Exclusive::Separate { _lock: lock })
}

/// Like [`retry`], for setting up a mount.
fn retry_lock(
    path: &Path,
    patience: Duration,
    take: impl Fn() -> Result<Option<OwnedFd>>,
) -> Result<Option<OwnedFd>, SetupError> {
    retry(patience, path, take).map_err(|error| SetupError::at("cannot lock", path, error))
}

/// Retries `take` until it returns a lock of the layer at `path`, for up to `patience`.
fn retry<T>(
    patience: Duration,
    path: &Path,
    take: impl Fn() -> Result<Option<T>>,
) -> Result<Option<T>> {
    let deadline = Instant::now() + patience;
    let mut notified = false;
    loop {
        let lock = take()?;
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
            // The process is not a daemon, or was replaced by another one since it took the lock.
            Ok(false) => notify_successors(ino),
            Err(error) => log::debug!("cannot notify pid {}: {error}", lock.pid),
        }
    }
}

/// Signals the processes that share the open file with which another process took a lock.
fn notify_successors(ino: u64) {
    for pid in sys::flocks::holders(ino) {
        if let Err(error) = sys::process::ask_to_check(pid) {
            log::debug!("cannot notify pid {pid}: {error}");
        }
    }
}
