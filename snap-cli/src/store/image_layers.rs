//! Finds the layers that were unpacked from layers of images, so that containers share them.

use std::collections::{HashMap, HashSet};
use std::fs::File;

use super::image_record::BlobRecord;
use super::manifest::{LayerId, LayerManifest};
use super::usage::References;
use super::{Store, disk};
use crate::archive::image_source::{Digest, VerifiedBlob};
use crate::error::{Error, Result};

/// Whether the blobs of the layers are retained, so that an export contains them unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blobs {
    /// The blobs are retained.
    Keep,
    /// The blobs are not retained. An export compresses the layers again, which results in other digests.
    Discard,
}

/// The layers with a chain id, each with the layers below it, topmost first.
pub type Candidates = HashMap<Digest, Vec<(LayerId, Vec<LayerId>)>>;

/// Returns the layers with these chain ids that containers use, destroyed ones included. If blobs are to be retained, only
/// those whose blob was retained.
///
/// Several containers can have copies of the same layer, if they were created at the same time, or if an earlier copy was
/// damaged. A layer may only be shared over the layers that it was created over.
///
/// A layer that no manifest references may be incomplete, or is about to be removed. The caller must hold a shared lock
/// of the store until a manifest references the layers, so that they are not collected.
pub fn find(store: &Store, chain_ids: &[Digest], blobs: Blobs) -> Result<Candidates> {
    let wanted: HashSet<&Digest> = chain_ids.iter().collect();
    let mut found = Candidates::new();
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
            let same = found.entry(image.chain_id).or_default();
            same.push((id, layer.over));
        }
    }
    Ok(found)
}

/// Records that another program has changed a layer, so that new containers do not share it.
pub fn mark_changed(store: &Store, id: LayerId) -> Result<()> {
    // First, because it needs no space: the disk may be full.
    super::packed::forget_all(store)?;
    mark_incomplete(store, id)?;
    super::identity::forget(store, id)
}

/// Records that a layer lacks a part of the layer of its image, so that it is not shared.
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

/// Removes the retained blob of a layer.
pub fn forget_blob(store: &Store, id: LayerId) -> Result<()> {
    let path = store.paths().layer_file(id);
    let record = disk::read::<LayerManifest>(&path)?;
    let mut body = record.body.clone();
    if let Some(image) = &mut body.image {
        image.blob = None;
    }
    // Without the blob, the layer takes less space.
    body.measured = None;
    disk::replace(&path, &record.next(body))?;
    disk::remove_if_exists(&store.paths().layer_blob(id))
}

/// Verifies the retained blob of a layer.
pub fn check_blob(store: &Store, id: LayerId, blob: &BlobRecord) -> Result<()> {
    let path = store.paths().layer_blob(id);
    let file = File::open(&path).map_err(|error| Error::at("open", &path, error))?;
    Ok(VerifiedBlob::new(file, blob.size).finish(&blob.digest)?)
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
        assert_eq!(find()[&digest], [(layer, Vec::new())]);
        let find_other = |digest: &Digest, blobs| {
            super::find(&store, std::slice::from_ref(digest), blobs).unwrap()
        };
        assert!(find_other(&Digest::of(b"other"), Blobs::Discard).is_empty());
        assert!(find_other(&digest, Blobs::Keep).is_empty());
        std::fs::remove_dir(&tree).unwrap();
        assert!(find().is_empty());
    }
}
