//! Unpacks the layers of an archive into a store.
//!
//! Each layer with a digest is verified after it was unpacked, and then retained: if the transfer is interrupted, the next
//! attempt continues with the layers that follow. A layer that the store has already is not stored twice.

use std::collections::{HashMap, HashSet};

use cowl_layers::format::XattrSpace;

use super::manifest::{BaseEntry, LayerEntry, WholeManifest};
use crate::archive::bundle::{BundleReader, LayerFromBundle};
use crate::error::{Error, Result};
use crate::store::creation::Creation;
use crate::store::identity::{self, KnownLayers};
use crate::store::manifest::{LayerId, LayerIdentity, LayerManifest, MarkerSpace};
use crate::store::{Store, received};
use crate::tree::digest_portable;
use crate::tree::error::{OnProgress, Progress};

/// The layers of an archive in this store.
pub(super) struct Arrival {
    /// The ids in this store, by those in the archive.
    pub(super) ids: HashMap<LayerId, LayerId>,
    /// The layers that were created and are not retained by the directory `received`.
    pub(super) created: usize,
    /// The number of layers that the store had already, whether the archive contains them or not.
    pub(super) shared: usize,
    /// Notes on attributes that the user cannot store.
    pub(super) notes: Vec<String>,
}

impl Arrival {
    /// Returns the layers in this store.
    pub(super) fn local(&self) -> HashSet<LayerId> {
        self.ids.values().copied().collect()
    }
}

/// Unpacks the layers, and reads the archive to its end.
///
/// After an error, complete layers with a digest are retained for a while; `creation` removes the others. It holds the layers
/// of the archive, those that the store had already included.
pub(super) fn unpack(
    store: &Store,
    creation: &mut Creation<'_>,
    manifest: &WholeManifest,
    mut archive: BundleReader<'_>,
    progress: OnProgress<'_>,
) -> Result<Arrival> {
    let from = match manifest.marks {
        MarkerSpace::Trusted => XattrSpace::Trusted,
        MarkerSpace::User => XattrSpace::User,
    };
    let total = manifest.bytes;
    let mut layers = Layers {
        store,
        from,
        known: known_layers(store)?,
        ids: HashMap::new(),
        retained: 0,
    };
    for entry in &manifest.base {
        layers.find_base(creation, entry, &mut archive)?;
    }
    let (mut created, mut shared) = (0, manifest.base.len());
    let mut progress = |done| progress(Progress { total, ..done });
    for entry in &manifest.layers {
        let unpacked = layers.unpack(creation, entry, &mut archive, &mut progress);
        match unpacked.map_err(|error| layers.describe_rest(error, manifest))? {
            Stored::Created => created += 1,
            Stored::Shared => shared += 1,
        }
    }
    let notes = archive.finish()?.notes.lines();
    Ok(Arrival {
        ids: layers.ids,
        created,
        shared,
        notes,
    })
}

/// Reads the layers of the store. Those that are used must be held, because the lock is released.
fn known_layers(store: &Store) -> Result<KnownLayers> {
    let _reading = store.lock_shared_in_transfer()?;
    KnownLayers::read(store)
}

/// Whether an unpacked layer is new in the store.
enum Stored {
    Created,
    Shared,
}

/// The state of [`unpack`].
struct Layers<'s> {
    store: &'s Store,
    /// The namespace of the markers in the archive.
    from: XattrSpace,
    known: KnownLayers,
    ids: HashMap<LayerId, LayerId>,
    /// The number of layers that the next attempt need not receive again.
    retained: usize,
}

impl Layers<'_> {
    /// Finds a layer that the archive does not contain.
    fn find_base(
        &mut self,
        creation: &mut Creation<'_>,
        entry: &BaseEntry,
        archive: &mut BundleReader<'_>,
    ) -> Result<()> {
        let Some(local) = self.find(creation, &entry.identity)? else {
            return Err(Error::failed(format!(
                "cannot receive the snapshots: this store lacks the layer {}, which they are based on",
                entry.identity.id
            ))
            .hint(
                "send the snapshot before them as well, or everything; `cowl copy` sends what is missing",
            ));
        };
        if self.is_taken(local) {
            return Err(Error::failed(format!(
                "cannot use the archive: it refers to the layer {} twice",
                entry.identity.id
            ))
            .hint("it is damaged: create it again"));
        }
        let tree = self.store.paths().layer_tree(local);
        archive.read_base(&entry.id.to_string(), &tree, self.store.space())?;
        self.ids.insert(entry.id, local);
        Ok(())
    }

    /// Returns the layer with an identity, which is held from here on. It may have been removed or changed since the
    /// identities were read.
    fn find(
        &self,
        creation: &mut Creation<'_>,
        identity: &LayerIdentity,
    ) -> Result<Option<LayerId>> {
        let Some(local) = self.known.find(identity) else {
            return Ok(None);
        };
        // `cowl release` tests whether a layer is held, and moves it, under the exclusive lock.
        let _reading = self.store.lock_shared_in_transfer()?;
        let is_same = creation.hold(local)?
            && identity::recorded(self.store, local)?.as_ref() == Some(identity);
        Ok(is_same.then_some(local))
    }

    /// Maps layer ids to those of this store. Ids that are not in the archive are dropped: they can be those of layers that
    /// this store has, and a repair would rebuild a snapshot with them.
    fn known_ids(&self, ids: &[LayerId]) -> Vec<LayerId> {
        ids.iter()
            .filter_map(|id| self.ids.get(id).copied())
            .collect()
    }

    /// Returns whether a layer of this store stands for a layer of the archive.
    fn is_taken(&self, local: LayerId) -> bool {
        self.ids.values().any(|taken| *taken == local)
    }

    fn unpack(
        &mut self,
        creation: &mut Creation<'_>,
        entry: &LayerEntry,
        archive: &mut BundleReader<'_>,
        progress: OnProgress<'_>,
    ) -> Result<Stored> {
        let store = self.store;
        let LayerEntry {
            id,
            known_as,
            layer,
        } = entry;
        let layer = LayerManifest {
            over: self.known_ids(&layer.over),
            stands_for: self.known_ids(&layer.stands_for),
            ..layer.clone().without_records()
        };
        let made = creation.create_layer_from(layer)?;
        let tree = store.paths().layer_tree(made);
        let spaces = (self.from, store.space());
        let read = archive.read_layer(&id.to_string(), &tree, spaces, progress)?;
        let verified = self.verify(*known_as.as_ref().unwrap_or(id), made, &read)?;
        let Some(identity) = verified else {
            self.ids.insert(*id, made);
            return Ok(Stored::Created);
        };
        let same = self.find(creation, &identity)?;
        if same.is_some_and(|same| self.is_taken(same)) {
            // Two layers of a hostile archive with one identity: a stack contains each layer once.
            self.ids.insert(*id, made);
            return Ok(Stored::Created);
        }
        if let Some(same) = same {
            let same_tree = store.paths().layer_tree(same);
            archive.replace_layer(&read, &tree, (&same_tree, store.space()))?;
            creation.discard_layer(made)?;
            self.ids.insert(*id, same);
            return Ok(Stored::Shared);
        }
        // The layer must be durable before anything relies on it.
        creation.sync_content()?;
        {
            let _excluding = store.lock_shared_in_transfer()?;
            identity::record(store, made, &identity)?;
            received::retain(store, made)?;
        }
        creation.retain_layer(made);
        self.ids.insert(*id, made);
        self.known.add(identity, made);
        self.retained += 1;
        Ok(Stored::Created)
    }

    /// Compares an unpacked layer with the digest in the archive. Returns its identity; `None` if the archive has no digest,
    /// or if the layer could not be stored exactly.
    fn verify(
        &self,
        id: LayerId,
        made: LayerId,
        read: &LayerFromBundle,
    ) -> Result<Option<LayerIdentity>> {
        let Some(sent) = &read.digest else {
            return Ok(None);
        };
        let tree = self.store.paths().layer_tree(made);
        let digest = digest_portable(&tree, self.store.space(), &mut |_| {})?;
        if digest == *sent {
            return Ok(Some(LayerIdentity { id, digest }));
        }
        if read.has_notes {
            return Ok(None);
        }
        Err(Error::failed(format!(
            "the layer {id} differs from its digest after it was stored"
        ))
        .hint(
            "check the container where it was sent from: cowl check --deep; if it is intact there, \
             this file system cannot store the layer exactly",
        ))
    }

    /// Adds to an error what the next attempt need not receive again.
    fn describe_rest(&self, error: Error, manifest: &WholeManifest) -> Error {
        if self.retained == 0 {
            return error;
        }
        let before = match &error.hint {
            Some(hint) => format!("{hint}; "),
            None if error.is_no_space() => {
                "free some space (`cowl gc --empty-transfers` frees what interrupted transfers use); ".to_owned()
            }
            None => String::new(),
        };
        error.hint(format!(
            "{before}{} of {} layers are complete and retained for {} days: `cowl copy`, or `cowl send` with the \
             output of `cowl receive --have`, continues with the layers that follow",
            self.retained,
            manifest.layers.len(),
            received::RETENTION_DAYS
        ))
    }
}
