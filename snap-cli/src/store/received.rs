//! Complete layers of interrupted transfers. They are retained for a while, so that the next attempt receives only the
//! layers that are missing.
//!
//! For each layer there is an empty file in the directory `received`, whose name contains the time of its expiry. It is
//! created when the layer is complete, verified and durable, and removed when a container references the layer.

use std::collections::HashSet;
use std::path::PathBuf;

use super::manifest::LayerId;
use super::{Store, disk};
use crate::error::{Error, Result};

/// The directory of the files.
const RECEIVED: &str = "received";

/// The days for which a layer is retained.
pub const RETENTION_DAYS: i64 = 7;

/// A layer that no container references yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceivedLayer {
    /// The layer.
    pub id: LayerId,
    /// The time of its expiry, in seconds since 1970.
    until: i64,
    /// The file that retains it.
    pub file: PathBuf,
}

impl ReceivedLayer {
    /// Returns whether it is no longer retained.
    pub fn is_expired(&self) -> bool {
        let now = jiff::Timestamp::now().as_second();
        // A clock that was wrong must not retain a layer forever.
        self.until <= now || self.until > now + 2 * RETENTION_DAYS * 86400
    }
}

fn dir(store: &Store) -> PathBuf {
    store.root().join(RECEIVED)
}

/// Returns all such layers.
pub fn list(store: &Store) -> Result<Vec<ReceivedLayer>> {
    let dir = dir(store);
    let parse = |name: &String| {
        let (id, until) = name.split_once('.')?;
        Some(ReceivedLayer {
            id: LayerId::parse(id)?,
            until: until.parse().ok()?,
            file: dir.join(name),
        })
    };
    Ok(disk::names(&dir)?.iter().filter_map(parse).collect())
}

/// Returns the layers that are retained.
pub(super) fn retained(store: &Store) -> Result<HashSet<LayerId>> {
    let layers = list(store)?.into_iter();
    Ok(layers
        .filter(|layer| !layer.is_expired())
        .map(|layer| layer.id)
        .collect())
}

/// Retains a layer. Its content must be durable, and the caller must hold a shared lock of the store.
pub fn retain(store: &Store, id: LayerId) -> Result<()> {
    let dir = dir(store);
    disk::ensure_private_dir(&dir)?;
    let until = jiff::Timestamp::now().as_second() + RETENTION_DAYS * 86400;
    let path = dir.join(format!("{id}.{until}"));
    std::fs::write(&path, b"").map_err(|error| Error::at("write", &path, error))?;
    disk::sync_dir(&dir)
}

/// Removes the files of layers that a container references now. A failure is only logged: they expire.
pub fn release(store: &Store, ids: &HashSet<LayerId>) {
    let released: Result<()> = list(store).and_then(|layers| {
        let mut done = layers.iter().filter(|layer| ids.contains(&layer.id));
        done.try_for_each(|layer| disk::remove_if_exists(&layer.file))
    });
    if let Err(error) = released {
        log::warn!("{error}");
    }
}

#[cfg(test)]
mod tests {
    use super::super::collect;
    use super::super::creation::Creation;
    use super::super::manifest::LayerKind;
    use super::super::tests::session;
    use super::*;

    #[test]
    fn layers_are_collected_when_they_expire() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let mut creation = Creation::begin(&store).unwrap();
        let ids = [(); 3].map(|()| creation.create_layer(LayerKind::Base, &[], &[]).unwrap());
        for id in ids {
            retain(&store, id).unwrap();
        }
        creation.abandon();
        // An expired one, and one from a clock that was wrong.
        let [kept, old, future] = &list(&store).unwrap()[..] else {
            panic!("three are listed");
        };
        for (layer, until) in [(old, 17), (future, i64::MAX)] {
            let to = layer.file.with_file_name(format!("{}.{until}", layer.id));
            std::fs::rename(&layer.file, to).unwrap();
        }
        assert_eq!(collect::collect(&store).unwrap().layers, 2);
        assert_eq!(store.layer_ids().unwrap(), [kept.id]);
        assert_eq!(list(&store).unwrap(), std::slice::from_ref(kept));
        assert_eq!(collect::collect(&store).unwrap().layers, 0);
        release(&store, &HashSet::from([kept.id]));
        assert_eq!(collect::sweep(&store).unwrap().layers, 1);
    }
}
