//! Containers that exist for one mount: when it ends, they are destroyed for good.
//!
//! The manifest says that the mount began before it does. From then on a container of this kind without a daemon
//! is one whose mount has ended, in whatever way: the next command that opens it destroys it.

use super::mounts;
use crate::container::Container;
use crate::container::destroy::destroy_now;
use crate::container::state::{self, Mounted};
use crate::error::Result;
use crate::store::Store;
use crate::store::manifest::{ContainerId, ContainerManifest, Ephemeral};

/// Destroys the container if it existed for a mount that has ended. Returns whether it did.
pub fn end_if_ephemeral(container: Container<'_>) -> Result<bool> {
    Ok(end(container)?.is_none())
}

/// Returns the container, unless it existed for a mount that has ended: then it is destroyed.
pub(super) fn end(container: Container<'_>) -> Result<Option<Container<'_>>> {
    if container.manifest().ephemeral != Some(Ephemeral::Mounted) {
        return Ok(Some(container));
    }
    match container.mounted()? {
        Mounted::Alive(_) => return Ok(Some(container)),
        // A restore was about to mount it again.
        Mounted::Dead(state) if state.replacing => return Ok(Some(container)),
        Mounted::Dead(_) | Mounted::No => {}
    }
    mounts::remove_dead(&container)?;
    log::info!("{} was there for one mount, and is gone", container.name());
    destroy_now(container)?;
    Ok(None)
}

/// Like [`end_if_ephemeral`], for a daemon whose mount was ended by another program than cowl.
pub fn end_after_serving(store: &Store, id: ContainerId) -> Result<()> {
    let is_ephemeral = |manifest: &ContainerManifest| manifest.ephemeral.is_some();
    if !store.container(id)?.is_some_and(|r| is_ephemeral(&r.body)) {
        return Ok(());
    }
    let lock = store.lock_container(id)?;
    let Some(record) = store.container(id)? else {
        return lock.remove();
    };
    if state::look(store, id)? == Mounted::No {
        end(Container::from_locked(store, id, record, lock))?;
    }
    Ok(())
}
