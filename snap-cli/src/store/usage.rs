//! What names which layers, and what goes when some of it does.
//!
//! A state names the layers of its stack: what each container is now, and each of its snapshots, those of
//! destroyed containers that may still come back too. Nothing is counted up and down anywhere: it is read
//! from the manifests whenever somebody asks.

use std::collections::HashMap;
use std::os::fd::AsFd;

use cowl_layers::sys;

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

/// How many states name each layer.
#[derive(Clone, Debug, Default)]
pub struct Named(HashMap<LayerId, usize>);

impl Named {
    fn add(&mut self, stack: &[LayerId]) {
        for layer in stack {
            *self.0.entry(*layer).or_default() += 1;
        }
    }

    /// How many states name the layer.
    pub fn times(&self, layer: LayerId) -> usize {
        self.0.get(&layer).copied().unwrap_or_default()
    }

    /// The layers that nothing names any more once these states are gone, in no order.
    pub fn only_in<'a>(&self, stacks: impl IntoIterator<Item = &'a [LayerId]>) -> Vec<LayerId> {
        let mut going = Self::default();
        for stack in stacks {
            going.add(stack);
        }
        let only =
            |(layer, times): (&LayerId, &usize)| (self.times(*layer) <= *times).then_some(*layer);
        going.0.iter().filter_map(only).collect()
    }
}

impl Store {
    /// Counts what names each layer of this store. Hold a shared lock of the store.
    pub fn named(&self) -> Result<Named> {
        let (named, unread) = self.named_where_readable()?;
        match unread.into_iter().next() {
            None => Ok(named),
            Some(error) => Err(error),
        }
    }

    /// The same without the containers whose files cannot be read, and why those cannot: what they name may
    /// count as named less often than it is.
    pub fn named_where_readable(&self) -> Result<(Named, Vec<Error>)> {
        let (mut named, mut unread) = (Named::default(), Vec::new());
        for (id, record) in self.containers()? {
            unread.extend(self.add_named(&mut named, id, record).err());
        }
        for deleted in self.deleted()? {
            // Whose time is over is no reason to keep anything.
            if deleted.is_expired() {
                continue;
            }
            let mut add = || -> Result<()> {
                let manifest = self.deleted_manifest(&deleted)?.body;
                named.add(&head_layers(&manifest));
                for snapshot in &manifest.snapshots {
                    named.add(&self.snapshot_in(&deleted.dir, snapshot.id)?.stack);
                }
                Ok(())
            };
            unread.extend(add().err());
        }
        Ok((named, unread))
    }

    fn add_named(
        &self,
        named: &mut Named,
        id: ContainerId,
        record: Result<Record<ContainerManifest>>,
    ) -> Result<()> {
        let manifest = record?.body;
        named.add(&head_layers(&manifest));
        for snapshot in &manifest.snapshots {
            named.add(&self.snapshot(id, snapshot.id)?.stack);
        }
        let pending = self.pending_file(id);
        if disk::is_there(&pending)?
            && let Ok(Some(next)) = self.container_at(&pending)
        {
            named.add(&next.body.stack);
        }
        Ok(())
    }

    /// Whether some mount writes to the layer.
    pub fn is_written(&self, id: LayerId) -> Result<bool> {
        let tree = self.layer_tree(id);
        let written = sys::dir::open_root(&tree)
            .and_then(|root| Ok(sys::dir::lock_shared(root.as_fd())?.is_none()));
        match written {
            Err(error) if error.is_absent() => Ok(false),
            other => other.map_err(|error| Error::at("inspect the lock of", &tree, error)),
        }
    }

    /// Whether some mount holds the layer: each locks the layers that it reads, and the one that it writes.
    pub fn is_held(&self, id: LayerId) -> Result<bool> {
        let tree = self.layer_tree(id);
        let held = sys::dir::open_root(&tree)
            .and_then(|root| Ok(sys::dir::lock_exclusive(root.as_fd())?.is_none()));
        match held {
            Err(error) if error.is_absent() => Ok(false),
            other => other.map_err(|error| Error::at("look at the lock of", &tree, error)),
        }
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
        let mut named = Named::default();
        for stack in [
            &[head, two, one, base][..],
            &[two, one, base],
            &[one, base],
            &[one, base],
        ] {
            named.add(stack);
        }
        let only = |stacks: &[&[LayerId]]| {
            let mut only = named.only_in(stacks.iter().copied());
            only.sort_unstable();
            only
        };
        assert_eq!(only(&[&[one, base]]), []);
        assert_eq!(only(&[&[two, one, base]]), []);
        assert_eq!(only(&[&[head, two, one, base]]), [head]);
        let mut both = [head, two];
        both.sort_unstable();
        assert_eq!(only(&[&[head, two, one, base], &[two, one, base]]), both);
        assert_eq!(named.times(base), 4);
        assert_eq!(named.times(LayerId::fresh()), 0);
    }
}
