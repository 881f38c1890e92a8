//! Opening of layers, and checks of their locks and content.

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
    /// Returns whether the head `top` over `below` is unmodified: it is empty, and the attributes of its root are those
    /// of the root below.
    ///
    /// An unmodified head adds nothing to a snapshot.
    pub fn is_untouched(&self, top: LayerId, below: LayerId) -> Result<bool> {
        let (top, below) = (self.paths().layer_tree(top), self.paths().layer_tree(below));
        let (a, b) = (open(&top)?, open(&below)?);
        let same = || -> cowl_layers::Result<bool> {
            if !sys::dir::entries(a.as_fd())?.is_empty() {
                return Ok(false);
            }
            let (x, y) = (sys::stat::stat_fd(&a)?, sys::stat::stat_fd(&b)?);
            let same_stat = (x.mode, x.uid, x.gid, x.mtime) == (y.mode, y.uid, y.gid, y.mtime);
            Ok(same_stat && plain_xattrs(&a, self.space())? == plain_xattrs(&b, self.space())?)
        };
        same().map_err(|error| Error::at("inspect the layer", &top, error))
    }

    /// Returns the trees of layers, in the order of the stack.
    ///
    /// Fails if one is not a directory: a symlink would lead out of the store.
    pub fn layer_trees(&self, stack: &[LayerId]) -> Result<Vec<PathBuf>> {
        stack
            .iter()
            .map(|id| {
                let tree = self.paths().layer_tree(*id);
                match disk::is_dir(&tree)? {
                    true => Ok(tree),
                    false => Err(
                        Error::damaged(format!("the layer {} is missing", tree.shown()))
                            .hint("restore it from a backup; nothing was changed"),
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

    /// Returns the merged view of a stack.
    pub fn view(&self, stack: &[LayerId]) -> Result<View> {
        Ok(View::new(self.open_layers(stack)?))
    }
}

/// Returns whether a mount writes to the layer.
pub fn is_written(store: &Store, id: LayerId) -> Result<bool> {
    let tree = store.paths().layer_tree(id);
    let written = sys::dir::open_root(&tree)
        .and_then(|root| Ok(sys::dir::lock_shared(root.as_fd())?.is_none()));
    match written {
        Err(error) if error.is_absent() => Ok(false),
        other => other.map_err(|error| Error::at("inspect the lock of", &tree, error)),
    }
}

/// Returns whether a mount uses the layer. A mount locks the layers that it reads and the layer that it writes.
pub fn is_held(store: &Store, id: LayerId) -> Result<bool> {
    let tree = store.paths().layer_tree(id);
    let held = sys::dir::open_root(&tree)
        .and_then(|root| Ok(sys::dir::lock_exclusive(root.as_fd())?.is_none()));
    match held {
        Err(error) if error.is_absent() => Ok(false),
        other => other.map_err(|error| Error::at("inspect the lock of", &tree, error)),
    }
}

/// Opens the tree of a layer. A failure has the kind "damaged".
pub(super) fn open(tree: &Path) -> Result<OwnedFd> {
    sys::dir::open_root(tree).map_err(|error| {
        let error = Error::at("open the layer", tree, error);
        Error {
            kind: crate::error::Kind::Damaged,
            ..error
        }
    })
}

/// Returns the sorted xattrs of a layer's root, without marker xattrs, which apply only to this layer in its stack.
pub(super) fn plain_xattrs(
    fd: &OwnedFd,
    space: XattrSpace,
) -> cowl_layers::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut plain = without_markers(space, sys::xattr::all(fd.as_fd())?);
    plain.sort_unstable();
    Ok(plain)
}
