//! A cache of the sizes of one container's layers, so that a list of ten thousand snapshots does not read ten thousand
//! files.
//!
//! The cache contains only data from the layers' manifests. If it is missing or unreadable, it is created again.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::manifest::{ContainerId, LayerId, LayerKind, Measured};
use super::measure::{LayerSize, size_of};
use super::{Store, disk};
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// The cache file `cache/<id>.json`: kind, bytes, number of names and number of inodes of each layer.
#[derive(Debug, Default, Serialize, Deserialize)]
struct File {
    format: u32,
    layers: HashMap<LayerId, (LayerKind, u64, u64, u64)>,
}

const FORMAT: u32 = 1;

/// The sizes of a container's layers.
#[derive(Debug)]
pub struct Sizes<'s> {
    store: &'s Store,
    container: ContainerId,
    file: File,
    requested: HashSet<LayerId>,
    /// Sizes of layers that are not durable yet, which are not saved.
    temporary: HashMap<LayerId, (LayerKind, Measured)>,
    changed: bool,
}

impl<'s> Sizes<'s> {
    /// Reads the cache of a container. The caller must hold a shared lock of the store.
    pub fn read(store: &'s Store, container: ContainerId) -> Self {
        let path = store.paths().cache_file(container);
        let read =
            disk::read_bytes(&path).and_then(|bytes| Ok(serde_json::from_slice::<File>(&bytes)?));
        let file = match read {
            Ok(file) if file.format == FORMAT => file,
            Ok(_) => File::default(),
            Err(error) => {
                log::debug!("{}: {error}", path.shown());
                File::default()
            }
        };
        Self {
            store,
            container,
            file,
            requested: HashSet::new(),
            temporary: HashMap::new(),
            changed: false,
        }
    }

    /// Returns the kind and size of a frozen layer. Measures it if no size is cached or recorded.
    pub fn measured(&mut self, id: LayerId) -> Result<(LayerKind, Measured)> {
        self.requested.insert(id);
        if let Some(&(kind, bytes, files, inodes)) = self.file.layers.get(&id) {
            let measured = Measured {
                bytes,
                files,
                inodes,
            };
            return Ok((kind, measured));
        }
        if let Some(known) = self.temporary.get(&id) {
            return Ok(*known);
        }
        let LayerSize {
            kind,
            measured,
            is_final,
        } = size_of(self.store, id)?;
        if !is_final {
            self.temporary.insert(id, (kind, measured));
            return Ok((kind, measured));
        }
        let Measured {
            bytes,
            files,
            inodes,
        } = measured;
        self.file.layers.insert(id, (kind, bytes, files, inodes));
        self.changed = true;
        Ok((kind, measured))
    }

    /// Saves the cache if it changed. A failure is only logged.
    pub fn save(mut self) {
        if !self.changed {
            return;
        }
        // Drop the entries of removed layers once they are the majority.
        if self.file.layers.len() > 2 * self.requested.len() + 100 {
            self.file.layers.retain(|id, _| self.requested.contains(id));
        }
        self.file.format = FORMAT;
        if let Err(error) = self.write() {
            log::debug!("cannot save the cache of sizes: {error}");
        }
    }

    /// Writes the cache, without a sync, because it can be computed again after a power cut.
    fn write(&self) -> Result<()> {
        let dir = self.store.paths().caches();
        disk::ensure_private_dir(&dir)?;
        let path = self.store.paths().cache_file(self.container);
        let at = |error: std::io::Error| Error::at("write", &path, error);
        let bytes = serde_json::to_vec(&self.file).map_err(|error| at(error.into()))?;
        let temporary = dir.join(format!(
            "{}.{}{}",
            self.container,
            std::process::id(),
            disk::TEMPORARY
        ));
        let written = std::fs::write(&temporary, bytes);
        if let Err(error) = written.and_then(|()| std::fs::rename(&temporary, &path)) {
            disk::remove_if_exists(&temporary)?;
            return Err(at(error));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::creation::Creation;
    use super::super::tests::session;
    use super::*;

    #[test]
    fn cached_sizes_are_not_read_from_manifests() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let mut creation = Creation::begin(&store).unwrap();
        let layer = creation.create_layer(LayerKind::Delta, &[], &[]).unwrap();
        std::fs::write(store.paths().layer_tree(layer).join("x"), b"x").unwrap();
        creation.finish().unwrap();
        let id = ContainerId::fresh();
        let mut sizes = Sizes::read(&store, id);
        let found = sizes.measured(layer).unwrap();
        assert_eq!((found.1.files, found.1.inodes), (1, 2));
        sizes.save();
        std::fs::remove_file(store.paths().layer_file(layer)).unwrap();
        assert_eq!(Sizes::read(&store, id).measured(layer).unwrap(), found);
        // A truncated cache is ignored.
        for torn in [
            "",
            "{\"format\": 2, \"layers\": {}}",
            "{\"format\": 1, \"lay",
        ] {
            std::fs::write(store.paths().cache_file(id), torn).unwrap();
            assert!(Sizes::read(&store, id).measured(layer).is_err());
        }
    }
}
