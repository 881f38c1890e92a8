//! Making layers and containers.
//!
//! Everything that a command makes before its commit is made through [`Making`]: it keeps collection
//! away, and leaves a note in `locks` by which the next command finds what a killed one left behind.

use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use cowl_layers::format::XattrSpace;
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;

use super::collect::sweep;
use super::disk::remove_tree;
use super::layers::{open, plain_xattrs};
use super::lock::Lock;
use super::manifest::{ContainerId, LayerId, LayerKind, LayerManifest};
use super::notes::MAKING;
use super::record::Record;
use super::{Store, disk};
use crate::error::{Error, Result};

/// Things on their way into the store. Dropped before [`Making::finish`], it removes them again.
#[derive(Debug)]
pub struct Making<'s> {
    store: &'s Store,
    _shared: Lock,
    note: Option<Lock>,
    // Opened before anything is written, so that its sync reports every error of the writing.
    filesystem: disk::Filesystem,
    sweeps: bool,
    unsynced: Vec<PathBuf>,
    layers: Vec<LayerId>,
    containers: Vec<ContainerId>,
}

impl<'s> Making<'s> {
    /// Begins.
    pub fn begin(store: &'s Store) -> Result<Self> {
        let shared = store.lock_shared()?;
        let filesystem = disk::Filesystem::open(&store.paths().layers())?;
        let path = store
            .paths()
            .lock_file(&format!("{MAKING}{}", LayerId::fresh()));
        Ok(Self {
            filesystem,
            store,
            _shared: shared,
            note: Some(Lock::take_anonymous(&path, store.session().patience)?),
            sweeps: false,
            unsynced: Vec::new(),
            layers: Vec::new(),
            containers: Vec::new(),
        })
    }

    /// Makes an empty layer whose root has the attributes of the root of `like`.
    pub fn create_head(&mut self, over: &[LayerId], like: &Path) -> Result<LayerId> {
        let id = self.create_layer_from(LayerManifest {
            unsynced: true,
            ..LayerManifest::new(LayerKind::Delta, over, &[])
        })?;
        copy_root(like, &self.store.paths().layer_tree(id), self.store.space())?;
        Ok(id)
    }

    /// Makes an empty layer for the caller to fill, and to put on the disk what it filled in.
    pub fn create_layer(
        &mut self,
        kind: LayerKind,
        over: &[LayerId],
        stands_for: &[LayerId],
    ) -> Result<LayerId> {
        self.create_layer_from(LayerManifest::new(kind, over, stands_for))
    }

    /// The same for a layer of which everything is known already.
    pub fn create_layer_from(&mut self, manifest: LayerManifest) -> Result<LayerId> {
        let id = LayerId::fresh();
        self.layers.push(id);
        let store = self.store;
        private_dir(&store.paths().layer_dir(id))?;
        private_dir(&store.paths().layer_tree(id))?;
        private_dir(&store.paths().layer_work(id))?;
        disk::write_new(&store.paths().layer_file(id), &Record::first(manifest))?;
        self.add_unsynced(store.paths().layer_file(id));
        self.add_unsynced(store.paths().layer_tree(id));
        self.add_unsynced(store.paths().layer_dir(id));
        self.add_unsynced(store.paths().layers());
        Ok(id)
    }

    /// Has [`Making::sync`] put this file or folder on the disk too.
    pub fn add_unsynced(&mut self, path: PathBuf) {
        self.unsynced.push(path);
    }

    /// Puts everything that was made on the disk, in the order in which it was made. The journal of a file
    /// system takes all of it in one go.
    pub fn sync(&mut self) -> Result<()> {
        for path in std::mem::take(&mut self.unsynced) {
            disk::sync_file(&path)?;
        }
        Ok(())
    }

    /// Syncs everything that was written into new layers, which must be durable before a manifest names
    /// them.
    pub fn sync_content(&self) -> Result<()> {
        self.filesystem.sync()
    }

    /// Makes the folder of a new container, not counting until its manifest is there.
    pub fn create_container(&mut self) -> Result<ContainerId> {
        let id = ContainerId::fresh();
        self.containers.push(id);
        private_dir(&self.store.paths().container_dir(id))?;
        // Tells one that is being made from one that lost its manifest.
        let unfinished = self.store.paths().unfinished_file(id);
        disk::touch(&unfinished)?;
        self.add_unsynced(unfinished);
        private_dir(&self.store.paths().snapshots_dir(id))?;
        self.add_unsynced(self.store.paths().containers());
        Ok(id)
    }

    /// The change takes the last name from something: [`Making::finish`] is to clean that up.
    pub fn request_sweep(&mut self) {
        self.sweeps = true;
    }

    /// All that was made is named by a manifest now: it stays.
    pub fn finish(mut self) -> Result<()> {
        self.layers.clear();
        for id in std::mem::take(&mut self.containers) {
            disk::remove_if_exists(&self.store.paths().unfinished_file(id))?;
        }
        let Some(note) = self.note.take() else {
            return Ok(());
        };
        if !self.sweeps {
            return note.remove();
        }
        // The note stays until the sweep is through, for the case that we are killed in it.
        drop(note);
        let store = self.store;
        drop(self);
        // What was to be done is done.
        if let Err(error) = sweep(store) {
            log::warn!("{error}; nothing is collected before that is put in order");
        }
        Ok(())
    }

    /// It may be that a manifest names what was made: the next command's collection finds out.
    pub fn abandon(mut self) {
        self.layers.clear();
        self.containers.clear();
        self.note = None;
    }
}

impl Drop for Making<'_> {
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
                log::warn!("{error}; the next command will clean up");
                clean = false;
            }
        }
        // The note stays when something is left for the next command to find.
        if let Some(note) = self.note.take()
            && clean
            && let Err(error) = note.remove()
        {
            log::warn!("{error}");
        }
    }
}

fn private_dir(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(path)
        .map_err(|error| Error::at("make the folder", path, error))
}

/// Gives the root of `to` the attributes of the root of `from`: a stack's topmost root is what shows.
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
    fn a_new_head_looks_as_what_it_lies_over() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let mut making = Making::begin(&store).unwrap();
        let base = making.create_layer(LayerKind::Base, &[], &[]).unwrap();
        let tree = store.paths().layer_tree(base);
        std::fs::create_dir(tree.join("etc")).unwrap();
        std::fs::set_permissions(&tree, std::fs::Permissions::from_mode(0o1751)).unwrap();
        let fd = open(&tree).unwrap();
        sys::xattr::set(fd.as_fd(), b"user.colour", b"blue").unwrap();
        let mark = store.space().opaque().as_bytes();
        sys::xattr::set(fd.as_fd(), mark, b"y").unwrap();
        let head = making.create_head(&[base], &tree).unwrap();
        making.finish().unwrap();

        let (a, b) = (
            tree.metadata().unwrap(),
            store.paths().layer_tree(head).metadata().unwrap(),
        );
        assert_eq!(a.mode(), b.mode());
        assert_eq!((a.mtime(), a.mtime_nsec()), (b.mtime(), b.mtime_nsec()));
        let fd = open(&store.paths().layer_tree(head)).unwrap();
        assert_eq!(
            sys::xattr::get(fd.as_fd(), b"user.colour").unwrap(),
            Some(b"blue".to_vec())
        );
        assert_eq!(sys::xattr::get(fd.as_fd(), mark).unwrap(), None);
        assert!(store.is_untouched(head, base).unwrap());

        let old = b.modified().unwrap();
        let file = store.paths().layer_tree(head).join("x");
        std::fs::write(&file, b"").unwrap();
        assert!(!store.is_untouched(head, base).unwrap());
        std::fs::remove_file(&file).unwrap();
        // Gone again, but the root's mtime tells.
        assert!(!store.is_untouched(head, base).unwrap());
        std::fs::File::open(store.paths().layer_tree(head))
            .unwrap()
            .set_modified(old)
            .unwrap();
        assert!(store.is_untouched(head, base).unwrap());
    }

    #[test]
    fn what_is_not_done_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let mut making = Making::begin(&store).unwrap();
        let base = making.create_layer(LayerKind::Base, &[], &[]).unwrap();
        let container = making.create_container().unwrap();
        drop(making);
        assert!(!store.paths().layer_dir(base).try_exists().unwrap());
        assert!(!store.paths().container_dir(container).try_exists().unwrap());
        let locks = disk::names(&store.root().join("locks")).unwrap();
        assert_eq!(locks, ["store.lock"]);
    }
}
