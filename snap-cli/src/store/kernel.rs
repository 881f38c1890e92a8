//! The use of a head by kernel overlayfs, which holds no lock that another process can see.
//!
//! Before cowl attaches such a mount, it writes `kernel.json` to the work directory of the head. The file remains after
//! any kill and any reboot. Whether the mount still exists is a question to the kernel ([`is_in_use`]). After the end of
//! the mount, the head must be settled (`container::kernel_layers`) before it is frozen, and before its lower layers
//! are replaced.

use std::os::fd::AsFd as _;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::manifest::LayerId;
use super::{Store, disk};
use crate::error::{Error, Result};
use cowl_layers::error::Errno;
use cowl_layers::shown::Show as _;
use cowl_layers::sys::{dir, overlay};

/// The program that merges the layers of a mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Driver {
    /// The daemon of cowlfs, through FUSE.
    #[default]
    Fuse,
    /// Kernel overlayfs. There is no daemon, and there are no snapshots while it is mounted.
    Kernel,
}

impl Driver {
    /// All variants with their names.
    pub const NAMES: [(&str, Self); 2] = [("fuse", Self::Fuse), ("kernel", Self::Kernel)];

    /// Returns the name.
    pub fn name(self) -> &'static str {
        cowlfs::config::choice_name(&Self::NAMES, &self)
    }
}

/// The phase of the use of a head by the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelPhase {
    /// The head is mounted, or its mount has ended and it was not settled yet.
    Mounted,
    /// The head was settled after the last mount.
    Settled,
}

/// The record in `kernel.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelUse {
    /// The phase.
    pub phase: KernelPhase,
    /// The lower layers of the last mount, topmost first. The kernel's origin xattrs in the head refer to them.
    pub lowers: Vec<LayerId>,
    /// The release of the kernel that has mounted them, and so can read all their markers.
    #[serde(default)]
    pub release: String,
}

fn path(store: &Store, head: LayerId) -> PathBuf {
    store.paths().layer_work(head).join("kernel.json")
}

/// Reads the record of a head; `None` if cowl has never mounted it with kernel overlayfs.
///
/// A record that cannot be parsed was left by a power cut, which has ended the mount.
pub fn read(store: &Store, head: LayerId) -> Result<Option<KernelUse>> {
    let path = path(store, head);
    let bytes = match disk::read_bytes(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::at("read", &path, error)),
    };
    Ok(Some(serde_json::from_slice(&bytes).unwrap_or_else(
        |error| {
            log::info!("{}: {error}", path.shown());
            KernelUse {
                phase: KernelPhase::Mounted,
                lowers: Vec::new(),
                release: String::new(),
            }
        },
    )))
}

/// Returns the release of the running kernel.
pub fn release() -> String {
    let name = rustix::system::uname();
    name.release().to_bytes().escape_ascii().to_string()
}

/// Replaces the record of a head, durably.
pub fn write(store: &Store, head: LayerId, record: &KernelUse) -> Result<()> {
    let path = path(store, head);
    let bytes = serde_json::to_vec(record).map_err(|error| Error::at("write", &path, error))?;
    disk::replace_bytes(&path, &bytes)
}

/// Whether the kernel has, or had, mounted the head since it was settled.
///
/// The kernel's index shows that another program has mounted it.
pub fn is_unsettled(store: &Store, head: LayerId) -> Result<bool> {
    if read(store, head)?.is_some_and(|record| record.phase == KernelPhase::Mounted) {
        return Ok(true);
    }
    Ok(!disk::names(&index(store, head))?.is_empty())
}

/// Returns the path of the kernel's index of a head.
pub fn index(store: &Store, head: LayerId) -> PathBuf {
    store.paths().layer_work(head).join("index")
}

/// Whether kernel overlayfs writes to the head: it is mounted in any mount namespace, or unmounted but still in use.
///
/// The kernel is asked only if the head is not settled. Without the privilege to ask, the head counts as in use.
pub fn is_in_use(store: &Store, head: LayerId) -> Result<bool> {
    if !is_unsettled(store, head)? {
        return Ok(false);
    }
    let tree = store.paths().layer_tree(head);
    match dir::open_root(&tree).and_then(|root| overlay::is_in_use(root.as_fd())) {
        Err(error) if matches!(error.errno(), Errno::PERM | Errno::ACCESS) => {
            log::info!(
                "cannot ask the kernel whether {} is in use: {error}",
                tree.shown()
            );
            Ok(true)
        }
        asked => {
            asked.map_err(|error| Error::at("ask the kernel whether overlayfs uses", &tree, error))
        }
    }
}
