//! Making layers, and telling whether anything was written to one.
//!
//! Everything that a command makes before its commit is made through [`Making`]: it keeps collection
//! away, and leaves a note in `locks` by which the next command finds what a killed one left behind.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cowl_layers::format::XattrSpace;
use cowl_layers::layer::Layer;
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::view::{View, without_marks};

use super::lock::Lock;
use super::manifest::{ContainerId, LayerId, LayerKind, LayerManifest, Measured};
use super::record::Record;
use super::{Store, disk};
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// What ends up in `locks` while something is being made.
pub(super) const NOTE: &str = "making-";

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

/// Things on their way into the store. Dropped before [`Making::done`], it removes them again.
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
        let shared = store.share()?;
        let filesystem = disk::Filesystem::open(&store.root().join("layers"))?;
        let path = store.lock_file(&format!("{NOTE}{}", LayerId::fresh()));
        Ok(Self {
            filesystem,
            store,
            _shared: shared,
            note: Some(Lock::take_unsigned(&path, store.session().patience)?),
            sweeps: false,
            unsynced: Vec::new(),
            layers: Vec::new(),
            containers: Vec::new(),
        })
    }

    /// Makes an empty layer whose root has the attributes of the root of `like`.
    pub fn head(&mut self, over: &[LayerId], like: &Path) -> Result<LayerId> {
        let id = self.layer_as(LayerManifest {
            unsynced: true,
            ..LayerManifest::new(LayerKind::Delta, over, &[])
        })?;
        copy_root(like, &self.store.layer_tree(id), self.store.space())?;
        Ok(id)
    }

    /// Makes an empty layer for the caller to fill, and to put on the disk what it filled in.
    pub fn layer(
        &mut self,
        kind: LayerKind,
        over: &[LayerId],
        stands_for: &[LayerId],
    ) -> Result<LayerId> {
        self.layer_as(LayerManifest::new(kind, over, stands_for))
    }

    /// The same for a layer of which everything is known already.
    pub fn layer_as(&mut self, manifest: LayerManifest) -> Result<LayerId> {
        let id = LayerId::fresh();
        self.layers.push(id);
        let store = self.store;
        private_dir(&store.layer_dir(id))?;
        private_dir(&store.layer_tree(id))?;
        private_dir(&store.layer_work(id))?;
        disk::write_new(&store.layer_file(id), &Record::first(manifest))?;
        self.will_sync(store.layer_file(id));
        self.will_sync(store.layer_tree(id));
        self.will_sync(store.layer_dir(id));
        self.will_sync(store.root().join("layers"));
        Ok(id)
    }

    /// Has [`Making::sync`] put this file or folder on the disk too.
    pub fn will_sync(&mut self, path: PathBuf) {
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
    pub fn container(&mut self) -> Result<ContainerId> {
        let id = ContainerId::fresh();
        self.containers.push(id);
        private_dir(&self.store.container_dir(id))?;
        // Tells one that is being made from one that lost its manifest.
        let unfinished = self.store.unfinished_file(id);
        disk::touch(&unfinished)?;
        self.will_sync(unfinished);
        private_dir(&self.store.snapshots_dir(id))?;
        self.will_sync(self.store.root().join("containers"));
        Ok(id)
    }

    /// The change takes the last name from something: [`Making::done`] is to clean that up.
    pub fn frees_something(&mut self) {
        self.sweeps = true;
    }

    /// All that was made is named by a manifest now: it stays.
    pub fn done(mut self) -> Result<()> {
        self.layers.clear();
        for id in std::mem::take(&mut self.containers) {
            disk::remove_if_there(&self.store.unfinished_file(id))?;
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
        if let Err(error) = store.sweep() {
            log::warn!("{error}; nothing is collected before that is put in order");
        }
        Ok(())
    }

    /// It may be that a manifest names what was made: the next command's collection finds out.
    pub fn leave(mut self) {
        self.layers.clear();
        self.containers.clear();
        self.note = None;
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        let layers = self.layers.iter().map(|id| self.store.layer_dir(*id));
        let containers = self
            .containers
            .iter()
            .map(|id| self.store.container_dir(*id));
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

/// Removes a tree, of whatever depth; nothing when it is gone.
pub fn remove_tree(path: &Path) -> Result<()> {
    use std::os::unix::ffi::OsStrExt as _;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::failed(format!("{} names no folder", path.shown())));
    };
    let dir = match sys::dir::open_root(parent) {
        Ok(dir) => dir,
        Err(error) if error.is_absent() => return Ok(()),
        Err(error) => return Err(Error::at("remove", path, error)),
    };
    sys::remove::tree(dir.as_fd(), name.as_bytes()).map_err(|stopped| {
        let at = match stopped.path.as_slice() {
            b"" => path.to_path_buf(),
            inner => path.join(std::ffi::OsStr::from_bytes(inner)),
        };
        Error::at("remove", &at, stopped.error)
    })
}

fn open(tree: &Path) -> Result<OwnedFd> {
    sys::dir::open_root(tree).map_err(|error| {
        let error = Error::at("open the layer", tree, error);
        Error {
            kind: crate::error::Kind::Damaged,
            ..error
        }
    })
}

/// A root's extended attributes, without marks: those speak of one layer's place in one stack.
fn plain_xattrs(fd: &OwnedFd, space: XattrSpace) -> cowl_layers::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut plain = without_marks(space, sys::xattr::all(fd.as_fd())?);
    plain.sort_unstable();
    Ok(plain)
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

impl Store {
    /// Whether nothing was ever written to the head `top` that lies over `below`: it has no entry, and
    /// its root looks as the one below. Such a head adds nothing to a snapshot.
    pub fn is_untouched(&self, top: LayerId, below: LayerId) -> Result<bool> {
        let (top, below) = (self.layer_tree(top), self.layer_tree(below));
        let (a, b) = (open(&top)?, open(&below)?);
        let same = || -> cowl_layers::Result<bool> {
            if !sys::dir::entries(a.as_fd())?.is_empty() {
                return Ok(false);
            }
            let (x, y) = (sys::stat::stat_fd(&a)?, sys::stat::stat_fd(&b)?);
            let looks = (x.mode, x.uid, x.gid, x.mtime) == (y.mode, y.uid, y.gid, y.mtime);
            Ok(looks && plain_xattrs(&a, self.space())? == plain_xattrs(&b, self.space())?)
        };
        same().map_err(|error| Error::at("look at the layer", &top, error))
    }

    /// The trees of layers, in the order of the stack. Each must be a directory: a symbolic link would lead out
    /// of the store.
    pub fn layer_trees(&self, stack: &[LayerId]) -> Result<Vec<PathBuf>> {
        stack
            .iter()
            .map(|id| {
                let tree = self.layer_tree(*id);
                match disk::is_dir(&tree)? {
                    true => Ok(tree),
                    false => Err(
                        Error::damaged(format!("the layer {} is missing", tree.shown()))
                            .hint("bring it back from a backup; nothing was changed"),
                    ),
                }
            })
            .collect()
    }

    /// Opens layers, topmost first.
    pub fn open_layers(&self, stack: &[LayerId]) -> Result<Vec<Arc<Layer>>> {
        let trees = self.layer_trees(stack)?;
        let open = |tree: &PathBuf| Ok(Layer::open(tree, self.space())?);
        trees.iter().map(open).collect()
    }

    /// What a stack shows.
    pub fn view(&self, stack: &[LayerId]) -> Result<View> {
        Ok(View::new(self.open_layers(stack)?))
    }

    /// What a frozen layer takes; counted the first time that somebody asks. Hold a shared lock of the
    /// store.
    pub fn measured(&self, id: LayerId) -> Result<(LayerKind, Measured)> {
        let size = self.size_of(id)?;
        Ok((size.kind, size.measured))
    }

    /// Like [`Store::measured`], and whether the answer may be recorded.
    pub fn size_of(&self, id: LayerId) -> Result<LayerSize> {
        let record = disk::read::<LayerManifest>(&self.layer_file(id))?;
        let (kind, is_final) = (record.body.kind, !record.body.unsynced);
        let measured = match record.body.measured {
            // Older versions did not count inodes.
            Some(measured) if measured.inodes > 0 && is_final => measured,
            _ => {
                let (measured, looks) = self.measure(id)?;
                // A power cut may still take some of it. What is recorded must hold afterwards, too.
                if is_final {
                    self.note_measured(id, &record, measured, looks);
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

    /// Returns those of `layers` whose content is not known to be durable.
    pub fn unsynced(&self, layers: &[LayerId]) -> Result<Vec<LayerId>> {
        let mut found = Vec::new();
        for id in layers {
            if disk::read::<LayerManifest>(&self.layer_file(*id))?
                .body
                .unsynced
            {
                found.push(*id);
            }
        }
        Ok(found)
    }

    /// Records what a frozen layer takes now, whatever was recorded before. Its content must be durable, and
    /// a shared lock of the store held.
    pub fn measure_again(&self, id: LayerId) -> Result<()> {
        let path = self.layer_file(id);
        let record = disk::read::<LayerManifest>(&path)?;
        let (measured, looks) = self.measure(id)?;
        let body = LayerManifest {
            measured: Some(measured),
            looks: Some(looks),
            digest: None,
            unsynced: false,
            ..record.body.clone()
        };
        disk::replace(&path, &record.next(body))
    }

    /// Records that a layer's content is not known to be durable.
    pub fn note_unsynced(&self, id: LayerId) -> Result<()> {
        let path = self.layer_file(id);
        let record = disk::read::<LayerManifest>(&path)?;
        if record.body.unsynced {
            return Ok(());
        }
        let body = LayerManifest {
            unsynced: true,
            ..record.body.clone()
        };
        disk::replace(&path, &record.next(body))
    }

    /// Records that a frozen layer's content is durable. Hold a shared lock of the store.
    pub fn note_synced(&self, id: LayerId) -> Result<()> {
        let path = self.layer_file(id);
        let Some(record) = disk::read_opt::<LayerManifest>(&path)? else {
            // Merged into another one meanwhile, or its last name was removed.
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

    /// About what the layers take on the disk together, a head on top not counted; `None` where one was
    /// never measured.
    pub fn known_size(&self, layers: &[LayerId]) -> Result<Option<u64>> {
        let mut total = 0;
        for (place, id) in layers.iter().enumerate() {
            match disk::read::<LayerManifest>(&self.layer_file(*id))?
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

    /// Kept so that it need not be measured again; on a full disk it will be.
    fn note_measured(
        &self,
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
        if let Err(error) = disk::replace(&self.layer_file(id), &record.next(body)) {
            log::debug!("cannot keep the size of a layer: {error}");
        }
    }

    /// What a layer takes just now, and what its tree looks like.
    pub fn measure(&self, id: LayerId) -> Result<(Measured, String)> {
        self.measure_like(id, None)
    }

    /// The same in the form of what is `known` of the tree already.
    pub fn measure_like(&self, id: LayerId, known: Option<&str>) -> Result<(Measured, String)> {
        let tree = self.layer_tree(id);
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
        Ok((measured, size.looks))
    }
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
        let base = making.layer(LayerKind::Base, &[], &[]).unwrap();
        let tree = store.layer_tree(base);
        std::fs::create_dir(tree.join("etc")).unwrap();
        std::fs::set_permissions(&tree, std::fs::Permissions::from_mode(0o1751)).unwrap();
        let fd = open(&tree).unwrap();
        sys::xattr::set(fd.as_fd(), b"user.colour", b"blue").unwrap();
        let mark = store.space().opaque().as_bytes();
        sys::xattr::set(fd.as_fd(), mark, b"y").unwrap();
        let head = making.head(&[base], &tree).unwrap();
        making.done().unwrap();

        let (a, b) = (
            tree.metadata().unwrap(),
            store.layer_tree(head).metadata().unwrap(),
        );
        assert_eq!(a.mode(), b.mode());
        assert_eq!((a.mtime(), a.mtime_nsec()), (b.mtime(), b.mtime_nsec()));
        let fd = open(&store.layer_tree(head)).unwrap();
        assert_eq!(
            sys::xattr::get(fd.as_fd(), b"user.colour").unwrap(),
            Some(b"blue".to_vec())
        );
        assert_eq!(sys::xattr::get(fd.as_fd(), mark).unwrap(), None);
        assert!(store.is_untouched(head, base).unwrap());

        let old = b.modified().unwrap();
        let file = store.layer_tree(head).join("x");
        std::fs::write(&file, b"").unwrap();
        assert!(!store.is_untouched(head, base).unwrap());
        std::fs::remove_file(&file).unwrap();
        // Gone again, but the root's mtime tells.
        assert!(!store.is_untouched(head, base).unwrap());
        std::fs::File::open(store.layer_tree(head))
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
        let base = making.layer(LayerKind::Base, &[], &[]).unwrap();
        let container = making.container().unwrap();
        drop(making);
        assert!(!store.layer_dir(base).try_exists().unwrap());
        assert!(!store.container_dir(container).try_exists().unwrap());
        let locks = disk::names(&store.root().join("locks")).unwrap();
        assert_eq!(locks, ["store.lock"]);
    }
}
