//! Containers that are there for one mount: when it ends, they go, for good.
//!
//! That the mount began stands in the manifest before it does. From then on a container of this kind without
//! a daemon is one whose mount has ended, in whatever way: whoever finds it removes it.

use super::state::Mounted;
use super::{Container, Swap, state};
use crate::error::Result;
use crate::store::Store;
use crate::store::manifest::{ContainerId, ContainerManifest, Ephemeral};

impl Container<'_> {
    /// Notes that it is about to be mounted, or that it was not after all.
    pub(super) fn note_mount(&mut self, is: Ephemeral) -> Result<()> {
        if self.manifest().ephemeral.is_none_or(|was| was == is) {
            return Ok(());
        }
        let next = ContainerManifest {
            ephemeral: Some(is),
            ..self.manifest().clone()
        };
        self.commit(next, None, |_| Ok(Swap::Done))
    }

    /// Removes it if it was there for a mount that has ended; says whether it did.
    pub fn end_if_ephemeral(self) -> Result<bool> {
        Ok(end(self)?.is_none())
    }
}

/// Gives the container back, unless it was there for a mount that has ended.
pub(super) fn end(container: Container<'_>) -> Result<Option<Container<'_>>> {
    if container.manifest().ephemeral != Some(Ephemeral::Mounted) {
        return Ok(Some(container));
    }
    match container.mounted()? {
        Mounted::Alive(_) => return Ok(Some(container)),
        // A restore was to mount it anew.
        Mounted::Dead(state) if state.replacing => return Ok(Some(container)),
        Mounted::Dead(_) | Mounted::No => {}
    }
    container.bury()?;
    log::info!("{} was there for one mount, and is gone", container.name());
    container.destroy_now()?;
    Ok(None)
}

/// The daemon's last deed, when its mount was ended by somebody else than cowl.
pub(super) fn after_serving(store: &Store, id: ContainerId) -> Result<()> {
    let is_ephemeral = |manifest: &ContainerManifest| manifest.ephemeral.is_some();
    if !store.container(id)?.is_some_and(|r| is_ephemeral(&r.body)) {
        return Ok(());
    }
    let lock = store.lock_container(id)?;
    let Some(record) = store.container(id)? else {
        return lock.remove();
    };
    if state::look(store, id)? == Mounted::No {
        let config = None;
        end(Container {
            store,
            id,
            record,
            config,
            lock,
        })?;
    }
    Ok(())
}
