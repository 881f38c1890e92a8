//! Layers that another process opened and locked, and whose descriptors it has handed over.
//!
//! A lock belongs to the open file description, so it is held as long as any process has a descriptor of it.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::handed_over::LayerRecord;
use super::lock::LayerLock;
use super::upper_dirs::{LockedUpper, UpperLocks};
use super::{Layer, Upper};
use crate::error::Result;
use crate::setup::SetupError;
use crate::sys;

/// The properties of a layer that its descriptor does not tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerTraits {
    layer: LayerRecord,
    /// The path of the work directory of an upper layer.
    work: Option<OsString>,
}

/// A layer of another process.
#[derive(Debug)]
pub struct InheritedLayer {
    /// The layer.
    pub layer: Arc<Layer>,
    /// Its lock.
    pub lock: Arc<LayerLock>,
    /// The work directory of an upper layer: its descriptor, which holds the lock, and its path.
    work: Option<(OwnedFd, PathBuf)>,
}

impl Layer {
    /// Returns the properties that [`InheritedLayer::new`] needs.
    pub fn traits(&self) -> LayerTraits {
        LayerTraits {
            layer: self.record(),
            work: None,
        }
    }
}

impl Upper {
    /// Like [`Layer::traits`], for an upper layer.
    pub fn traits(&self) -> LayerTraits {
        LayerTraits {
            work: Some(self.work_path.clone().into_os_string()),
            ..self.layer.traits()
        }
    }

    /// Returns the descriptor of the work directory that the user specified, which holds its lock.
    pub fn locked_work(&self) -> BorrowedFd<'_> {
        self.locks.outer.as_fd()
    }
}

impl InheritedLayer {
    /// Returns a layer with this root directory and, if it is an upper layer, this work directory. Both descriptors hold
    /// the locks.
    pub fn new(traits: &LayerTraits, root: OwnedFd, work: Option<OwnedFd>) -> Result<Self> {
        let layer = Layer::from_record(traits.layer.clone(), root)?;
        let lock = LayerLock::inherited(&layer);
        Ok(Self {
            layer,
            lock,
            work: work.zip(traits.work.as_ref().map(PathBuf::from)),
        })
    }

    /// Returns a second layer with the same locks.
    pub fn try_clone(&self) -> Result<Self> {
        let root = sys::dir::duplicate(self.layer.root_fd())?;
        let traits = LayerTraits {
            work: (self.work.as_ref()).map(|(_, path)| path.clone().into_os_string()),
            ..self.layer.traits()
        };
        let work = match &self.work {
            Some((fd, _)) => Some(sys::dir::duplicate(fd.as_fd())?),
            None => None,
        };
        Self::new(&traits, root, work)
    }

    /// Returns a lower layer with its lock. Unlocks an upper layer, and returns `None`.
    pub fn without_work(self) -> Option<(Arc<Layer>, Arc<LayerLock>)> {
        match self.work {
            None => Some((self.layer, self.lock)),
            Some((outer, _)) => {
                if let Err(error) = sys::dir::unlock(&outer) {
                    log::warn!("cannot unlock a work directory: {error}");
                }
                None
            }
        }
    }

    /// Returns the upper layer, after it has completed or removed what the other process left in its work directory.
    /// Returns `None` for a layer without a work directory.
    pub fn into_upper(self) -> Result<Option<Arc<Upper>>, SetupError> {
        let Some((outer, work)) = self.work else {
            return Ok(None);
        };
        self.lock
            .make_exclusive()
            .map_err(|error| SetupError::at("cannot lock", self.layer.path(), error))?;
        let locked = LockedUpper {
            layer: self.layer,
            work,
            locks: UpperLocks {
                layer: self.lock,
                outer,
            },
        };
        Upper::from_locked(locked).map(Some)
    }
}
