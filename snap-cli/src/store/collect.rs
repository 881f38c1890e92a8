//! Garbage collection: removes unreferenced layers, containers whose creation was interrupted, and destroyed containers
//! whose retention period is over.
//!
//! A collection needs the store's exclusive lock and does not wait for it: while a command creates or reads something,
//! nothing is collected, and the next command tries again. A collection starts only if a cheap check finds a leftover
//! (a note of a killed command, an object in the trash, an expired container), so it usually costs only a few listings
//! of nearly empty directories.
//!
//! Each mount locks the layers that it reads. A locked layer is retained, even if no manifest references it, until the
//! mount ends.

use std::os::fd::{AsFd, OwnedFd};

use cowl_layers::sys;

use super::leftovers::{self, Leftovers, Retention};
use super::lock::{Lock, Mode};
use super::manifest::LayerId;
use super::trash::retain_first;
use super::{Store, disk, notes, orphans, transfers, trash};
use crate::error::{Error, Result};

/// The result of a collection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// The number of removed layers.
    pub layers: usize,
    /// The number of removed containers.
    pub containers: usize,
}

/// Runs a collection if a cheap check finds leftovers and no other command uses the store.
pub fn collect(store: &Store) -> Result<Collected> {
    match leftovers::has_any(store)? {
        true => sweep(store),
        false => Ok(Collected::default()),
    }
}

/// Like [`collect`], for commands that have already succeeded: a failure is only logged.
pub fn collect_or_warn(store: &Store) {
    if let Err(error) = collect(store) {
        log::warn!("{error}; nothing is collected until this is fixed");
    }
}

/// Like [`collect`], but waits for the commands that use the store.
pub fn collect_waiting(store: &Store) -> Result<Collected> {
    if !leftovers::has_any(store)? {
        return Ok(Collected::default());
    }
    sweep_alone(store, store.lock_exclusive()?)
}

/// Runs a collection if no other command uses the store.
pub fn sweep(store: &Store) -> Result<Collected> {
    let command = &store.session().command;
    let Some(alone) = Lock::try_take(&store.paths().lock_file("store"), Mode::Exclusive, command)?
    else {
        return Ok(Collected::default());
    };
    sweep_alone(store, alone)
}

/// Runs a collection. `alone` is the store's exclusive lock.
fn sweep_alone(store: &Store, alone: Lock) -> Result<Collected> {
    match leftovers::find(store, Retention::RESPECTED) {
        Ok(left) => remove_leftovers(store, alone, &left),
        Err(error) => {
            drop(alone);
            empty_trash_only(store, &error);
            Err(error)
        }
    }
}

/// Empties the trash if `error` prevents a complete collection.
///
/// This is safe even if a manifest is damaged: the objects in the trash were unreferenced when they were moved there.
pub fn empty_trash_only(store: &Store, error: &Error) {
    log::debug!("emptying only the trash: {error}");
    if let Err(error) = trash::empty(store) {
        log::warn!("{error}");
    }
}

/// Removes leftovers. `alone` is the store's exclusive lock; it is released before the trash is emptied.
pub fn remove_leftovers(store: &Store, alone: Lock, left: &Leftovers) -> Result<Collected> {
    let mut collected = Collected::default();
    // Before their layers: every container that `undelete --list` shows must be complete.
    for deleted in &left.expired {
        trash::put(
            store,
            deleted.dir.clone(),
            &format!("container-{}", deleted.id),
        )?;
        collected.containers += 1;
    }
    let mut failed = None;
    for id in &left.layers {
        match discard(store, *id) {
            Ok(removed) => collected.layers += usize::from(removed),
            Err(error) => retain_first(&mut failed, error),
        }
    }
    for id in &left.unfinished {
        trash::put(
            store,
            store.paths().container_dir(*id),
            &format!("container-{id}"),
        )?;
        collected.containers += 1;
    }
    for file in &left.files {
        disk::remove_if_exists(file)?;
    }
    for dir in &left.dirs {
        orphans::remove(store, dir);
    }
    for path in &left.transfers {
        if let Err(error) = transfers::remove(path) {
            retain_first(&mut failed, error);
        }
    }
    let command = &store.session().command;
    for path in &left.locks {
        if let Some(lock) = Lock::try_take(path, Mode::Exclusive, command)? {
            lock.remove()?;
        }
    }
    notes::write_held(store, &left.held)?;
    // A pending change may still be rolled back, and its layers unreferenced: retain the notes until then.
    if !left.pending {
        for note in notes::lock_stale(store)? {
            note.remove()?;
        }
    }
    // From here on, only the trash is modified: other commands may use the store.
    drop(alone);
    if let Err(error) = trash::empty(store) {
        retain_first(&mut failed, error);
    }
    failed.map_or(Ok(collected), Err)
}

/// Moves a layer to the trash unless a mount holds it. Returns whether it was moved.
fn discard(store: &Store, id: LayerId) -> Result<bool> {
    let tree = store.paths().layer_tree(id);
    let at = |error| Error::at("inspect the lock of", &tree, error);
    // Hold the lock during the move, against a race with a new mount: it finds no layer afterwards.
    let _lock: Option<OwnedFd> = match sys::dir::open_root(&tree) {
        Ok(root) => match sys::dir::lock_exclusive(root.as_fd()).map_err(at)? {
            Some(lock) => Some(lock),
            None => return notes::write_held(store, &[id]).map(|()| false),
        },
        Err(error) if error.is_absent() => None,
        Err(error) => return Err(at(error)),
    };
    trash::put(store, store.paths().layer_dir(id), &format!("layer-{id}"))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::super::creation::Creation;
    use super::super::deleted;
    use super::super::manifest::{ContainerId, ContainerManifest, LayerKind};
    use super::super::name::ContainerName;
    use super::super::record::Record;
    use super::super::tests::session;
    use super::*;
    use crate::error::Kind;

    fn container(store: &Store) -> ContainerId {
        let mut creation = Creation::begin(store).unwrap();
        let base = creation.create_layer(LayerKind::Base, &[], &[]).unwrap();
        let head = creation
            .create_head(&[base], &store.paths().layer_tree(base))
            .unwrap();
        let id = creation.create_container().unwrap();
        let name = ContainerName::parse("web").unwrap();
        let manifest = ContainerManifest::new(name, head, &[base]);
        disk::replace(&store.paths().container_file(id), &Record::first(manifest)).unwrap();
        creation.finish().unwrap();
        id
    }

    #[test]
    fn only_leftovers_of_a_killed_command_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = container(&store);
        let mut creation = Creation::begin(&store).unwrap();
        let layer = creation.create_layer(LayerKind::Delta, &[], &[]).unwrap();
        std::fs::create_dir_all(store.paths().layer_tree(layer).join("a/b/c")).unwrap();
        let unfinished = creation.create_container().unwrap();
        // Nothing is removed while the command is alive.
        assert_eq!(collect(&store).unwrap(), Collected::default());
        assert!(store.paths().layer_dir(layer).try_exists().unwrap());
        creation.abandon();

        let other = Store::open(store.root(), session()).unwrap();
        let collected = collect(&other).unwrap();
        assert_eq!((collected.layers, collected.containers), (1, 1));
        assert!(!store.paths().layer_dir(layer).try_exists().unwrap());
        assert!(
            !store
                .paths()
                .container_dir(unfinished)
                .try_exists()
                .unwrap()
        );
        let manifest = store.container(id).unwrap().unwrap().body;
        for used in manifest.stack {
            assert!(store.paths().layer_tree(used).try_exists().unwrap());
        }
        assert!(disk::names(&store.root().join("trash")).unwrap().is_empty());
        assert_eq!(collect(&other).unwrap(), Collected::default());
    }

    #[test]
    fn nothing_is_collected_while_a_manifest_is_unreadable() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = container(&store);
        let layers = disk::names(&store.root().join("layers")).unwrap();
        std::fs::write(store.paths().container_file(id), b"{}").unwrap();
        assert_eq!(sweep(&store).unwrap_err().kind, Kind::Damaged);
        assert_eq!(disk::names(&store.root().join("layers")).unwrap(), layers);
    }

    #[test]
    fn a_layer_is_retained_while_a_mount_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let mut creation = Creation::begin(&store).unwrap();
        let layer = creation.create_layer(LayerKind::Delta, &[], &[]).unwrap();
        creation.abandon();
        let root = sys::dir::open_root(&store.paths().layer_tree(layer)).unwrap();
        let held = sys::dir::lock_shared(root.as_fd()).unwrap().unwrap();
        assert_eq!(collect(&store).unwrap(), Collected::default());
        assert!(store.paths().layer_tree(layer).try_exists().unwrap());
        // The held layer alone does not cause further collections.
        assert!(!leftovers::has_any(&store).unwrap());
        drop(held);
        assert_eq!(collect(&store).unwrap().layers, 1);
        assert!(!store.paths().layer_dir(layer).try_exists().unwrap());
        sweep(&store).unwrap();
        let locks = disk::names(&store.root().join("locks")).unwrap();
        assert_eq!(locks, ["store.lock", "trash.lock"]);
    }

    #[test]
    fn the_layers_of_a_destroyed_container_are_retained_until_it_expires() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = container(&store);
        let layers = store.layer_ids().unwrap();
        deleted::delete(&store, id, i64::MAX).unwrap();
        sweep(&store).unwrap();
        assert_eq!(store.layer_ids().unwrap(), layers);
        assert!(store.containers().unwrap().is_empty());
        let [deleted] = &deleted::list(&store).unwrap()[..] else {
            panic!("one is in the trash");
        };
        deleted::undelete(&store, deleted).unwrap();
        assert_eq!(store.containers().unwrap().len(), 1);
        deleted::delete(&store, id, 0).unwrap();
        let collected = collect(&store).unwrap();
        assert_eq!((collected.layers, collected.containers), (2, 1));
        assert!(deleted::list(&store).unwrap().is_empty());
    }
}
