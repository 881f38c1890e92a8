//! Destroying containers. Their layers go with them, unless another container stands on them.

use super::Container;
use crate::error::Result;
use crate::store::manifest::ContainerId;

impl Container<'_> {
    /// Refuses if somebody uses the container; else unmounts it and takes it out of the store, with its
    /// snapshots. What it took on the disk is free when this returns, unless another command is at work.
    pub fn destroy(self) -> Result<ContainerId> {
        self.unmount(false)?;
        let (store, id) = (self.store, self.id);
        store.to_trash(store.container_dir(id), &format!("container-{id}"))?;
        drop(self);
        store.collect()?;
        Ok(id)
    }
}
