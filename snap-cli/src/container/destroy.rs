//! Destroying containers. Their layers go with them, unless another container stands on them.

use super::moving::{self, Leftover};
use super::{Container, Swap, lxc};
use crate::error::Result;
use crate::store::manifest::{ContainerId, ContainerManifest};

impl Container<'_> {
    /// Refuses if somebody uses the container; else unmounts it and takes it out of the store, with its
    /// snapshots. What it took on the disk is free when this returns, unless another command is at work.
    pub fn destroy(mut self) -> Result<ContainerId> {
        self.unmount(false)?;
        let (store, id) = (self.store, self.id);
        let left = self.leave_outside()?;
        store.to_trash(store.container_dir(id), &format!("container-{id}"))?;
        if let Some(left) = left {
            left.remove(&id.to_string())?;
            moving::unmark(store, id)?;
        }
        drop(self);
        store.collect()?;
        Ok(id)
    }

    /// Prepares what is to be removed outside the store once the container is gone: whoever comes next
    /// finishes that. LXC's config as it is now goes with the container.
    pub(super) fn leave_outside(&mut self) -> Result<Option<Leftover>> {
        let left = Leftover::of(self.manifest());
        if left.is_none() {
            return Ok(None);
        }
        if let Some(now) = lxc::config_copy(self) {
            let mut next = ContainerManifest {
                moving: None,
                ..self.manifest().clone()
            };
            if let Some(link) = &mut next.lxc {
                link.written = now;
            }
            self.commit(next, None, |_| Ok(Swap::Done))?;
        }
        moving::mark(self.store, self.id, &left)?;
        Ok(Some(left))
    }
}
