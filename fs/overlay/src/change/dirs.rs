//! Directories in which a name changes: their state, their locks, and reserved names.

use std::sync::Arc;

use cowl_layers::locks::MutexGuard;

use crate::inode::{DirState, Inode};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::foreign::is_marker;
use cowl_layers::layer::Layer;
use cowl_layers::name::Name;

/// Returns the state of a directory; ENOENT if it was removed.
pub(super) fn require_live_dir(inode: &Inode) -> Result<DirState> {
    let dir = inode.dir()?;
    if dir.removed {
        return Err(Error::NOT_FOUND);
    }
    Ok(dir)
}

/// Returns EINVAL for a name that fuse-overlayfs's format reserves for markers, if the upper layer has that format.
pub(super) fn refuse_marker_name(upper: &Layer, name: &Name) -> Result<()> {
    if upper.is_foreign() && is_marker(name) {
        upper.warn_of_refused_marker(name);
        return Err(Error::Errno(Errno::INVAL));
    }
    Ok(())
}

/// Locks the `names` of two directories in order of their inode numbers, to prevent a deadlock.
pub(super) fn lock_both<'a>(
    first: &'a Arc<Inode>,
    second: &'a Arc<Inode>,
) -> Result<(MutexGuard<'a, ()>, Option<MutexGuard<'a, ()>>)> {
    if Arc::ptr_eq(first, second) {
        return Ok((first.names()?.lock(), None));
    }
    let (first, second) = if first.ino() < second.ino() {
        (first, second)
    } else {
        (second, first)
    };
    Ok((first.names()?.lock(), Some(second.names()?.lock())))
}
