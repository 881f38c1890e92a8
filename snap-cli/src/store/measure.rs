//! Sizes of layers. A frozen layer is measured once, and its manifest records the result.

use std::os::unix::fs::MetadataExt as _;

use super::manifest::{LayerId, LayerKind, LayerManifest, Measured};
use super::record::Record;
use super::usage::Space;
use super::{Store, disk};
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// The size of a frozen layer.
#[derive(Clone, Copy, Debug)]
pub struct LayerSize {
    /// The kind of the layer.
    pub kind: LayerKind,
    /// The size.
    pub measured: Measured,
    /// Whether the size can be recorded, because the layer is durable.
    pub is_final: bool,
}

/// Returns the kind and size of a frozen layer. Measures it if no size is recorded.
///
/// The caller must hold a shared lock of the store.
pub fn measured(store: &Store, id: LayerId) -> Result<(LayerKind, Measured)> {
    let size = size_of(store, id)?;
    Ok((size.kind, size.measured))
}

/// Returns the size of a frozen layer and whether that size is final. Measures the layer if no size is recorded.
///
/// The caller must hold a shared lock of the store.
pub fn size_of(store: &Store, id: LayerId) -> Result<LayerSize> {
    let record = disk::read::<LayerManifest>(&store.paths().layer_file(id))?;
    let (kind, is_final) = (record.body.kind, !record.body.unsynced);
    let measured = match record.body.measured {
        // Older versions did not count inodes.
        Some(measured) if measured.inodes > 0 && is_final => measured,
        _ => {
            let (measured, looks) = measure(store, id)?;
            // Do not record the size of a layer that may still lose data in a power cut.
            if is_final {
                record_measured(store, id, &record, measured, looks);
            }
            measured
        }
    };
    Ok(LayerSize {
        kind,
        measured,
        is_final,
    })
}

/// Measures a frozen layer and replaces the recorded size.
///
/// The layer's content must be durable. The caller must hold a shared lock of the store.
pub fn remeasure(store: &Store, id: LayerId) -> Result<()> {
    let path = store.paths().layer_file(id);
    let record = disk::read::<LayerManifest>(&path)?;
    let (measured, looks) = measure(store, id)?;
    let body = LayerManifest {
        measured: Some(measured),
        looks: Some(looks),
        digest: None,
        // Its content may have changed.
        image: None,
        identity: None,
        unsynced: false,
        ..record.body.clone()
    };
    disk::replace(&path, &record.next(body))
}

/// Returns the recorded size of a stack in bytes, without a head on top; `None` if a layer has not been measured.
pub fn known_size(store: &Store, layers: &[LayerId]) -> Result<Option<u64>> {
    let mut total = 0;
    for (index, id) in layers.iter().enumerate() {
        match disk::read::<LayerManifest>(&store.paths().layer_file(*id))?
            .body
            .measured
        {
            Some(measured) => total += measured.bytes,
            None if index == 0 && layers.len() > 1 => {}
            None => return Ok(None),
        }
    }
    Ok(Some(total))
}

/// Measures a layer: returns its size and the digest of its tree without file contents.
pub fn measure(store: &Store, id: LayerId) -> Result<(Measured, String)> {
    measure_like(store, id, None)
}

/// Measures a layer like [`measure`], with the digest in the same form as the recorded digest `known`.
pub fn measure_like(store: &Store, id: LayerId, known: Option<&str>) -> Result<(Measured, String)> {
    let tree = store.paths().layer_tree(id);
    disk::is_dir(&tree)?;
    let size = match known {
        Some(known) => crate::tree::measure_like(&tree, known),
        None => crate::tree::measure(&tree),
    };
    let size = size.map_err(|error| {
        let error = Error::from(error);
        Error {
            what: format!("cannot measure the layer {}: {}", tree.shown(), error.what),
            ..error
        }
    })?;
    let measured = Measured {
        bytes: size.bytes + blob_size(store, id)?,
        files: size.entries,
        inodes: size.inodes,
    };
    Ok((measured, size.metadata_digest))
}

/// Returns the allocated size of the blob of a layer in bytes; 0 if it has none.
fn blob_size(store: &Store, id: LayerId) -> Result<u64> {
    let path = store.paths().layer_blob(id);
    match std::fs::symlink_metadata(&path) {
        Ok(found) => Ok(found.blocks() * 512),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(Error::at("inspect", &path, error)),
    }
}

/// Records the size of a layer. A failure, for example on a full disk, is only logged.
fn record_measured(
    store: &Store,
    id: LayerId,
    record: &Record<LayerManifest>,
    measured: Measured,
    looks: String,
) {
    let body = LayerManifest {
        measured: Some(measured),
        looks: Some(looks),
        ..record.body.clone()
    };
    if let Err(error) = disk::replace(&store.paths().layer_file(id), &record.next(body)) {
        log::debug!("cannot record the size of a layer: {error}");
    }
}

/// Returns the total size of layers. Layers that cannot be measured are skipped.
pub fn total_space(store: &Store, layers: &[LayerId]) -> Space {
    let mut space = Space::default();
    for layer in layers {
        match measured(store, *layer) {
            Ok((_, measured)) => space += measured.into(),
            Err(error) => log::debug!("{error}"),
        }
    }
    space
}
