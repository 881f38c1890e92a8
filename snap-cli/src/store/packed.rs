//! The blobs that the layers of a store were packed to for an image: their digests and sizes.
//!
//! With such a record, a push can ask a registry for a blob before it reads and compresses the layer. A record is a claim:
//! it never replaces the content. If the registry lacks the blob, the layer is packed again, and the result counts.
//!
//! The record of a layer is removed with it. A record that cannot be read is ignored, and replaced by the next push.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::manifest::{LayerId, LayerManifest};
use super::record::{Body, Record};
use super::{Store, disk};
use crate::archive::image_source::Digest;
use crate::archive::oci::{LayerCompression, PackedLayer};
use crate::error::Result;

/// The version of the form in which layers are written. Another form results in other blobs.
const FORM: u32 = 1;

/// The maximum number of blobs that are recorded for a layer: it can be packed with each compression, and over the layers of
/// several snapshots.
const MAX_BLOBS: usize = 4;

/// The record of a layer: `layers/<uuid>/packed.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct PackedRecord {
    /// The blobs, the latest first.
    blobs: Vec<PackedBlob>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    extra: Map<String, Value>,
}

impl Body for PackedRecord {
    const TYPE_NAME: &'static str = "packed layer";
}

/// A blob of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PackedBlob {
    /// The identity of what was packed.
    key: Digest,
    /// The digest of the uncompressed content.
    diff_id: Digest,
    /// The digest of the blob.
    digest: Digest,
    /// The size of the blob in bytes.
    size: u64,
}

/// The difference of two states, topmost layer first, that is packed as one layer of an image.
#[derive(Clone, Copy, Debug)]
pub struct Difference<'s> {
    /// The layers of the state below; none for the lowest layer of the image.
    pub old: &'s [LayerId],
    /// The layers of the state.
    pub new: &'s [LayerId],
    /// The compression.
    pub compression: LayerCompression,
}

impl Difference<'_> {
    /// Returns the identity of the blob: frozen layers do not change, so that their ids determine the content.
    fn key(&self) -> Digest {
        let mut text = format!(
            "{FORM} {} {}\n",
            env!("CARGO_PKG_VERSION"),
            self.compression.media_type()
        );
        for (name, stack) in [("old", self.old), ("new", self.new)] {
            for id in stack {
                text.push_str(&format!("{name} {id}\n"));
            }
        }
        Digest::of(text.as_bytes())
    }

    /// Returns whether the content of all layers is known to be durable: a power cut may change that of others.
    fn is_durable(&self, store: &Store) -> Result<bool> {
        for id in self.new {
            let layer = disk::read::<LayerManifest>(&store.paths().layer_file(*id))?;
            if layer.body.unsynced {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Returns the blob that the difference was packed to, if it is recorded.
    ///
    /// The caller must hold a shared lock of the store.
    pub fn find(&self, store: &Store) -> Result<Option<PackedLayer>> {
        let Some(top) = self.new.first() else {
            return Ok(None);
        };
        if !self.is_durable(store)? {
            return Ok(None);
        }
        let key = self.key();
        let known = read(store, *top).map_or_else(Vec::new, |record| record.body.blobs);
        let found = known.into_iter().find(|blob| blob.key == key);
        Ok(found.map(|blob| PackedLayer {
            media_type: self.compression.media_type(),
            digest: blob.digest,
            size: blob.size,
            diff_id: blob.diff_id,
        }))
    }

    /// Records the blob that the difference was packed to. A failure, for example on a full disk, is only logged.
    ///
    /// The caller must hold a shared lock of the store.
    pub fn record(&self, store: &Store, layer: &PackedLayer) {
        let Some(top) = self.new.first() else {
            return;
        };
        let recorded = self.is_durable(store).and_then(|is_durable| {
            if !is_durable {
                return Ok(());
            }
            let key = self.key();
            let known = read(store, *top);
            let mut body = known
                .as_ref()
                .map_or_else(PackedRecord::default, |record| record.body.clone());
            body.blobs.retain(|blob| blob.key != key);
            body.blobs.insert(
                0,
                PackedBlob {
                    key,
                    diff_id: layer.diff_id.clone(),
                    digest: layer.digest.clone(),
                    size: layer.size,
                },
            );
            body.blobs.truncate(MAX_BLOBS);
            let next = match &known {
                Some(record) => record.next(body),
                None => Record::first(body),
            };
            disk::replace(&store.paths().layer_packed(*top), &next)
        });
        if let Err(error) = recorded {
            log::debug!("cannot record the blob of a layer: {error}");
        }
    }
}

/// Reads the record of a layer; `None` if there is none that can be read.
fn read(store: &Store, id: LayerId) -> Option<Record<PackedRecord>> {
    match disk::read_opt(&store.paths().layer_packed(id)) {
        Ok(record) => record,
        Err(error) => {
            log::debug!("{error}");
            None
        }
    }
}

/// Removes the records of all layers: the content of a layer has changed, and blobs depend on the layers below. A power cut
/// does not bring them back.
pub fn forget_all(store: &Store) -> Result<()> {
    for id in store.layer_ids()? {
        let path = store.paths().layer_packed(id);
        if disk::exists(&path)? {
            disk::remove_if_exists(&path)?;
            disk::sync_parent(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::creation::Creation;
    use super::super::manifest::LayerKind;
    use super::super::tests::session;
    use super::*;

    fn layer(content: &[u8]) -> PackedLayer {
        PackedLayer {
            media_type: LayerCompression::Gzip.media_type(),
            digest: Digest::of(content),
            size: 7,
            diff_id: Digest::of(b"uncompressed"),
        }
    }

    #[test]
    fn a_record_is_used_for_the_same_layers_only() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let mut creation = Creation::begin(&store).unwrap();
        let [one, two] =
            [(); 2].map(|()| creation.create_layer(LayerKind::Base, &[], &[]).unwrap());
        let stack = [two, one];
        let difference = Difference {
            old: &stack[1..],
            new: &stack,
            compression: LayerCompression::Gzip,
        };
        assert_eq!(difference.find(&store).unwrap(), None);
        difference.record(&store, &layer(b"a"));
        assert_eq!(difference.find(&store).unwrap(), Some(layer(b"a")));
        for other in [
            Difference {
                old: &[],
                ..difference
            },
            Difference {
                new: &stack[..1],
                ..difference
            },
            Difference {
                compression: LayerCompression::Zstd,
                ..difference
            },
        ] {
            assert_eq!(other.find(&store).unwrap(), None);
        }
        difference.record(&store, &layer(b"b"));
        assert_eq!(difference.find(&store).unwrap(), Some(layer(b"b")));
        // The latest ones are retained.
        let others: Vec<_> = (0..4).map(|_| LayerId::fresh()).collect();
        for other in &others {
            let below = [*other];
            Difference {
                old: &below,
                ..difference
            }
            .record(&store, &layer(b"c"));
        }
        assert_eq!(difference.find(&store).unwrap(), None);
        difference.record(&store, &layer(b"a"));
        // A power cut may have changed a layer that is not durable.
        super::super::synced::record_unsynced(&store, one).unwrap();
        assert_eq!(difference.find(&store).unwrap(), None);
    }

    #[test]
    fn a_damaged_record_is_ignored_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let mut creation = Creation::begin(&store).unwrap();
        let one = creation.create_layer(LayerKind::Base, &[], &[]).unwrap();
        let stack = [one];
        let difference = Difference {
            old: &[],
            new: &stack,
            compression: LayerCompression::Gzip,
        };
        difference.record(&store, &layer(b"a"));
        let path = store.paths().layer_packed(one);
        let text = std::fs::read_to_string(&path).unwrap();
        for damaged in [
            text.replace("\"size\": 7", "\"size\": 8"),
            String::new(),
            "[]".to_owned(),
        ] {
            assert_ne!(damaged, text);
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(difference.find(&store).unwrap(), None);
        }
        difference.record(&store, &layer(b"b"));
        assert_eq!(difference.find(&store).unwrap(), Some(layer(b"b")));
        forget_all(&store).unwrap();
        assert!(!path.try_exists().unwrap());
        assert_eq!(difference.find(&store).unwrap(), None);
    }
}
