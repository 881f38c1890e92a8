//! Disk usage of states and containers: exclusive and shared.
//!
//! A layer is measured once, when it is frozen, and the result is stored. Only the head is measured each time.

use std::collections::{HashMap, HashSet};

use crate::error::Result;
use crate::store::Store;
use crate::store::manifest::{ContainerId, ContainerManifest, LayerId, LayerKind};
use crate::store::measure;
use crate::store::name::SnapshotName;
use crate::store::sizes::Sizes;
use crate::store::usage::{References, Space, head_layers};

/// The disk usage of one state.
#[derive(Clone, Debug)]
pub struct StateSpace {
    /// The snapshot; `None` for the container's current state.
    pub snapshot: Option<SnapshotName>,
    /// Space that only this state uses, and that its removal frees.
    pub unique: Space,
    /// Space that other states use as well.
    pub shared: Space,
}

/// The disk usage of a container.
#[derive(Clone, Debug, Default)]
pub struct ContainerSpace {
    /// The container's states, oldest first; the current state is the last.
    pub states: Vec<StateSpace>,
    /// The space of the base layers.
    pub base: Space,
    /// Space that only the container's states use, and that its removal frees.
    pub unique: Space,
    /// All space that the container uses.
    pub total: Space,
}

/// Measures each layer at most once.
struct Counter<'s> {
    store: &'s Store,
    sizes: Sizes<'s>,
    /// The layer that is written to.
    head: Option<LayerId>,
    measured: HashMap<LayerId, (LayerKind, Space)>,
}

impl Counter<'_> {
    fn measure_layer(&mut self, id: LayerId) -> Result<(LayerKind, Space)> {
        if let Some(measured) = self.measured.get(&id) {
            return Ok(*measured);
        }
        let found = match Some(id) == self.head {
            // The head changes, so its size is not stored.
            true => (LayerKind::Delta, measure::measure(self.store, id)?.0.into()),
            false => {
                let (kind, measured) = self.sizes.measured(id)?;
                (kind, measured.into())
            }
        };
        self.measured.insert(id, found);
        Ok(found)
    }

    fn measure_state(
        &mut self,
        snapshot: Option<SnapshotName>,
        stack: &[LayerId],
        references: &References,
    ) -> Result<StateSpace> {
        let (mut unique, mut shared) = (Space::default(), Space::default());
        for layer in stack {
            let (_, space) = self.measure_layer(*layer)?;
            match references.count(*layer) {
                0 | 1 => unique += space,
                _ => shared += space,
            }
        }
        Ok(StateSpace {
            snapshot,
            unique,
            shared,
        })
    }
}

/// Measures the disk usage of a container and of each of its states.
///
/// `references` are those of the whole store ([`References::from_store`]). The caller must hold a shared lock of the
/// store.
pub fn measure_container(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
    references: &References,
) -> Result<ContainerSpace> {
    let mut counter = Counter {
        store,
        sizes: Sizes::read(store, id),
        head: manifest.written_head(),
        measured: HashMap::new(),
    };
    let mut found = ContainerSpace::default();
    let mut stacks = Vec::with_capacity(manifest.snapshots.len() + 1);
    for snapshot in &manifest.snapshots {
        let stack = store.snapshot(id, snapshot.id)?.stack;
        let name = Some(snapshot.name.clone());
        found
            .states
            .push(counter.measure_state(name, &stack, references)?);
        stacks.push(stack);
    }
    let head = head_layers(manifest);
    found
        .states
        .push(counter.measure_state(None, &head, references)?);
    stacks.push(head);
    for layer in references.layers_only_in(stacks.iter().map(Vec::as_slice)) {
        found.unique += counter.measure_layer(layer)?.1;
    }
    let all: HashSet<_> = stacks.iter().flatten().copied().collect();
    for layer in all {
        let (kind, space) = counter.measure_layer(layer)?;
        found.total += space;
        if kind == LayerKind::Base {
            found.base += space;
        }
    }
    counter.sizes.save();
    Ok(found)
}
