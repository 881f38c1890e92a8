//! Ephemeral containers: they exist for one mount and are destroyed permanently when it ends.
//!
//! The manifest records the mount before it starts. From then on, an ephemeral container without a daemon is one whose
//! mount has ended, regularly or by a crash: the next command that opens it destroys it.

use super::mounts;
use crate::container::Container;
use crate::container::destroy::destroy_now;
use crate::container::state::{self, Mounted};
use crate::error::Result;
use crate::store::Store;
use crate::store::manifest::{ContainerId, ContainerManifest, Ephemeral};

/// Destroys the container if it is ephemeral and its mount has ended. Returns whether it was destroyed.
pub fn end_if_ephemeral(container: Container<'_>) -> Result<bool> {
    Ok(end(container)?.is_none())
}

/// Destroys the container if it is ephemeral and its mount has ended; otherwise returns it.
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
    log::info!("{} was ephemeral: its mount has ended", container.name());
    destroy_now(container)?;
    Ok(None)
}

/// Destroys an ephemeral container after its daemon has stopped serving.
///
/// The daemon calls this because a program other than cowl may have unmounted it.
pub fn end_after_serving(store: &Store, id: ContainerId) -> Result<()> {
    let is_ephemeral = |manifest: &ContainerManifest| manifest.ephemeral.is_some();
    if !store.container(id)?.is_some_and(|r| is_ephemeral(&r.body)) {
        return Ok(());
    }
    let lock = store.lock_container(id)?;
    let Some(record) = store.container(id)? else {
        return lock.remove();
    };
    if state::probe(store, id)? == Mounted::No {
        end(Container::from_locked(store, id, record, lock))?;
    }
    Ok(())
}
