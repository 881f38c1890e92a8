//! Layers that one process hands over to another: descriptors, and what is known about them.
//!
//! The receiving process resolves no path and probes no file system, so the layers are the same even if another
//! directory is at the path by now.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use super::lock::LayerLock;
use super::upper_dirs::UpperLocks;
use super::whiteout::{WhiteoutForm, Whiteouts};
use super::{Layer, Upper, WorkDir};
use crate::error::{Errno, Error, Result};
use crate::format::XattrSpace;
use crate::sys;
use crate::sys::early::Early;
use crate::sys::order::Order;

/// A layer without the descriptor of its root directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    path: OsString,
    id: u64,
    file_system: u64,
    dev: u64,
    ino: u64,
    space: XattrSpace,
    foreign: bool,
    no_devices: bool,
    warned: bool,
}

impl Layer {
    /// Describes the layer for another process, which also needs [`Layer::root_fd`].
    pub fn record(&self) -> LayerRecord {
        let Self {
            path,
            root: _,
            id,
            file_system,
            dev,
            ino,
            space,
            foreign,
            no_devices,
            warned,
        } = self;
        LayerRecord {
            path: path.clone().into_os_string(),
            id: *id,
            file_system: *file_system,
            dev: *dev,
            ino: *ino,
            space: *space,
            foreign: *foreign,
            no_devices: *no_devices,
            warned: warned.load(Ordering::Relaxed),
        }
    }

    /// Creates a layer from its record. Fails with ESTALE if `root` is another directory.
    pub fn from_record(record: LayerRecord, root: OwnedFd) -> Result<Arc<Self>> {
        let stat = sys::stat::stat_fd(&root)?;
        let LayerRecord {
            path,
            id,
            file_system,
            dev,
            ino,
            space,
            foreign,
            no_devices,
            warned,
        } = record;
        if (stat.dev, stat.ino) != (dev, ino) {
            return Err(Error::Errno(Errno::STALE));
        }
        Ok(Arc::new(Self {
            path: PathBuf::from(path),
            root: Arc::new(root),
            id,
            file_system,
            dev,
            ino,
            space,
            foreign,
            no_devices,
            warned: Arc::new(AtomicBool::new(warned)),
        }))
    }
}

/// An upper layer without its layer and its descriptors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpperRecord {
    whiteouts: (WhiteoutForm, bool),
    order: Order,
    early: Early,
    /// The path of the work directory that the user specified.
    work_path: OsString,
    /// The number of the next object in the work directory.
    next: u64,
}

impl Upper {
    /// Describes the upper layer for another process, which also needs these descriptors: the work directory that the
    /// user specified, and the one inside it.
    pub fn record(&self) -> (UpperRecord, [BorrowedFd<'_>; 2]) {
        let Self {
            layer: _,
            work,
            whiteouts,
            order,
            early,
            locks: UpperLocks { layer: _, outer },
            work_path,
            // The successor determines it again.
            shares_blocks: _,
        } = self;
        let record = UpperRecord {
            whiteouts: whiteouts.record(),
            order: *order,
            early: *early,
            work_path: work_path.clone().into_os_string(),
            next: work.next(),
        };
        (record, [outer.as_fd(), work.fd()])
    }

    /// Creates the upper layer from its record. The work directory is used as it is: its content is not cleaned.
    pub fn from_record(
        record: UpperRecord,
        layer: Arc<Layer>,
        [outer, work]: [OwnedFd; 2],
    ) -> Result<Arc<Self>> {
        let UpperRecord {
            whiteouts,
            order,
            early,
            work_path,
            next,
        } = record;
        for dir in [&outer, &work] {
            if sys::stat::stat_fd(dir)?.dev != layer.dev() {
                return Err(Error::Errno(Errno::STALE));
            }
        }
        let work = WorkDir::continued(work, next);
        let shared_dir = outer.try_clone().map_err(|_| Errno::MFILE)?;
        Ok(Arc::new(Self {
            whiteouts: Whiteouts::from_record(whiteouts, &work, shared_dir, layer.space()),
            locks: UpperLocks {
                layer: LayerLock::of_predecessor(&layer),
                outer,
            },
            layer,
            work,
            order,
            early,
            work_path: PathBuf::from(work_path),
            shares_blocks: OnceLock::new(),
        }))
    }

    /// Makes the locks those of this process, whose predecessor has ended.
    pub fn assume_locks(&self) {
        self.locks.layer.assume();
    }
}
