//! The number of references to each layer, and the layers that would become unreferenced.
//!
//! A state references the layers of its stack. The states are the current state and the snapshots of each container,
//! including destroyed containers that can be undeleted. The numbers are computed from the manifests each time; no
//! counters are stored.

use std::collections::HashMap;

use super::deleted::{self, Deleted};
use super::manifest::{ContainerId, ContainerManifest, LayerId, Measured};
use super::record::Record;
use super::{Store, disk};
use crate::error::{Error, Result};

/// An amount of disk space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// The size in bytes.
    pub bytes: u64,
    /// The number of inodes.
    pub inodes: u64,
    /// The number of layers.
    pub layers: u64,
}

impl From<Measured> for Space {
    fn from(layer: Measured) -> Self {
        Self {
            bytes: layer.bytes,
            inodes: layer.inodes,
            layers: 1,
        }
    }
}

impl std::ops::AddAssign for Space {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.inodes += other.inodes;
        self.layers += other.layers;
    }
}

/// The number of states that reference each layer.
#[derive(Clone, Debug, Default)]
pub struct References(HashMap<LayerId, usize>);

impl References {
    /// Counts the references to each layer of a store. The caller must hold a shared lock of the store.
    pub fn from_store(store: &Store) -> Result<Self> {
        let (references, unread) = Self::from_readable(store)?;
        match unread.into_iter().next() {
            None => Ok(references),
            Some(error) => Err(error),
        }
    }

    /// Like [`References::from_store`], but skips containers whose files cannot be read, and returns these errors.
    ///
    /// If there are errors, the counts may be too low.
    pub fn from_readable(store: &Store) -> Result<(Self, Vec<Error>)> {
        let (mut references, mut unread) = (Self::default(), Vec::new());
        for (id, record) in store.containers()? {
            unread.extend(references.add_container(store, id, record).err());
        }
        for deleted in deleted::list(store)? {
            // An expired container does not retain its layers.
            if !deleted.is_expired() {
                unread.extend(references.add_deleted(store, &deleted).err());
            }
        }
        Ok((references, unread))
    }

    /// Counts the references of a destroyed container.
    fn add_deleted(&mut self, store: &Store, deleted: &Deleted) -> Result<()> {
        let manifest = deleted::manifest(store, deleted)?.body;
        self.add(&head_layers(&manifest));
        for snapshot in &manifest.snapshots {
            self.add(&store.snapshot_in(&deleted.dir, snapshot.id)?.stack);
        }
        Ok(())
    }

    /// Counts the references of a container and of its pending change.
    fn add_container(
        &mut self,
        store: &Store,
        id: ContainerId,
        record: Result<Record<ContainerManifest>>,
    ) -> Result<()> {
        let manifest = record?.body;
        self.add(&head_layers(&manifest));
        for snapshot in &manifest.snapshots {
            self.add(&store.snapshot(id, snapshot.id)?.stack);
        }
        let pending = store.paths().pending_file(id);
        if disk::exists(&pending)?
            && let Ok(Some(next)) = store.container_at(&pending)
        {
            self.add(&next.body.stack);
        }
        Ok(())
    }

    fn add(&mut self, stack: &[LayerId]) {
        for layer in stack {
            *self.0.entry(*layer).or_default() += 1;
        }
    }

    /// Returns the number of states that reference the layer.
    pub fn count(&self, layer: LayerId) -> usize {
        self.0.get(&layer).copied().unwrap_or_default()
    }

    /// Returns the layers that become unreferenced if the states with these stacks are removed, unsorted.
    pub fn layers_only_in<'a>(
        &self,
        stacks: impl IntoIterator<Item = &'a [LayerId]>,
    ) -> Vec<LayerId> {
        let mut removed = Self::default();
        for stack in stacks {
            removed.add(stack);
        }
        let only =
            |(layer, times): (&LayerId, &usize)| (self.count(*layer) <= *times).then_some(*layer);
        removed.0.iter().filter_map(only).collect()
    }
}

/// Returns the layers that the current state of a container references, each once.
pub fn head_layers(manifest: &ContainerManifest) -> Vec<LayerId> {
    let mut layers = manifest.stack.clone();
    let more = manifest.origin.iter();
    layers.extend(more.filter(|layer| !manifest.stack.contains(layer)));
    layers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_of_removed_states_are_found_unless_other_states_reference_them() {
        let [base, one, two, head] = std::array::from_fn(|_| LayerId::fresh());
        let mut named = References::default();
        for stack in [
            &[head, two, one, base][..],
            &[two, one, base],
            &[one, base],
            &[one, base],
        ] {
            named.add(stack);
        }
        let only = |stacks: &[&[LayerId]]| {
            let mut only = named.layers_only_in(stacks.iter().copied());
            only.sort_unstable();
            only
        };
        assert_eq!(only(&[&[one, base]]), []);
        assert_eq!(only(&[&[two, one, base]]), []);
        assert_eq!(only(&[&[head, two, one, base]]), [head]);
        let mut both = [head, two];
        both.sort_unstable();
        assert_eq!(only(&[&[head, two, one, base], &[two, one, base]]), both);
        assert_eq!(named.count(base), 4);
        assert_eq!(named.count(LayerId::fresh()), 0);
    }
}
