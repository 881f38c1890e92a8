//! Layers that a command holds while it reads or fills them, without the store's lock: a transfer can wait for another host
//! for a long time, and must not prevent garbage collection meanwhile.
//!
//! The locks are those of a mount. A collection retains a locked layer, even if no manifest references it.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use cowl_layers::sys;

use super::lock::{Lock, Mode};
use super::manifest::LayerId;
use super::{Store, disk};
use crate::error::{Error, Result};
use crate::wait::poll_until;

/// The time to wait for a lock. A collection locks a layer only while it inspects or moves it.
const PATIENCE: Duration = Duration::from_secs(10);

/// The interval between attempts to acquire a lock.
const POLL: Duration = Duration::from_millis(5);

/// The lock file that every process with [`HeldLayers`] holds in shared mode.
const TRANSFERS: &str = "transfers";

/// Shared locks of layers. Dropping them releases the layers.
#[derive(Debug, Default)]
pub struct HeldLayers {
    /// Distinguishes this process from a mount of a snapshot, which prevents the removal of the snapshot.
    mark: Option<Lock>,
    layers: HashMap<LayerId, OwnedFd>,
}

/// Returns the inode that the processes with [`HeldLayers`] have locked; `None` if there were never any.
pub fn inode_of_transfers(store: &Store) -> Result<Option<u64>> {
    let path = store.paths().lock_file(TRANSFERS);
    match path.symlink_metadata() {
        Ok(file) => Ok(Some(file.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::at("inspect", &path, error)),
    }
}

impl HeldLayers {
    /// Returns an empty set, for any number of layers: each needs a descriptor.
    pub fn new() -> Self {
        sys::limits::raise_open_files();
        Self::default()
    }

    /// Holds a layer. Returns false if it does not exist, or if a mount writes to it.
    pub fn hold(&mut self, store: &Store, id: LayerId) -> Result<bool> {
        if self.layers.contains_key(&id) {
            return Ok(true);
        }
        if self.mark.is_none() {
            let path = store.paths().lock_file(TRANSFERS);
            self.mark = Some(Lock::take(&path, Mode::Shared, "", PATIENCE)?);
        }
        let tree = store.paths().layer_tree(id);
        let at = |error| Error::at("lock", &tree, error);
        let root = match sys::dir::open_root(&tree) {
            Ok(root) => root,
            Err(error) if error.is_absent() => return Ok(false),
            Err(error) => return Err(at(error)),
        };
        let locked = poll_until(Instant::now() + PATIENCE, POLL, || {
            sys::dir::lock_shared(root.as_fd()).map_err(at)
        })?;
        // A collection may have moved the layer before it was locked.
        let is_there = disk::is_dir(&tree)?;
        let Some(lock) = locked.filter(|_| is_there) else {
            return Ok(false);
        };
        self.layers.insert(id, lock);
        Ok(true)
    }

    /// Holds the layers of a state. Fails if one of them is missing.
    pub fn hold_all(&mut self, store: &Store, ids: &[LayerId]) -> Result<()> {
        for id in ids {
            if !self.hold(store, *id)? {
                store.layer_trees(&[*id])?;
                return Err(
                    Error::busy(format!("a mount writes to the layer {id}")).hint("try again")
                );
            }
        }
        Ok(())
    }

    /// Releases a layer.
    pub fn release(&mut self, id: LayerId) {
        self.layers.remove(&id);
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
    fn a_collection_retains_held_layers_and_does_not_wait() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let mut creation = Creation::begin(&store).unwrap();
        let [one, two] =
            [(); 2].map(|()| creation.create_layer(LayerKind::Base, &[], &[]).unwrap());
        creation.abandon();
        let mut held = HeldLayers::new();
        assert!(held.hold(&store, one).unwrap());
        assert!(!held.hold(&store, LayerId::fresh()).unwrap());
        assert_eq!(collect::sweep(&store).unwrap().layers, 1);
        assert_eq!(store.layer_ids().unwrap(), [one]);
        held.hold_all(&store, &[one]).unwrap();
        held.hold_all(&store, &[one, two]).unwrap_err();
        held.release(one);
        assert_eq!(collect::sweep(&store).unwrap().layers, 1);
    }

    #[test]
    fn layers_of_a_creation_without_the_lock_are_retained() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let mut creation = Creation::begin_unlocked(&store).unwrap();
        let layer = creation.create_layer(LayerKind::Base, &[], &[]).unwrap();
        let unused = creation.create_layer(LayerKind::Base, &[], &[]).unwrap();
        assert_eq!(collect::sweep(&store).unwrap().layers, 0);
        creation.discard_layer(unused).unwrap();
        assert_eq!(store.layer_ids().unwrap(), [layer]);
        creation.lock_store().unwrap();
        assert!(store.lock_exclusive().is_err());
        drop(creation);
        assert!(store.layer_ids().unwrap().is_empty());
        store.lock_exclusive().unwrap();
    }

    /// A collection can take longer than the patience of the commands, and must not end a transfer of hours.
    #[test]
    fn a_transfer_waits_for_a_collection() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let mut creation = Creation::begin_unlocked(&store).unwrap();
        let alone = store.lock_exclusive().unwrap();
        // The patience of these commands is over at once.
        store.lock_shared().unwrap_err();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                creation.create_layer(LayerKind::Base, &[], &[]).unwrap();
                creation.lock_store().unwrap();
            });
            std::thread::sleep(session().patience * 4);
            assert!(!waiting.is_finished());
            drop(alone);
            waiting.join().unwrap();
        });
    }
}
