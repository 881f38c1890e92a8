//! Cleaning up: layers that no manifest names, containers whose making was cut off, destroyed ones whose
//! time is over.
//!
//! It takes the store's lock, by itself without waiting: while any command makes or reads something, it does
//! nothing, and the next one tries again. It begins only when there is a sign that something is left
//! over (a note of a maker that is dead, something in the trash, a destroyed container whose time is over),
//! so that in general it costs a few listings of nearly empty dirs.
//!
//! A layer that a mount still holds (each mount locks the layers that it reads) stays, whatever the
//! manifests say, until the mount is gone.

use std::os::fd::{AsFd, OwnedFd};

use cowl_layers::sys;

use super::leftovers::{self, Expiry, Leftovers};
use super::lock::{Lock, Mode};
use super::manifest::LayerId;
use super::trash::retain_first;
use super::{Store, disk, notes, orphans, trash};
use crate::error::{Error, Result};

/// What a cleaning did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Layers removed.
    pub layers: usize,
    /// Containers removed.
    pub containers: usize,
}

/// Cleans up if there is a sign of anything left over and nobody is at work.
pub fn collect(store: &Store) -> Result<Collected> {
    match leftovers::has_any(store)? {
        true => sweep(store),
        false => Ok(Collected::default()),
    }
}

/// The same for those command have done their work already: that it could not be is told, and no failure of
/// theirs.
pub fn collect_or_warn(store: &Store) {
    if let Err(error) = collect(store) {
        log::warn!("{error}; nothing is collected before that is put in order");
    }
}

/// Cleans up if nobody is at work.
pub fn sweep(store: &Store) -> Result<Collected> {
    let command = &store.session().command;
    let Some(alone) = Lock::try_take(&store.paths().lock_file("store"), Mode::Exclusive, command)?
    else {
        return Ok(Collected::default());
    };
    match leftovers::find(store, Expiry::Respected) {
        Ok(left) => remove_leftovers(store, alone, &left),
        Err(error) => {
            drop(alone);
            empty_trash_only(store, &error);
            Err(error)
        }
    }
}

/// Empties the trash where nothing else can be collected: what is in it was moved there when nothing named
/// it any more, whatever is damaged now.
pub fn empty_trash_only(store: &Store, error: &Error) {
    log::debug!("only the trash is emptied: {error}");
    if let Err(error) = trash::empty(store) {
        log::warn!("{error}");
    }
}

/// Removes what lies about.
pub fn remove_leftovers(store: &Store, alone: Lock, left: &Leftovers) -> Result<Collected> {
    let mut collected = Collected::default();
    // Before their layers: what is listed can be brought back whole.
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
            Ok(gone) => collected.layers += usize::from(gone),
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
    let command = &store.session().command;
    for path in &left.locks {
        if let Some(lock) = Lock::try_take(path, Mode::Exclusive, command)? {
            lock.remove()?;
        }
    }
    notes::write_held(store, &left.held)?;
    // What a change that waits for its commit names may turn out to be nobody's: look again then.
    if !left.pending {
        for note in notes::lock_stale(store)? {
            note.remove()?;
        }
    }
    // From here on nothing that counts is touched: others may go to work.
    drop(alone);
    if let Err(error) = trash::empty(store) {
        retain_first(&mut failed, error);
    }
    failed.map_or(Ok(collected), Err)
}

/// Moves a layer out of the way unless some mount holds it.
fn discard(store: &Store, id: LayerId) -> Result<bool> {
    let tree = store.paths().layer_tree(id);
    let at = |error| Error::at("look at the lock of", &tree, error);
    // Held over the move: a mount that comes too late finds no layer.
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
    use super::super::deleted;
    use super::super::making::Making;
    use super::super::manifest::{ContainerId, ContainerManifest, LayerKind};
    use super::super::name::ContainerName;
    use super::super::record::Record;
    use super::super::tests::session;
    use super::*;
    use crate::error::Kind;

    fn container(store: &Store) -> ContainerId {
        let mut making = Making::begin(store).unwrap();
        let base = making.create_layer(LayerKind::Base, &[], &[]).unwrap();
        let head = making
            .create_head(&[base], &store.paths().layer_tree(base))
            .unwrap();
        let id = making.create_container().unwrap();
        let name = ContainerName::parse("web").unwrap();
        let manifest = ContainerManifest::new(name, head, &[base]);
        disk::replace(&store.paths().container_file(id), &Record::first(manifest)).unwrap();
        making.finish().unwrap();
        id
    }

    #[test]
    fn leftovers_of_a_killed_maker_go_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = container(&store);
        let mut making = Making::begin(&store).unwrap();
        let layer = making.create_layer(LayerKind::Delta, &[], &[]).unwrap();
        std::fs::create_dir_all(store.paths().layer_tree(layer).join("a/b/c")).unwrap();
        let half = making.create_container().unwrap();
        // While the maker lives, nothing is touched.
        assert_eq!(collect(&store).unwrap(), Collected::default());
        assert!(store.paths().layer_dir(layer).try_exists().unwrap());
        making.abandon();

        let other = Store::open(store.root(), session()).unwrap();
        let collected = collect(&other).unwrap();
        assert_eq!((collected.layers, collected.containers), (1, 1));
        assert!(!store.paths().layer_dir(layer).try_exists().unwrap());
        assert!(!store.paths().container_dir(half).try_exists().unwrap());
        let manifest = store.container(id).unwrap().unwrap().body;
        for kept in manifest.stack {
            assert!(store.paths().layer_tree(kept).try_exists().unwrap());
        }
        assert!(disk::names(&store.root().join("trash")).unwrap().is_empty());
        assert_eq!(collect(&other).unwrap(), Collected::default());
    }

    #[test]
    fn nothing_is_collected_while_a_manifest_can_not_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = container(&store);
        let layers = disk::names(&store.root().join("layers")).unwrap();
        std::fs::write(store.paths().container_file(id), b"{}").unwrap();
        assert_eq!(sweep(&store).unwrap_err().kind, Kind::Damaged);
        assert_eq!(disk::names(&store.root().join("layers")).unwrap(), layers);
    }

    #[test]
    fn a_layer_that_a_mount_holds_stays_until_it_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let mut making = Making::begin(&store).unwrap();
        let layer = making.create_layer(LayerKind::Delta, &[], &[]).unwrap();
        making.abandon();
        let root = sys::dir::open_root(&store.paths().layer_tree(layer)).unwrap();
        let held = sys::dir::lock_shared(root.as_fd()).unwrap().unwrap();
        assert_eq!(collect(&store).unwrap(), Collected::default());
        assert!(store.paths().layer_tree(layer).try_exists().unwrap());
        // It is not looked for again and again.
        assert!(!leftovers::has_any(&store).unwrap());
        drop(held);
        assert_eq!(collect(&store).unwrap().layers, 1);
        assert!(!store.paths().layer_dir(layer).try_exists().unwrap());
        sweep(&store).unwrap();
        let locks = disk::names(&store.root().join("locks")).unwrap();
        assert_eq!(locks, ["store.lock", "trash.lock"]);
    }

    #[test]
    fn a_destroyed_container_keeps_its_layers_while_its_time_runs() {
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
