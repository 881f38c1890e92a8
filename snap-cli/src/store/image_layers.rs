//! Finds the layers that were unpacked from layers of images, so that containers share them.

use std::collections::{HashMap, HashSet};

use super::manifest::{LayerId, LayerManifest};
use super::usage::References;
use super::{Store, disk};
use crate::archive::image_source::Digest;
use crate::error::Result;

/// Whether the blobs of the layers are retained, so that an export contains them unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blobs {
    /// The blobs are retained.
    Keep,
    /// The blobs are not retained. An export compresses the layers again, which results in other digests.
    Discard,
}

/// Returns the layers with these chain ids that containers use, destroyed ones included. If blobs are
/// to be retained, only those whose blob was retained.
///
/// A layer that no manifest references may be incomplete, or is about to be removed. The caller must hold a shared lock
/// of the store until a manifest references the layers, so that they are not collected.
pub fn find(store: &Store, chain_ids: &[Digest], blobs: Blobs) -> Result<HashMap<Digest, LayerId>> {
    let wanted: HashSet<&Digest> = chain_ids.iter().collect();
    let mut found = HashMap::new();
    // Layers of unreadable containers are merely not shared.
    let (references, unreadable) = References::from_readable(store)?;
    for error in unreadable {
        log::debug!("{error}");
    }
    for id in store.layer_ids()? {
        if references.count(id) == 0 {
            continue;
        }
        let layer = match disk::read::<LayerManifest>(&store.paths().layer_file(id)) {
            Ok(record) => record.body,
            Err(error) => {
                log::debug!("{error}");
                continue;
            }
        };
        if let Some(image) = layer.image
            && !layer.unsynced
            && !image.incomplete
            && wanted.contains(&image.chain_id)
            && (blobs == Blobs::Discard || image.blob.is_some())
            && disk::is_dir(&store.paths().layer_tree(id))?
        {
            found.entry(image.chain_id).or_insert(id);
        }
    }
    Ok(found)
}

/// Records that a layer lacks a part of the layer of its image, or was changed, so that it is not shared.
pub fn mark_incomplete(store: &Store, id: LayerId) -> Result<()> {
    let path = store.paths().layer_file(id);
    let record = disk::read::<LayerManifest>(&path)?;
    let mut body = record.body.clone();
    match &mut body.image {
        Some(image) if !image.incomplete => image.incomplete = true,
        Some(_) | None => return Ok(()),
    }
    disk::replace(&path, &record.next(body))
}

#[cfg(test)]
mod tests {
    use super::super::creation::Creation;
    use super::super::image_record::ImageLayerRecord;
    use super::super::manifest::{ContainerManifest, LayerKind};
    use super::super::name::ContainerName;
    use super::super::record::Record;
    use super::super::tests::session;
    use super::*;

    #[test]
    fn only_layers_of_containers_are_shared() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let digest = Digest::of(b"layer");
        let record = LayerManifest {
            image: Some(ImageLayerRecord {
                diff_id: digest.clone(),
                chain_id: digest.clone(),
                blob: None,
                incomplete: false,
                extra: serde_json::Map::new(),
            }),
            ..LayerManifest::new(LayerKind::Base, &[], &[])
        };
        let mut creation = Creation::begin(&store).unwrap();
        let layer = creation.create_layer_from(record).unwrap();
        let find = || super::find(&store, std::slice::from_ref(&digest), Blobs::Discard).unwrap();
        // Its import may still fail.
        assert!(find().is_empty());
        let tree = store.paths().layer_tree(layer);
        let head = creation.create_head(&[layer], &tree).unwrap();
        let id = creation.create_container().unwrap();
        let name = ContainerName::parse("web").unwrap();
        let manifest = ContainerManifest::new(name, head, &[layer]);
        disk::replace(&store.paths().container_file(id), &Record::first(manifest)).unwrap();
        creation.finish().unwrap();
        assert_eq!(find()[&digest], layer);
        let find_other = |digest: &Digest, blobs| {
            super::find(&store, std::slice::from_ref(digest), blobs).unwrap()
        };
        assert!(find_other(&Digest::of(b"other"), Blobs::Discard).is_empty());
        assert!(find_other(&digest, Blobs::Keep).is_empty());
        std::fs::remove_dir(&tree).unwrap();
        assert!(find().is_empty());
    }
}
