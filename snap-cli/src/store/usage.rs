//! References of manifests to layers, and which layers go with some of them.
//!
//! A state names the layers of its stack: what each container is now, and each of its snapshots, those of
//! destroyed containers that may still come back too. Nothing is counted up and down anywhere: it is read
//! from the manifests whenever somebody asks.

use std::collections::HashMap;

use super::deleted::{self, Deleted};
use super::manifest::{ContainerId, ContainerManifest, LayerId, Measured};
use super::record::Record;
use super::{Store, disk};
use crate::error::{Error, Result};

/// What something takes on the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// Bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
    /// Layers.
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

/// How many states refer to each layer.
#[derive(Clone, Debug, Default)]
pub struct References(HashMap<LayerId, usize>);

impl References {
    /// Counts the references to each layer of a store. The caller holds a shared lock of the store.
    pub fn from_store(store: &Store) -> Result<Self> {
        let (references, unread) = Self::from_readable(store)?;
        match unread.into_iter().next() {
            None => Ok(references),
            Some(error) => Err(error),
        }
    }

    /// Like [`References::from_store`], without the containers whose files cannot be read; returns why those cannot as well.
    /// The counts may be too low then.
    pub fn from_readable(store: &Store) -> Result<(Self, Vec<Error>)> {
        let (mut references, mut unread) = (Self::default(), Vec::new());
        for (id, record) in store.containers()? {
            unread.extend(references.add_container(store, id, record).err());
        }
        for deleted in deleted::list(store)? {
            // An expired container keeps no layer.
            if !deleted.is_expired() {
                unread.extend(references.add_deleted(store, &deleted).err());
            }
        }
        Ok((references, unread))
    }

    fn add_deleted(&mut self, store: &Store, deleted: &Deleted) -> Result<()> {
        let manifest = deleted::manifest(store, deleted)?.body;
        self.add(&head_layers(&manifest));
        for snapshot in &manifest.snapshots {
            self.add(&store.snapshot_in(&deleted.dir, snapshot.id)?.stack);
        }
        Ok(())
    }

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

    /// How many states name the layer.
    pub fn count(&self, layer: LayerId) -> usize {
        self.0.get(&layer).copied().unwrap_or_default()
    }

    /// The layers that nothing names any more once these states are gone, in no order.
    pub fn layers_only_in<'a>(
        &self,
        stacks: impl IntoIterator<Item = &'a [LayerId]>,
    ) -> Vec<LayerId> {
        let mut going = Self::default();
        for stack in stacks {
            going.add(stack);
        }
        let only =
            |(layer, times): (&LayerId, &usize)| (self.count(*layer) <= *times).then_some(*layer);
        going.0.iter().filter_map(only).collect()
    }
}

/// The layers that what a container is now names, each once.
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
    fn what_goes_with_what() {
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
