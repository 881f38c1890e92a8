//! Directories in which a name changes: their state, their locks, and the names that they cannot have.

use std::sync::Arc;

use parking_lot::MutexGuard;

use crate::inode::{DirState, Inode};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::foreign::is_mark;
use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;

/// Returns the state of a directory; ENOENT if it was removed.
pub(super) fn live_dir(inode: &Inode) -> Result<DirState> {
    let dir = inode.dir()?;
    if dir.removed {
        return Err(Error::NOT_FOUND);
    }
    Ok(dir)
}

/// Returns EINVAL for a name that would be a marker in a layer in which names are markers.
pub(super) fn refuse_marker_name(up: &LayerDir, name: &Name) -> Result<()> {
    if up.layer().is_foreign() && is_mark(name) {
        return Err(Error::Errno(Errno::INVAL));
    }
    Ok(())
}

/// Locks the names of both directories, always in the same order.
pub(super) fn lock_both<'a>(
    one: &'a Arc<Inode>,
    two: &'a Arc<Inode>,
) -> Result<(MutexGuard<'a, ()>, Option<MutexGuard<'a, ()>>)> {
    if Arc::ptr_eq(one, two) {
        return Ok((one.names()?.lock(), None));
    }
    let (first, second) = if one.ino() < two.ino() {
        (one, two)
    } else {
        (two, one)
    };
    Ok((first.names()?.lock(), Some(second.names()?.lock())))
}
