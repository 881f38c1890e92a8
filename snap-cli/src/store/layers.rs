//! Opening layers, and whether anything was written to one.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cowl_layers::format::XattrSpace;
use cowl_layers::layer::Layer;
use cowl_layers::sys;
use cowl_layers::view::{View, without_markers};

use super::manifest::LayerId;
use super::{Store, disk};
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

impl Store {
    /// Whether nothing was ever written to the head `top` that lies over `below`: it has no entry, and
    /// its root looks as the one below. Such a head adds nothing to a snapshot.
    pub fn is_untouched(&self, top: LayerId, below: LayerId) -> Result<bool> {
        let (top, below) = (self.paths().layer_tree(top), self.paths().layer_tree(below));
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
                let tree = self.paths().layer_tree(*id);
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
}

/// Whether some mount writes to the layer.
pub fn is_written(store: &Store, id: LayerId) -> Result<bool> {
    let tree = store.paths().layer_tree(id);
    let written = sys::dir::open_root(&tree)
        .and_then(|root| Ok(sys::dir::lock_shared(root.as_fd())?.is_none()));
    match written {
        Err(error) if error.is_absent() => Ok(false),
        other => other.map_err(|error| Error::at("inspect the lock of", &tree, error)),
    }
}

/// Whether some mount holds the layer: each locks the layers that it reads, and the one that it writes.
pub fn is_held(store: &Store, id: LayerId) -> Result<bool> {
    let tree = store.paths().layer_tree(id);
    let held = sys::dir::open_root(&tree)
        .and_then(|root| Ok(sys::dir::lock_exclusive(root.as_fd())?.is_none()));
    match held {
        Err(error) if error.is_absent() => Ok(false),
        other => other.map_err(|error| Error::at("look at the lock of", &tree, error)),
    }
}

pub(super) fn open(tree: &Path) -> Result<OwnedFd> {
    sys::dir::open_root(tree).map_err(|error| {
        let error = Error::at("open the layer", tree, error);
        Error {
            kind: crate::error::Kind::Damaged,
            ..error
        }
    })
}

/// A root's extended attributes, without marks: those speak of one layer's place in one stack.
pub(super) fn plain_xattrs(
    fd: &OwnedFd,
    space: XattrSpace,
) -> cowl_layers::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut plain = without_markers(space, sys::xattr::all(fd.as_fd())?);
    plain.sort_unstable();
    Ok(plain)
}
