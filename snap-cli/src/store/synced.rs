//! The record in layers' manifests of whether their content is durable.

use super::manifest::{LayerId, LayerManifest};
use super::{Store, disk};
use crate::error::Result;

/// Returns the layers among `layers` whose content is not known to be durable.
pub fn unsynced(store: &Store, layers: &[LayerId]) -> Result<Vec<LayerId>> {
    let mut found = Vec::new();
    for id in layers {
        if disk::read::<LayerManifest>(&store.paths().layer_file(*id))?
            .body
            .unsynced
        {
            found.push(*id);
        }
    }
    Ok(found)
}

/// Records that a layer's content is not known to be durable.
pub fn record_unsynced(store: &Store, id: LayerId) -> Result<()> {
    let path = store.paths().layer_file(id);
    let record = disk::read::<LayerManifest>(&path)?;
    if record.body.unsynced {
        return Ok(());
    }
    let body = LayerManifest {
        identity: None,
        unsynced: true,
        ..record.body.clone()
    };
    disk::replace(&path, &record.next(body))
}

/// Records that a frozen layer's content is durable. The caller must hold a shared lock of the store.
pub fn record_synced(store: &Store, id: LayerId) -> Result<()> {
    let path = store.paths().layer_file(id);
    let Some(record) = disk::read_opt::<LayerManifest>(&path)? else {
        // A race: the layer was merged or collected during the sync.
        return Ok(());
    };
    if !record.body.unsynced {
        return Ok(());
    }
    let body = LayerManifest {
        measured: None,
        looks: None,
        digest: None,
        unsynced: false,
        ..record.body.clone()
    };
    disk::replace(&path, &record.next(body))
}
