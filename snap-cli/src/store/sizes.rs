//! What the layers of one container take, remembered in one file: a list of ten thousand snapshots must not
//! read ten thousand files. The file tells nothing that `layer.json` does not; when it is lost or can't be
//! read, it is made anew.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::manifest::{ContainerId, LayerId, LayerKind, Measured};
use super::measure::{LayerSize, size_of};
use super::{Store, disk};
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// `cache/<id>.json`: for each layer its kind, bytes, names and inodes.
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
    asked: HashSet<LayerId>,
    /// Of layers that are not durable yet: for this command only.
    passing: HashMap<LayerId, (LayerKind, Measured)>,
    changed: bool,
}

impl<'s> Sizes<'s> {
    /// Reads what is remembered. Hold a shared lock of the store.
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
            asked: HashSet::new(),
            passing: HashMap::new(),
            changed: false,
        }
    }

    /// What a frozen layer takes.
    pub fn measured(&mut self, id: LayerId) -> Result<(LayerKind, Measured)> {
        self.asked.insert(id);
        if let Some(&(kind, bytes, files, inodes)) = self.file.layers.get(&id) {
            let measured = Measured {
                bytes,
                files,
                inodes,
            };
            return Ok((kind, measured));
        }
        if let Some(known) = self.passing.get(&id) {
            return Ok(*known);
        }
        let LayerSize {
            kind,
            measured,
            is_final,
        } = size_of(self.store, id)?;
        if !is_final {
            self.passing.insert(id, (kind, measured));
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

    /// Remembers what was found out. Not being able to is no failure.
    pub fn save(mut self) {
        if !self.changed {
            return;
        }
        // Layers that are gone are forgotten once they are the greater part.
        if self.file.layers.len() > 2 * self.asked.len() + 100 {
            self.file.layers.retain(|id, _| self.asked.contains(id));
        }
        self.file.format = FORMAT;
        if let Err(error) = self.write() {
            log::debug!("cannot remember sizes: {error}");
        }
    }

    /// A power cut may take it: nothing is synced.
    fn write(&self) -> Result<()> {
        let folder = self.store.paths().caches();
        disk::ensure_private_dir(&folder)?;
        let path = self.store.paths().cache_file(self.container);
        let at = |error: std::io::Error| Error::at("write", &path, error);
        let bytes = serde_json::to_vec(&self.file).map_err(|error| at(error.into()))?;
        let temporary = folder.join(format!(
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
    use super::super::making::Making;
    use super::super::tests::session;
    use super::*;

    #[test]
    fn what_is_remembered_is_not_looked_up_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let mut making = Making::begin(&store).unwrap();
        let layer = making.create_layer(LayerKind::Delta, &[], &[]).unwrap();
        std::fs::write(store.paths().layer_tree(layer).join("x"), b"x").unwrap();
        making.finish().unwrap();
        let id = ContainerId::fresh();
        let mut sizes = Sizes::read(&store, id);
        let found = sizes.measured(layer).unwrap();
        assert_eq!((found.1.files, found.1.inodes), (1, 2));
        sizes.save();
        std::fs::remove_file(store.paths().layer_file(layer)).unwrap();
        assert_eq!(Sizes::read(&store, id).measured(layer).unwrap(), found);
        // Lost or torn, it is as if it had never been.
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
