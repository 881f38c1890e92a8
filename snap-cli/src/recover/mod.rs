//! Opening and recovery of containers.
//!
//! Every command that works on a container opens it here. [`open`] locks it, completes or rolls back interrupted
//! operations, and returns the [`Container`]. The order of recovery:
//!
//! 1. Mounts of snapshots whose daemons died (`browse::tidy`).
//! 2. A head whose mount by kernel overlayfs has ended (`kernel_layers`).
//! 3. A change that was interrupted before its commit, in `container.json.next` (`Container::resolve_pending`).
//! 4. A change of files outside the store (`moving`).
//! 5. An ephemeral container whose mount has ended (`ephemeral`).
//! 6. Files that an interrupted snapshot was moving to the new head (`container::moves`).
//! 7. A merge of layers that the snapshots' manifests do not contain yet (`finish_merge`).
//! 8. The mount of a daemon that died, or that a killed command was about to replace (`mounts`).
//!
//! Snapshots that are not durable yet need no recovery: a later sync makes them durable (`container::durability`).
//! Garbage collection removes layers and snapshots that no manifest references.

mod ephemeral;
mod hostname;
mod mounts;
pub(crate) mod moving;

use crate::container::{Container, browse, kernel_layers, moves};
use crate::error::{Error, Result};
use crate::snapshot::flatten::finish_merge;
use crate::store::Store;
use crate::store::manifest::ContainerId;
use crate::store::name::ContainerName;
use crate::store::ownership;

pub use ephemeral::{end_after_serving, end_if_ephemeral};
pub use moving::complete_all;

/// Locks the container, completes or rolls back interrupted operations, and mounts it again if its daemon died.
pub fn open<'s>(store: &'s Store, name: &ContainerName) -> Result<Container<'s>> {
    let container = open_unmounted(store, name)?;
    mounts::remount(&container)?;
    Ok(container)
}

/// Whether the mount of a dead daemon was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeadMount {
    /// A dead mount was found and unmounted.
    Removed,
    /// There was no dead mount.
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

/// Completes the change outside the store that the last commit recorded.
pub fn complete_outside(container: Container<'_>) -> Result<()> {
    moving::complete(container).map(drop)
}

/// Like [`open`], for the program that manages containerd's snapshots.
pub fn open_for_containerd(store: &Store, id: ContainerId) -> Result<Container<'_>> {
    let container = recover(Container::lock_id(store, id)?)?;
    mounts::remount(&container)?;
    Ok(container)
}

/// Like [`open_to_unmount`], for the program that manages containerd's snapshots.
pub fn open_to_unmount_for_containerd(store: &Store, id: ContainerId) -> Result<Container<'_>> {
    let container = recover(Container::lock_id(store, id)?)?;
    mounts::remove_dead(&container)?;
    Ok(container)
}

/// Performs all steps of recovery except the last: the container's own mount.
///
/// Fails for a snapshot of containerd that no command may open.
fn open_unmounted<'s>(store: &'s Store, name: &ContainerName) -> Result<Container<'s>> {
    let container = Container::lock(store, name)?;
    ownership::refuse_closed(container.manifest())?;
    recover(container)
}

/// Completes or rolls back the interrupted operations on a locked container.
fn recover(container: Container<'_>) -> Result<Container<'_>> {
    let (store, name) = (container.store(), container.name().clone());
    browse::tidy(store, container.id())?;
    kernel_layers::settle_or_warn(&container);
    let container = moving::complete(container)?.ok_or_else(|| {
        Error::not_found(format!(
            "there is no container named {name}: an interrupted adopt was rolled back, or an interrupted release completed"
        ))
    })?;
    let mut container = ephemeral::end(container)?.ok_or_else(|| {
        Error::not_found(format!(
            "there is no longer a container named {name}: it was ephemeral, and its mount has ended"
        ))
    })?;
    moves::complete(&container)?;
    // This may fail on a full disk, for example. The content of all states is the same without it.
    if let Err(error) = finish_merge(&mut container) {
        log::warn!("{error}; the merge of layers of {name} is still incomplete");
    }
    Ok(container)
}
