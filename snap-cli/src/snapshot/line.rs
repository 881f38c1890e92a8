//! The states that led to a state: what its container began with, and each snapshot since.

use std::collections::HashSet;

use super::State;
use crate::error::Result;
use crate::store::Store;
use crate::store::manifest::{LayerId, SnapshotId, SnapshotRef};

/// One of them: the snapshot that it is, if it is one, and its layers.
pub type Ancestor = (Option<SnapshotRef>, Vec<LayerId>);

impl State {
    /// The states that led here, the oldest first, this one last. A snapshot that was removed is passed
    /// over: what it had is in the next one.
    pub fn line(&self, store: &Store) -> Result<Vec<Ancestor>> {
        let manifest = &self.manifest;
        let find = |id: SnapshotId| manifest.snapshots.iter().find(|known| known.id == id);
        let own = self.snapshot.as_ref().map(|(snapshot, _)| snapshot.clone());
        let mut next = match &own {
            Some(snapshot) => snapshot.parent,
            None => manifest.parent,
        };
        let mut line = vec![(own, self.stack.clone())];
        let mut seen = HashSet::new();
        while let Some(snapshot) = next.and_then(find) {
            if !seen.insert(snapshot.id) {
                break;
            }
            let stack = store.snapshot(self.container, snapshot.id)?.stack;
            line.push((Some(snapshot.clone()), stack));
            next = snapshot.parent;
        }
        let oldest = line.last().map_or(&self.stack, |(_, stack)| stack);
        if oldest.ends_with(&manifest.origin) && *oldest != manifest.origin {
            line.push((None, manifest.origin.clone()));
        }
        line.reverse();
        // A head that nothing was written to adds nothing.
        if self.snapshot.is_none()
            && let [.., (_, before), (_, last)] = line.as_slice()
            && let [head, below @ ..] = last.as_slice()
            && below == before.as_slice()
            && let Some(top) = below.first()
            && store.is_untouched(*head, *top)?
        {
            line.pop();
        }
        Ok(line)
    }
}
