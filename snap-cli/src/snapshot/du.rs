//! What states and containers take on the disk: for themselves, and together with others.
//!
//! A layer is counted once, when it is frozen, and that is kept; only what is being written now is counted
//! each time.

use std::collections::{HashMap, HashSet};

use crate::error::Result;
use crate::store::Store;
use crate::store::manifest::{ContainerId, ContainerManifest, LayerId, LayerKind};
use crate::store::measure;
use crate::store::name::SnapshotName;
use crate::store::sizes::Sizes;
use crate::store::usage::{References, Space, head_layers};

/// What one state takes.
#[derive(Clone, Debug)]
pub struct StateSpace {
    /// The snapshot; `None` for what the container is now.
    pub snapshot: Option<SnapshotName>,
    /// What no other state uses: free once this one is gone.
    pub unique: Space,
    /// What others use as well.
    pub shared: Space,
}

/// What a container takes.
#[derive(Clone, Debug, Default)]
pub struct ContainerSpace {
    /// Its states, oldest first; what it is now comes last.
    pub states: Vec<StateSpace>,
    /// What it began with.
    pub base: Space,
    /// What only its own states use: free once it is gone.
    pub unique: Space,
    /// All that it uses.
    pub total: Space,
}

/// Counts each layer once.
struct Counter<'s> {
    store: &'s Store,
    sizes: Sizes<'s>,
    head: LayerId,
    known: HashMap<LayerId, (LayerKind, Space)>,
}

impl Counter<'_> {
    fn layer(&mut self, id: LayerId) -> Result<(LayerKind, Space)> {
        if let Some(known) = self.known.get(&id) {
            return Ok(*known);
        }
        let found = match id == self.head {
            // It changes: nothing is kept.
            true => (LayerKind::Delta, measure::measure(self.store, id)?.0.into()),
            false => {
                let (kind, measured) = self.sizes.measured(id)?;
                (kind, measured.into())
            }
        };
        self.known.insert(id, found);
        Ok(found)
    }

    fn state(
        &mut self,
        snapshot: Option<SnapshotName>,
        stack: &[LayerId],
        named: &References,
    ) -> Result<StateSpace> {
        let (mut unique, mut shared) = (Space::default(), Space::default());
        for layer in stack {
            let (_, space) = self.layer(*layer)?;
            match named.count(*layer) {
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

/// What a container takes. `named`: what names each layer of the store ([`References::from_store`]). Hold a shared
/// lock of the store.
pub fn container(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
    named: &References,
) -> Result<ContainerSpace> {
    let mut counter = Counter {
        store,
        sizes: Sizes::read(store, id),
        head: manifest.head,
        known: HashMap::new(),
    };
    let mut found = ContainerSpace::default();
    let mut stacks = Vec::with_capacity(manifest.snapshots.len() + 1);
    for snapshot in &manifest.snapshots {
        let stack = store.snapshot(id, snapshot.id)?.stack;
        let name = Some(snapshot.name.clone());
        found.states.push(counter.state(name, &stack, named)?);
        stacks.push(stack);
    }
    let head = head_layers(manifest);
    found.states.push(counter.state(None, &head, named)?);
    stacks.push(head);
    for layer in named.layers_only_in(stacks.iter().map(Vec::as_slice)) {
        found.unique += counter.layer(layer)?.1;
    }
    let all: HashSet<_> = stacks.iter().flatten().copied().collect();
    for layer in all {
        let (kind, space) = counter.layer(layer)?;
        found.total += space;
        if kind == LayerKind::Base {
            found.base += space;
        }
    }
    counter.sizes.save();
    Ok(found)
}
