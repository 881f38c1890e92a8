//! Opening containers: every command that works on one opens it here. [`open`] takes its lock, completes or rolls
//! back what an interrupted command or a dead daemon left, and returns the [`Container`].
//!
//! What can be left, in the order in which it is recovered:
//!
//! 1. Mounts of snapshots whose daemons died (`browse::tidy`).
//! 2. A change that was interrupted before its commit, in `container.json.next` (`Container::resolve_pending`).
//! 3. A change of files outside the store (`moving`).
//! 4. A container that existed for one mount, which has ended (`ephemeral`).
//! 5. A merge of layers whose snapshots do not say so yet (`finish_merge`).
//! 6. The mount of a daemon that died, or that a command was about to replace (`mounts`).
//!
//! What a snapshot lacks to be durable is no leftover: a later sync completes it
//! (`container::durability`). What no manifest names is collected by the store.

mod ephemeral;
mod hostname;
mod mounts;
pub(crate) mod moving;

use crate::container::{Container, browse};
use crate::error::{Error, Result};
use crate::snapshot::flatten::finish_merge;
use crate::store::Store;
use crate::store::name::ContainerName;

pub use ephemeral::{end_after_serving, end_if_ephemeral};
pub use moving::complete_all;

/// Locks the container, completes or rolls back what an interrupted command left, and mounts again what a dead
/// daemon left unmounted.
pub fn open<'s>(store: &'s Store, name: &ContainerName) -> Result<Container<'s>> {
    let container = open_unmounted(store, name)?;
    mounts::remount(&container)?;
    Ok(container)
}

/// Whether the mount of a dead daemon was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeadMount {
    /// There was one, which is unmounted now.
    Removed,
    /// There was none.
    Absent,
}

/// Like [`open`], for commands that unmount the container: the mount of a dead daemon is removed, not replaced.
pub fn open_to_unmount<'s>(
    store: &'s Store,
    name: &ContainerName,
) -> Result<(Container<'s>, DeadMount)> {
    let container = open_unmounted(store, name)?;
    let dead = match mounts::remove_dead(&container)? {
        Some(_) => DeadMount::Removed,
        None => DeadMount::Absent,
    };
    Ok((container, dead))
}

/// Completes the change outside the store that the last commit began.
pub fn complete_outside(container: Container<'_>) -> Result<()> {
    moving::complete(container).map(drop)
}

/// Recovers everything but the container's own mount.
fn open_unmounted<'s>(store: &'s Store, name: &ContainerName) -> Result<Container<'s>> {
    let container = Container::lock(store, name)?;
    browse::tidy(store, container.id())?;
    let container = moving::complete(container)?.ok_or_else(|| {
        Error::not_found(format!(
            "there is no container named {name}: an interrupted adopt was rolled back, or an interrupted release completed"
        ))
    })?;
    let mut container = ephemeral::end(container)?.ok_or_else(|| {
        Error::not_found(format!(
            "there is no container named {name} any more: it was ephemeral, and its mount has ended"
        ))
    })?;
    // On a full disk, say. Every state shows the same without it.
    if let Err(error) = finish_merge(&mut container) {
        log::warn!("{error}; a merge of layers of {name} is not complete yet");
    }
    Ok(container)
}
