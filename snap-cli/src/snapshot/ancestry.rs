//! The ancestry of a state: the origin of its container, and each snapshot since.

use std::collections::HashSet;

use super::ResolvedState;
use crate::error::Result;
use crate::store::Store;
use crate::store::manifest::{LayerId, SnapshotId, SnapshotRef};

/// A state in an ancestry: its snapshot, if it has one, and its layers.
pub type Ancestor = (Option<SnapshotRef>, Vec<LayerId>);

impl ResolvedState {
    /// Returns the ancestors from the oldest to this state, which is the last.
    ///
    /// Removed snapshots are skipped: their content is in the next one.
    pub fn ancestry(&self, store: &Store) -> Result<Vec<Ancestor>> {
        let manifest = &self.manifest;
        let find = |id: SnapshotId| manifest.snapshots.iter().find(|listed| listed.id == id);
        let own = self.snapshot.as_ref().map(|(snapshot, _)| snapshot.clone());
        let mut next = match &own {
            Some(snapshot) => snapshot.parent,
            None => manifest.parent,
        };
        let mut ancestry = vec![(own, self.stack.clone())];
        let mut seen = HashSet::new();
        while let Some(snapshot) = next.and_then(find) {
            if !seen.insert(snapshot.id) {
                break;
            }
            let stack = store.snapshot(self.container, snapshot.id)?.stack;
            ancestry.push((Some(snapshot.clone()), stack));
            next = snapshot.parent;
        }
        let oldest = ancestry.last().map_or(&self.stack, |(_, stack)| stack);
        if oldest.ends_with(&manifest.origin) && *oldest != manifest.origin {
            ancestry.push((None, manifest.origin.clone()));
        }
        ancestry.reverse();
        // Omit a head without changes.
        if self.snapshot.is_none()
            && let [.., (_, before), (_, last)] = ancestry.as_slice()
            && let [head, below @ ..] = last.as_slice()
            && below == before.as_slice()
            && let Some(top) = below.first()
            && store.is_untouched(*head, *top)?
        {
            ancestry.pop();
        }
        Ok(ancestry)
    }
}
