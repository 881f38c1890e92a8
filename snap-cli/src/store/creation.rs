//! Creation of layers and containers.
//!
//! A command creates all objects before its commit through [`Creation`], which excludes garbage collection and leaves a
//! note in `locks` while it runs. If it is killed, the next command finds the note, and collects its objects.

use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use cowl_layers::format::XattrSpace;
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;

use super::collect::sweep;
use super::disk::remove_tree;
use super::held::HeldLayers;
use super::layers::{open, plain_xattrs};
use super::lock::Lock;
use super::manifest::{ContainerId, LayerId, LayerKind, LayerManifest};
use super::notes::CREATION_NOTE;
use super::record::Record;
use super::{Store, disk};
use crate::error::{Error, Result};

/// Uncommitted layers and containers: no manifest refers to them yet.
///
/// They are removed on drop, unless [`Creation::finish`] or [`Creation::abandon`] was called.
#[derive(Debug)]
pub struct Creation<'s> {
    store: &'s Store,
    /// The store's shared lock. Without it, the layers are held.
    shared: Option<Lock>,
    held: HeldLayers,
    note: Option<Lock>,
    // Opened before anything is written, so that its sync reports every writeback error.
    filesystem: disk::Filesystem,
    sweeps: bool,
    unsynced: Vec<PathBuf>,
    layers: Vec<LayerId>,
    containers: Vec<ContainerId>,
    files: Vec<PathBuf>,
}

impl<'s> Creation<'s> {
    /// Writes the note and acquires a shared lock on the store.
    pub fn begin(store: &'s Store) -> Result<Self> {
        let shared = store.lock_shared()?;
        Self::with_lock(store, Some(shared))
    }

    /// Writes the note, and does not exclude garbage collection: for a command that waits for another host while it fills
    /// layers. They are held until the creation ends.
    ///
    /// [`Creation::lock_store`] must be called before anything but layers is created.
    pub fn begin_unlocked(store: &'s Store) -> Result<Self> {
        let _excluding = store.lock_shared()?;
        let mut creation = Self::with_lock(store, None)?;
        creation.held = HeldLayers::new();
        Ok(creation)
    }

    /// Acquires the shared lock after [`Creation::begin_unlocked`].
    pub fn lock_store(&mut self) -> Result<()> {
        if self.shared.is_none() {
            self.shared = Some(self.store.lock_shared_in_transfer()?);
        }
        Ok(())
    }

    fn with_lock(store: &'s Store, shared: Option<Lock>) -> Result<Self> {
        let filesystem = disk::Filesystem::open(&store.paths().layers())?;
        let path = store
            .paths()
            .lock_file(&format!("{CREATION_NOTE}{}", LayerId::fresh()));
        Ok(Self {
            filesystem,
            store,
            shared,
            held: HeldLayers::default(),
            note: Some(Lock::take_anonymous(&path, store.session().patience)?),
            sweeps: false,
            unsynced: Vec::new(),
            layers: Vec::new(),
            containers: Vec::new(),
            files: Vec::new(),
        })
    }

    /// Creates an empty layer over the layers `over`. Its root gets the attributes of the directory `like`.
    pub fn create_head(&mut self, over: &[LayerId], like: &Path) -> Result<LayerId> {
        let id = self.create_layer_from(LayerManifest {
            unsynced: true,
            ..LayerManifest::new(LayerKind::Delta, over, &[])
        })?;
        copy_root(like, &self.store.paths().layer_tree(id), self.store.space())?;
        Ok(id)
    }

    /// Creates an empty layer. The caller fills it and syncs its content.
    pub fn create_layer(
        &mut self,
        kind: LayerKind,
        over: &[LayerId],
        stands_for: &[LayerId],
    ) -> Result<LayerId> {
        self.create_layer_from(LayerManifest::new(kind, over, stands_for))
    }

    /// Creates an empty layer with the given manifest.
    pub fn create_layer_from(&mut self, manifest: LayerManifest) -> Result<LayerId> {
        let id = LayerId::fresh();
        self.layers.push(id);
        let store = self.store;
        let _excluding = match self.shared {
            Some(_) => None,
            None => Some(store.lock_shared_in_transfer()?),
        };
        create_private_dir(&store.paths().layer_dir(id))?;
        create_private_dir(&store.paths().layer_tree(id))?;
        create_private_dir(&store.paths().layer_work(id))?;
        if self.shared.is_none() {
            self.held.hold_all(store, &[id])?;
        }
        disk::write_new(&store.paths().layer_file(id), &Record::first(manifest))?;
        self.add_unsynced(store.paths().layer_file(id));
        self.add_unsynced(store.paths().layer_tree(id));
        self.add_unsynced(store.paths().layer_dir(id));
        self.add_unsynced(store.paths().layers());
        Ok(id)
    }

    /// Holds a layer of the store until the creation ends. Returns false if it does not exist.
    pub fn hold(&mut self, id: LayerId) -> Result<bool> {
        self.held.hold(self.store, id)
    }

    /// Leaves a created layer in place, even if this creation is rolled back: something else retains it.
    pub fn retain_layer(&mut self, id: LayerId) {
        self.layers.retain(|layer| *layer != id);
    }

    /// Removes a created layer that is not needed.
    pub fn discard_layer(&mut self, id: LayerId) -> Result<()> {
        remove_tree(&self.store.paths().layer_dir(id))?;
        self.held.release(id);
        self.retain_layer(id);
        // What was removed cannot be synced.
        let dir = self.store.paths().layer_dir(id);
        self.unsynced.retain(|path| !path.starts_with(&dir));
        Ok(())
    }

    /// Adds a file or directory to those that [`Creation::sync`] syncs.
    pub fn add_unsynced(&mut self, path: PathBuf) {
        self.unsynced.push(path);
    }

    /// Adds a file that no manifest names yet, below the directory of an existing container.
    pub fn add_file(&mut self, path: PathBuf) {
        self.files.push(path.clone());
        self.unsynced.push(path);
    }

    /// Syncs all created files and directories, in the order of their creation. One journal commit usually covers all
    /// of them.
    pub fn sync(&mut self) -> Result<()> {
        for path in std::mem::take(&mut self.unsynced) {
            disk::sync_file(&path)?;
        }
        Ok(())
    }

    /// Syncs the content of new layers, which must be durable before a manifest names them.
    pub fn sync_content(&self) -> Result<()> {
        self.filesystem.sync()
    }

    /// Creates the directory of a new container, which other commands ignore until its manifest is written.
    pub fn create_container(&mut self) -> Result<ContainerId> {
        let id = ContainerId::fresh();
        self.containers.push(id);
        create_private_dir(&self.store.paths().container_dir(id))?;
        // This file distinguishes an unfinished container from one that lost its manifest.
        let unfinished = self.store.paths().unfinished_file(id);
        disk::touch(&unfinished)?;
        self.add_unsynced(unfinished);
        create_private_dir(&self.store.paths().snapshots_dir(id))?;
        self.add_unsynced(self.store.paths().containers());
        Ok(id)
    }

    /// Makes [`Creation::finish`] run a collection, because the change removes references to layers.
    pub fn request_sweep(&mut self) {
        self.sweeps = true;
    }

    /// Retains the created objects, which a manifest now names.
    pub fn finish(mut self) -> Result<()> {
        self.layers.clear();
        self.files.clear();
        for id in std::mem::take(&mut self.containers) {
            disk::remove_if_exists(&self.store.paths().unfinished_file(id))?;
        }
        let Some(note) = self.note.take() else {
            return Ok(());
        };
        if !self.sweeps {
            return note.remove();
        }
        // Release the note but keep its file during the sweep: if this process is killed, the next command collects.
        drop(note);
        let store = self.store;
        drop(self);
        // The change itself has succeeded, so a failure is only logged.
        if let Err(error) = sweep(store) {
            log::warn!("{error}; nothing is collected until this is fixed");
        }
        Ok(())
    }

    /// Leaves the created objects and the note in place, because a manifest may name them. The next collection removes
    /// them if no manifest does.
    pub fn abandon(mut self) {
        self.layers.clear();
        self.containers.clear();
        self.files.clear();
        self.note = None;
    }
}

impl Drop for Creation<'_> {
    fn drop(&mut self) {
        let layers = self
            .layers
            .iter()
            .map(|id| self.store.paths().layer_dir(*id));
        let containers = self
            .containers
            .iter()
            .map(|id| self.store.paths().container_dir(*id));
        let mut clean = true;
        for path in layers.chain(containers) {
            if let Err(error) = remove_tree(&path) {
                log::warn!("{error}; the next command will remove it");
                clean = false;
            }
        }
        for path in &self.files {
            if let Err(error) = disk::remove_if_exists(path) {
                log::warn!("{error}; the next command will remove it");
                clean = false;
            }
        }
        // If an object could not be removed, retain the note, so that the next command finds the object.
        if let Some(note) = self.note.take()
            && clean
            && let Err(error) = note.remove()
        {
            log::warn!("{error}");
        }
    }
}

/// Creates a directory with mode 0700. Fails if it exists.
fn create_private_dir(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(path)
        .map_err(|error| Error::at("create the directory", path, error))
}

/// Copies the attributes and xattrs of the directory `from` to `to`: a mount shows those of the topmost layer's root.
fn copy_root(from: &Path, to: &Path, space: XattrSpace) -> Result<()> {
    let (source, target) = (open(from)?, open(to)?);
    let copy = || -> cowl_layers::Result<()> {
        let stat = sys::stat::stat_fd(&source)?;
        let target = target.as_fd();
        sys::attr::chown(target, Some(stat.uid), Some(stat.gid))?;
        sys::attr::chmod(target, stat.perm())?;
        for (name, value) in plain_xattrs(&source, space)? {
            sys::xattr::set(target, &name, &value)?;
        }
        let (atime, mtime) = (SetTime::At(stat.atime), SetTime::At(stat.mtime));
        sys::attr::utimens(target, atime, mtime)
    };
    copy().map_err(|error| Error::at("set the attributes of", to, error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::super::tests::session;
    use super::*;

    fn store(dir: &Path) -> Store {
        Store::open_or_make(&dir.join("store"), session()).unwrap()
    }

    #[test]
    fn a_new_head_has_the_attributes_of_the_layer_below() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let mut creation = Creation::begin(&store).unwrap();
        let base = creation.create_layer(LayerKind::Base, &[], &[]).unwrap();
        let tree = store.paths().layer_tree(base);
        std::fs::create_dir(tree.join("etc")).unwrap();
        std::fs::set_permissions(&tree, std::fs::Permissions::from_mode(0o1751)).unwrap();
        let fd = open(&tree).unwrap();
        sys::xattr::set(fd.as_fd(), b"user.color", b"blue").unwrap();
        let marker = store.space().opaque().as_bytes();
        sys::xattr::set(fd.as_fd(), marker, b"y").unwrap();
        let head = creation.create_head(&[base], &tree).unwrap();
        creation.finish().unwrap();

        let (a, b) = (
            tree.metadata().unwrap(),
            store.paths().layer_tree(head).metadata().unwrap(),
        );
        assert_eq!(a.mode(), b.mode());
        assert_eq!((a.mtime(), a.mtime_nsec()), (b.mtime(), b.mtime_nsec()));
        let fd = open(&store.paths().layer_tree(head)).unwrap();
        assert_eq!(
            sys::xattr::get(fd.as_fd(), b"user.color").unwrap(),
            Some(b"blue".to_vec())
        );
        assert_eq!(sys::xattr::get(fd.as_fd(), marker).unwrap(), None);
        assert!(store.is_untouched(head, base).unwrap());

        let old = b.modified().unwrap();
        let file = store.paths().layer_tree(head).join("x");
        std::fs::write(&file, b"").unwrap();
        assert!(!store.is_untouched(head, base).unwrap());
        std::fs::remove_file(&file).unwrap();
        // The file is removed again, but the root's mtime has changed.
        assert!(!store.is_untouched(head, base).unwrap());
        std::fs::File::open(store.paths().layer_tree(head))
            .unwrap()
            .set_modified(old)
            .unwrap();
        assert!(store.is_untouched(head, base).unwrap());
    }

    #[test]
    fn unfinished_objects_are_removed_on_drop() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let mut creation = Creation::begin(&store).unwrap();
        let base = creation.create_layer(LayerKind::Base, &[], &[]).unwrap();
        let container = creation.create_container().unwrap();
        drop(creation);
        assert!(!store.paths().layer_dir(base).try_exists().unwrap());
        assert!(!store.paths().container_dir(container).try_exists().unwrap());
        let locks = disk::names(&store.root().join("locks")).unwrap();
        assert_eq!(locks, ["store.lock"]);
    }
}
