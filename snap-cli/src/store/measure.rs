//! What layers take on the disk. A frozen layer is counted once, and its manifest records the result.

use super::manifest::{LayerId, LayerKind, LayerManifest, Measured};
use super::record::Record;
use super::usage::Space;
use super::{Store, disk};
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// The size of a frozen layer.
#[derive(Clone, Copy, Debug)]
pub struct LayerSize {
    /// How the layer came to be.
    pub kind: LayerKind,
    /// What it takes.
    pub measured: Measured,
    /// Whether a power cut leaves it as it is.
    pub is_final: bool,
}

/// What a frozen layer takes; counted the first time that somebody asks. Hold a shared lock of the
/// store.
pub fn measured(store: &Store, id: LayerId) -> Result<(LayerKind, Measured)> {
    let size = size_of(store, id)?;
    Ok((size.kind, size.measured))
}

/// Like [`measured`], and whether the answer may be recorded.
pub fn size_of(store: &Store, id: LayerId) -> Result<LayerSize> {
    let record = disk::read::<LayerManifest>(&store.paths().layer_file(id))?;
    let (kind, is_final) = (record.body.kind, !record.body.unsynced);
    let measured = match record.body.measured {
        // Older versions did not count inodes.
        Some(measured) if measured.inodes > 0 && is_final => measured,
        _ => {
            let (measured, looks) = measure(store, id)?;
            // A power cut may still take some of it. What is recorded must hold afterwards, too.
            if is_final {
                note_measured(store, id, &record, measured, looks);
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

/// Records what a frozen layer takes now, whatever was recorded before. Its content must be durable, and
/// a shared lock of the store held.
pub fn measure_again(store: &Store, id: LayerId) -> Result<()> {
    let path = store.paths().layer_file(id);
    let record = disk::read::<LayerManifest>(&path)?;
    let (measured, looks) = measure(store, id)?;
    let body = LayerManifest {
        measured: Some(measured),
        looks: Some(looks),
        digest: None,
        unsynced: false,
        ..record.body.clone()
    };
    disk::replace(&path, &record.next(body))
}

/// About what the layers take on the disk together, a head on top not counted; `None` where one was
/// never measured.
pub fn known_size(store: &Store, layers: &[LayerId]) -> Result<Option<u64>> {
    let mut total = 0;
    for (place, id) in layers.iter().enumerate() {
        match disk::read::<LayerManifest>(&store.paths().layer_file(*id))?
            .body
            .measured
        {
            Some(measured) => total += measured.bytes,
            None if place == 0 && layers.len() > 1 => {}
            None => return Ok(None),
        }
    }
    Ok(Some(total))
}

/// What a layer takes just now, and what its tree looks like.
pub fn measure(store: &Store, id: LayerId) -> Result<(Measured, String)> {
    measure_like(store, id, None)
}

/// The same in the form of what is `known` of the tree already.
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
        bytes: size.bytes,
        files: size.entries,
        inodes: size.inodes,
    };
    Ok((measured, size.metadata_digest))
}

/// Kept so that it need not be measured again; on a full disk it will be.
fn note_measured(
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
        log::debug!("cannot keep the size of a layer: {error}");
    }
}

/// What layers that are to go take, as far as it is known or can be counted now.
pub fn space_of(store: &Store, layers: &[LayerId]) -> Space {
    let mut space = Space::default();
    for layer in layers {
        match measured(store, *layer) {
            Ok((_, measured)) => space += measured.into(),
            Err(error) => log::debug!("{error}"),
        }
    }
    space
}
