//! Identities of layers across stores: each is the id of the layer in the store that it was created in, and the digest of
//! its content.
//!
//! Every identity in a layer's manifest was computed here from the layer, never read from another store. A layer whose
//! content is not durable, or was changed by another program, has none.

use std::collections::{HashMap, HashSet};

use super::manifest::{LayerId, LayerIdentity, LayerManifest};
use super::usage::References;
use super::{Store, disk, received};
use crate::error::Result;
use crate::tree::error::OnProgress;
use crate::tree::{PortableDigest, digest_portable};

/// Returns the id that a layer has across stores.
pub fn id_across_stores(store: &Store, id: LayerId) -> Result<LayerId> {
    Ok(recorded(store, id)?.map_or(id, |identity| identity.id))
}

/// Returns the ids that layers have across stores. One whose manifest cannot be read has its own id.
pub fn ids_across_stores(store: &Store, ids: &HashSet<LayerId>) -> HashSet<LayerId> {
    let known = |id: &LayerId| {
        id_across_stores(store, *id).unwrap_or_else(|error| {
            log::warn!("{error}");
            *id
        })
    };
    ids.iter().map(known).collect()
}

/// Returns the recorded identity of a layer; `None` if it was never sent or received.
pub fn recorded(store: &Store, id: LayerId) -> Result<Option<LayerIdentity>> {
    let layer = disk::read::<LayerManifest>(&store.paths().layer_file(id))?.body;
    Ok(layer.identity.filter(|_| !layer.unsynced))
}

/// Returns the identity of a frozen layer. Reads the layer and records its identity if that is not known yet.
///
/// The caller must hold the layer, or a shared lock of the store.
pub fn of(store: &Store, id: LayerId, progress: OnProgress<'_>) -> Result<LayerIdentity> {
    if let Some(identity) = recorded(store, id)? {
        return Ok(identity);
    }
    let digest = digest_portable(&store.paths().layer_tree(id), store.space(), progress)?;
    let identity = LayerIdentity { id, digest };
    record_or_warn(store, id, &identity);
    Ok(identity)
}

/// Records the digest that was computed while a layer was sent. A failure, for example on a full disk, is only logged.
pub fn record_sent(store: &Store, id: LayerId, digest: PortableDigest) {
    record_or_warn(store, id, &LayerIdentity { id, digest });
}

fn record_or_warn(store: &Store, id: LayerId, identity: &LayerIdentity) {
    // A collection would remove the temporary file.
    let recorded = store
        .lock_shared()
        .and_then(|_excluding| record(store, id, identity));
    if let Err(error) = recorded {
        log::warn!("{error}; the layer will be read or sent again by the next transfer");
    }
}

/// Records the identity of a layer, unless it has one or is not durable.
pub fn record(store: &Store, id: LayerId, identity: &LayerIdentity) -> Result<()> {
    change(store, id, |body| {
        if body.identity.is_none() && !body.unsynced {
            body.identity = Some(identity.clone());
        }
    })
}

/// Removes the identity of a layer whose content may have changed.
pub fn forget(store: &Store, id: LayerId) -> Result<()> {
    change(store, id, |body| body.identity = None)
}

fn change(store: &Store, id: LayerId, change: impl FnOnce(&mut LayerManifest)) -> Result<()> {
    let path = store.paths().layer_file(id);
    let record = disk::read::<LayerManifest>(&path)?;
    let mut body = record.body.clone();
    change(&mut body);
    match body == record.body {
        true => Ok(()),
        false => disk::replace(&path, &record.next(body)),
    }
}

/// The layers of a store that have an identity.
#[derive(Debug, Default)]
pub struct KnownLayers(HashMap<LayerIdentity, LayerId>);

impl KnownLayers {
    /// Reads the identities of the layers that containers use, destroyed ones included, and of the layers of interrupted
    /// transfers.
    ///
    /// Other layers may be incomplete, or are about to be removed. The caller must hold a shared lock of the store, and hold
    /// the layers that it uses before it releases the lock.
    pub fn read(store: &Store) -> Result<Self> {
        let (references, unreadable) = References::from_readable(store)?;
        for error in unreadable {
            log::debug!("{error}");
        }
        let waiting = received::retained(store)?;
        let mut known = HashMap::new();
        for id in store.layer_ids()? {
            if references.count(id) == 0 && !waiting.contains(&id) {
                continue;
            }
            match recorded(store, id) {
                Ok(Some(identity)) if disk::is_dir(&store.paths().layer_tree(id))? => {
                    known.insert(identity, id);
                }
                Ok(_) => {}
                Err(error) => log::debug!("{error}"),
            }
        }
        Ok(Self(known))
    }

    /// Returns the layer with this identity.
    pub fn find(&self, identity: &LayerIdentity) -> Option<LayerId> {
        self.0.get(identity).copied()
    }

    /// Adds a layer that was just received.
    pub fn add(&mut self, identity: LayerIdentity, id: LayerId) {
        self.0.insert(identity, id);
    }

    /// Returns all identities, sorted.
    pub fn identities(&self) -> Vec<LayerIdentity> {
        let mut all: Vec<_> = self.0.keys().cloned().collect();
        all.sort_by(|a, b| (a.id, &a.digest).cmp(&(b.id, &b.digest)));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::super::creation::Creation;
    use super::super::manifest::LayerKind;
    use super::super::tests::session;
    use super::*;

    #[test]
    fn only_retained_layers_that_are_durable_are_known() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let mut creation = Creation::begin(&store).unwrap();
        let [one, two] =
            [(); 2].map(|()| creation.create_layer(LayerKind::Base, &[], &[]).unwrap());
        std::fs::write(store.paths().layer_tree(two).join("f"), b"x").unwrap();
        let first = of(&store, one, &mut |_| {}).unwrap();
        let second = of(&store, two, &mut |_| {}).unwrap();
        assert_ne!(first.digest, second.digest);
        assert_eq!(recorded(&store, one).unwrap(), Some(first.clone()));
        // An interrupted command may have created it.
        assert_eq!(KnownLayers::read(&store).unwrap().identities(), []);
        received::retain(&store, one).unwrap();
        received::retain(&store, two).unwrap();
        let known = KnownLayers::read(&store).unwrap();
        assert_eq!(known.find(&first), Some(one));
        let claimed = LayerIdentity {
            id: one,
            digest: second.digest,
        };
        assert_eq!(known.find(&claimed), None);
        // The head of a container can become unsynced again.
        super::super::synced::record_unsynced(&store, one).unwrap();
        forget(&store, two).unwrap();
        assert_eq!(KnownLayers::read(&store).unwrap().identities(), []);
    }
}
